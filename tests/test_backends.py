"""The search services by their contracts, spoken by servers on this machine."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configs import tapo_grpo
from tapo_jax.agent import open_tools
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.tools import backends
from tapo_jax.tools.base import ToolRunner
from tapo_jax.tools.patience import Patience
from tapo_jax.tools.remote_search import RemoteTextSearch
from tapo_jax.types import ToolCall

KEY = "sk-planted-7f3a"


@contextlib.contextmanager
def served(reply):
    """A server that answers with reply(path, headers, body) -> (status, headers, bytes); gives its address and the
    requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            requests.append((self.path, dict(self.headers), body))
            status, headers, data = reply(*requests[-1])
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


def as_json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def search(backend, url, *, top_k=2, budget=500, **more):
    made = RemoteTextSearch(url, backend=backend, top_k=top_k, budget=budget, timeout_s=10, retries=0, **more)
    return ToolRunner([made], workers=1, timeout_s=20, retries=0)


def asked(runner, query="Peru: capital"):
    _, result = runner.run(ToolCall("text_search_tool", {"query": query}), [])
    return result


def test_search_r1():
    with served(lambda *_: as_json({"result": [[{"document": {"contents": "Peru\nLima."}, "score": 1.0}]]})) as (
        url,
        requests,
    ):
        result = asked(search("search-r1", url))
    assert result.text == "1. Peru\nLima." and result.error is None
    path, _, body = requests[0]
    assert path == "/retrieve"
    assert json.loads(body) == {"queries": ["Peru: capital"], "topk": 2, "return_scores": True}


def test_mars_answers_with_plain_text_that_is_shown_as_it_is():
    def reply(*_):
        return 200, {"Content-Type": "text/plain; charset=utf-8"}, "Lima is the capital – of Peru.".encode()

    with served(reply) as (url, requests):
        result = asked(search("mars", url, request={"retrieval_mode": "local", "query": "not this"}))
        assert asked(search("mars", url, budget=4)).text == "Lima"
    assert result.text == "Lima is the capital – of Peru."
    path, _, body = requests[0]
    assert path == "/search"
    assert json.loads(body) == {"query": "Peru: capital", "top_k": 2, "retrieval_mode": "local"}
    assert json.loads(requests[1][2])["retrieval_mode"] == "google_serper"  # the server refuses a request without it


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        ("text/html", b"<html>proxy</html>", "sent a page"),
        ("text/plain", b"\xff\xfe", "no text"),
        ("text/plain", b" \n", "sent nothing"),
        ("text/plain", b"", "sent nothing"),
        ("application/json", b"{", "no JSON"),
    ],
)
def test_what_is_no_plain_text_is_a_failure_of_the_service(kind, data, says):
    with served(lambda *_: (200, {"Content-Type": kind}, data)) as (url, _):
        result = asked(search("mars", url))
    assert result.error == "service" and says in result.text and result.origin.source == "live"


def test_serper(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", f" {KEY}\n")
    found = [
        {"title": "Lima", "link": "https://a.org/lima", "snippet": f"The capital of Peru. {KEY}", "position": 1},
        {"title": "No snippet", "link": "https://b.org"},
        {"title": "Peru", "link": "https://c.org", "snippet": "A country."},
        {"title": "Beyond", "link": "https://d.org", "snippet": "top_k"},
    ]
    with served(lambda *_: as_json({"searchParameters": {}, "organic": found})) as (url, requests):
        result = asked(search("serper", url))
    assert result.text == (
        "1. Lima\nhttps://a.org/lima\nThe capital of Peru. [key]\n2. Peru\nhttps://c.org\nA country."
    )
    path, headers, body = requests[0]
    assert path == "/search" and headers["X-API-KEY"] == KEY and "Authorization" not in headers
    assert json.loads(body) == {"q": "Peru: capital", "num": 2}


def test_tavily(monkeypatch):
    monkeypatch.setenv("TAVILY_API_KEY", KEY)
    found = [{"title": "Lima", "url": "https://a.org", "content": "The capital.", "score": 0.9}]
    with served(lambda *_: as_json({"query": "x", "results": found, "answer": None})) as (url, requests):
        result = asked(search("tavily", url, request={"search_depth": "basic"}))
    assert result.text == "1. Lima\nhttps://a.org\nThe capital."
    path, headers, body = requests[0]
    assert path == "/search" and headers["Authorization"] == f"Bearer {KEY}"
    assert json.loads(body) == {"query": "Peru: capital", "max_results": 2, "search_depth": "basic"}


@pytest.mark.parametrize("backend", ["serper", "tavily"])
@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({"message": "Unauthorized."}, "without a list"),
        ([], "without a list"),
        (5, "without a list"),
        ({name: [{"title": "x"}, None, 5] for name in ("organic", "results")}, "without a text"),
    ],
)
def test_replies_without_results_are_failures(monkeypatch, backend, reply, says):
    monkeypatch.setenv(backends.BACKENDS[backend].variable, KEY)
    with served(lambda *_: as_json(reply)) as (url, _):
        result = asked(search(backend, url))
    assert result.error == "service" and says in result.text


