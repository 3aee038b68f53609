"""The cache, recordings and replays of searches."""

import concurrent.futures
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import rollout_world as world

from configs import tapo_grpo
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.tools import backends
from tapo_jax.tools.base import BadCall, ToolRunner
from tapo_jax.tools.remote_search import RemoteTextSearch
from tapo_jax.tools.search_store import FILE, Asked, Kept, Store
from tapo_jax.types import Image, Origin, ToolCall

ROOT = Path(__file__).parents[1]
ADDRESS = "http://search:1"


class Service:
    """Stands in for the client: answers with a number that grows, or fails."""

    endpoint = ADDRESS

    def __init__(self):
        self.asked, self.fails = [], False

    def post(self, path, body):
        self.asked.append(body["queries"][0])
        if self.fails:
            raise BadCall("service", "The search service answered with status 500.")
        return {"result": [[{"contents": f"{body['queries'][0].lower()} {len(self.asked)}"}]]}, 0


def search(service, *, top_k=1, budget=100, endpoint=ADDRESS, **kept):
    made = RemoteTextSearch(endpoint, asked=bool(endpoint), top_k=top_k, budget=budget, timeout_s=5, kept=Kept(**kept))
    if endpoint:
        made._search = backends.posted(backends.BACKENDS["search-r1"], service, {})
    return made


def run(tool, query):
    """What the policy reads, and the error, past the runner's own cache."""
    _, result = ToolRunner([tool], workers=1, timeout_s=30, retries=0).run(
        ToolCall("text_search_tool", {"query": query}), []
    )
    return result.text, result.error


def config(**changes):
    made = tapo_grpo.get_config("test")
    made.update_from_flattened_dict({f"tools.{name}": value for name, value in changes.items()})
    return made


def test_the_cache_lasts_over_runs_and_knows_only_what_the_tool_depends_on(tmp_path):
    cache, service = str(tmp_path / "deep" / "cache.sqlite"), Service()
    assert run(search(service, cache=cache), "Lima") == ("1. lima 1", None)
    for query in ("lima", "  LIMA\n"):
        assert run(search(service, cache=cache), query) == ("1. lima 1", None)
    assert run(search(service, cache=cache, top_k=2), "lima") == ("1. lima 2", None)
    assert run(search(service, cache=cache, budget=5), "lima") == ("1. li", None)
    assert run(search(service, cache=cache, endpoint=f"{ADDRESS}/"), "lima") == ("1. lima 1", None)
    assert run(search(service, cache=cache, endpoint="http://other"), "lima") == ("1. lima 4", None)
    assert run(search(service), "lima") == ("1. lima 5", None)


def test_the_cache_keeps_no_failure(tmp_path):
    tool, service = None, Service()
    service.fails = True
    tool = search(service, cache=str(tmp_path / "c"))
    assert run(tool, "lima")[1] == "service"
    service.fails = False
    assert run(tool, "lima") == ("1. lima 2", None)


WRITE = """
import sys
import threading
from pathlib import Path
from tapo_jax.tools.search_store import Store
store = Store(Path(sys.argv[1]), field="x")
for i in range(200):
    store.put(f"{sys.argv[2]} {i}", "asked", None, "text")
    store.put(f"both {i}", "asked", None, sys.argv[2])
"""


def test_processes_share_a_cache(tmp_path):
    path = tmp_path / "c"
    started = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(path), name], cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
        for name in "abc"
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    store = Store(path, field="x")
    assert all(store.get(f"{name} {i}") == (None, "text") for name in "abc" for i in range(200))
    assert {store.get(f"both {i}")[1] for i in range(200)} <= set("abc")


def test_a_store_that_fails_later_is_no_failure_of_the_search(tmp_path, monkeypatch):
    service, kept = Service(), Kept(cache=str(tmp_path / "c"))
    kept._cache.close()
    assert kept.result(Asked("b", "e", "q", 1, 1), lambda: ("found", 0)).text == "found"
    kept = Kept(record=str(tmp_path / "r"))
    kept._record.close()
    assert kept.result(Asked("b", "e", "q", 1, 1), lambda: ("found", 0)).text == "found" and not service.asked


def test_a_replay_is_what_the_recorded_run_saw(tmp_path):
    """Failures too, and without the address. In the recorded run the first outcome of a search is its outcome."""
    folder, service = str(tmp_path / "run"), Service()
    tool, seen = search(service, record=folder), []
    for number, query in enumerate(("lima", "chad", "LIMA", "peru", "chad")):
        service.fails = number == 1
        seen.append(run(tool, query))
    assert [error for _, error in seen] == [None, "service", None, None, "service"]
    assert [query.lower() for query in service.asked] == ["lima", "chad", "peru"] and seen[0] == seen[2]
    for _ in range(2):
        replay = search(None, endpoint="", replay=folder)
        assert [run(replay, query) for query in ("lima", "chad", "LIMA", "peru", "chad")] == seen
        assert run(replay, "oslo") == ("Error: This search was not recorded.", "replay_miss")
        assert run(search(None, endpoint="", replay=folder, top_k=2), "lima")[1] == "replay_miss"


def test_a_recording_of_a_run_with_a_cache_holds_what_came_from_the_cache(tmp_path):
    cache, folder, service = str(tmp_path / "c"), str(tmp_path / "run"), Service()
    run(search(service, cache=cache), "lima")
    assert run(search(service, cache=cache, record=folder), "lima") == ("1. lima 1", None)
    assert run(search(None, endpoint="", replay=folder), "lima") == ("1. lima 1", None) and len(service.asked) == 1


def origins(tool, *queries, images=()):
    runner = ToolRunner([tool], workers=1, timeout_s=30, retries=0)
    return [runner.run(ToolCall("text_search_tool", {"query": query}), images)[1].origin for query in queries]


def test_a_result_says_where_it_came_from(tmp_path):
    cache, folder, service = str(tmp_path / "c"), str(tmp_path / "run"), Service()
    live, kept, replay = (Origin("search-r1", source) for source in ("live", "cache", "replay"))
    tool = search(service, cache=cache, record=folder)
    assert origins(tool, "Lima", "LIMA", "Lima") == [live, kept, kept]
    assert origins(search(service, cache=cache), "lima") == [kept]
    assert origins(search(service, record=folder), "lima") == [kept]
    service.fails = True
    assert origins(tool, "chad", "chad") == [live, kept]  # the recording has its failure
    assert origins(search(service), "chad", "chad") == [live, live]
    assert origins(search(None, endpoint="", replay=folder), "lima", "lima", "chad", "oslo") == [replay] * 4


def test_one_query_is_one_request_in_any_spelling_after_any_crops_and_while_it_is_asked():
    service, go, tool = Service(), threading.Event(), None
    tool = search(service)
    images = [[], [Image(world.picture(1), 1)], [Image(world.picture(2), 2)]]
    for shown, query in zip(images, ("Lima", " lima", "LIMA\n"), strict=True):
        assert origins(tool, query, images=shown)[0].service == "search-r1"
    assert service.asked == ["Lima"]  # as the policy spelt it first
    ask = tool._search

    def slow(*of):
        assert go.wait(10)
        return ask(*of)

    tool._search = slow
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(origins, tool, query) for query in ("Chad", "CHAD", "chad ", "chad") * 2]
        threading.Timer(0.3, go.set).start()
        sources = [call.result(20)[0].source for call in calls]
    assert service.asked == ["Lima", service.asked[1]] and service.asked[1].lower() == "chad"
    assert sorted(sources) == ["joined"] * 7 + ["live"]


def test_no_key_is_in_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TAPO_SEARCH_KEY", "PLANTED")
    run(search(Service(), cache=str(tmp_path / "c"), record=str(tmp_path / "r")), "lima")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(b"PLANTED" in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"record": "a", "replay": "b", "endpoint": ADDRESS}, "tools.record and tools.replay are both set"),
        ({"record": "a"}, "tools.record is 'a' without tools.endpoint"),
        ({"cache": "a"}, "tools.cache is 'a' without tools.endpoint"),
        ({"replay": "/nonexistent"}, "tools.replay is '/nonexistent/searches.sqlite', which holds no searches"),
        ({"cache": __file__, "endpoint": ADDRESS}, "tools.cache is .* which holds no searches or cannot be opened"),
    ],
)
def test_a_wrong_setting_is_one_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        sources.tools(config(**changes))


def test_the_fields_reach_the_search(tmp_path):
    sqlite3.connect(tmp_path / FILE).executescript("CREATE TABLE searches (key, asked, error, text)")
    tool = sources.tools(config(replay=str(tmp_path)))[2]
    assert isinstance(tool, RemoteTextSearch) and run(tool, "lima")[1] == "replay_miss"
    tool = sources.tools(config(endpoint=ADDRESS, cache=str(tmp_path / "c"), record=str(tmp_path / "r")))[2]
    assert tool.address == ADDRESS and (tmp_path / "c").exists() and (tmp_path / "r" / FILE).exists()
    assert type(sources.tools(config())[2]).__name__ == "TextSearch"