def test_no_result_is_no_failure(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    with served(lambda *_: as_json({"organic": []})) as (url, _):
        result = asked(search("serper", url))
    assert result.error is None and result.text == "No passage matches."


PAGE = """<html><body><div class="result body"><h2><a>Lima</a></h2><a href="https://a.org/lima">The capital of
Peru.</a></div></body></html>"""


def engine(monkeypatch, url):
    module = pytest.importorskip("ddgs.engines.duckduckgo", reason="needs the extra [web]")
    monkeypatch.setattr(module.Duckduckgo, "search_url", f"{url}/html/")
    monkeypatch.delenv("DDGS_PROXY", raising=False)
    return {"backend": "duckduckgo", "region": "uk-en"}


def test_ddgs(monkeypatch):
    with served(lambda *_: (200, {"Content-Type": "text/html"}, PAGE.encode())) as (url, requests):
        result = asked(search("ddgs", "", request=engine(monkeypatch, url)))
    assert result.text == "1. Lima\nhttps://a.org/lima\nThe capital of Peru." and result.error is None
    assert b"q=Peru" in requests[0][2] and b"uk-en" in requests[0][2]


def test_ddgs_without_an_engine_is_a_failure(monkeypatch):
    request = engine(monkeypatch, "http://127.0.0.1:9")
    result = asked(search("ddgs", "", request=request))
    assert result.error == "service" and "cannot be reached" in result.text and result.origin.source == "live"


def opened(made):
    with contextlib.ExitStack() as at_end:
        return open_tools(made, at_end)


def config(**changes):
    made = tapo_grpo.get_config("test")
    request = changes.pop("request", {})
    made.update_from_flattened_dict({f"tools.{name}": value for name, value in changes.items()})
    with made.tools.request.unlocked() as free:
        free.update(request)
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backend": "mars"}, "tools.backend is 'mars' and tools.endpoint is empty"),
        ({"backend": "serper"}, "set the environment variable SERPER_API_KEY"),
        ({"backend": "tavily"}, "set the environment variable TAVILY_API_KEY"),
        ({"backend": "ddgs", "endpoint": "http://x"}, "leave tools.endpoint empty"),
    ],
)
def test_a_setting_that_no_service_has_is_one_sentence(monkeypatch, changes, says):
    for name in ("SERPER_API_KEY", "TAVILY_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=says):
        sources.tools(config(**changes))


def test_a_key_that_no_header_can_hold_is_one_sentence(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "sk-\u2026SECRET")
    with pytest.raises(UserError, match="SERPER_API_KEY has characters that no key has") as caught:
        sources.tools(config(backend="serper"))
    assert "SECRET" not in str(caught.value)


def test_the_public_services_have_their_addresses(monkeypatch):
    for backend, address in (("serper", "https://google.serper.dev"), ("tavily", "https://api.tavily.com")):
        monkeypatch.setenv(backends.BACKENDS[backend].variable, KEY)
        assert backends.make_search(backend, "", Patience(1.0))[1] == address


def test_the_fields_of_a_request_reach_the_service_and_are_part_of_what_was_asked(tmp_path):
    with served(lambda *_: (200, {"Content-Type": "text/plain"}, b"found")) as (url, requests):
        for mode in ("local", "google_serper", "local"):
            made = config(backend="mars", endpoint=url, cache=str(tmp_path / "c"), request={"retrieval_mode": mode})
            assert sources.tools(made)[2]({"query": "x"}, []).text == "found"
    assert [json.loads(body)["retrieval_mode"] for _, _, body in requests] == ["local", "google_serper"]


# The first question of a run.


def test_a_misspelt_address_is_one_sentence_before_anything_is_compiled():
    made = config(endpoint="http://127.0.0.1:9", retries=0)
    with pytest.raises(UserError, match=r"'search-r1' at http://127\.0\.0\.1:9 failed: .*cannot be reached.*endpoint"):
        opened(made)


def test_a_wrong_path_or_key_is_one_sentence(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    with served(lambda *_: as_json({"message": KEY}, 403)) as (url, requests):
        with pytest.raises(UserError, match="status 403; check tools.endpoint.*SERPER_API_KEY") as caught:
            opened(config(backend="serper", endpoint=url))
        assert KEY not in str(caught.value) and len(requests) == 3
    with served(lambda *_: (404, {}, b"")) as (url, _), pytest.raises(UserError, match="status 404"):
        opened(config(endpoint=f"{url}/retrieve"))


def test_a_service_that_fails_once_is_served_and_a_replay_asks_nothing(tmp_path):
    answers = iter([(500, {}, b""), as_json({"result": []})])
    with served(lambda *_: next(answers)) as (url, requests):
        made = config(endpoint=url, record=str(tmp_path), retries=0)
        assert [tool.name for tool in opened(made)] == list(made.tools.names) and len(requests) == 2
    assert [tool.name for tool in opened(config(replay=str(tmp_path)))] == list(made.tools.names)
    assert len(opened(config())) == 3
