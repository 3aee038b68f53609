"""Whole runs whose search service is late, busy, broken or silent for a third of its calls. Also a program:

python tests/test_faulty_search.py WORKDIR STEPS    # the run, and its replay twice
"""

import contextlib
import dataclasses
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rollout_world as world
import tiny_run

from tapo_jax import evaluate, processes, records
from tapo_jax.agent import Agent, open_tools
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.evaluate import checkpoint
from tapo_jax.rollout import episode
from tapo_jax.rollout.chat import ParsedTurn
from tapo_jax.rollout.summary import service_summary
from tapo_jax.tools.watch import Watch
from tapo_jax.train import train
from tapo_jax.types import Episode, Origin, ToolCall, ToolResult, Turn

KEY = "sk-planted-7f3a"
SEARCH = "text_search_tool"
FAULTS = ("late", "too late", "refused", 429, 500, "garbage", "200 MB", "nothing")
TIMED = ("time/", "perf/")  # and what depends on who was first
BY_CHANCE = tuple(f"tools/{name}" for name in ("live", "cache_hits", "joined", "replayed", "retries", "seconds_p"))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
        fault = self.server.fault(number)
        if fault == "refused":
            self.close_connection = True
            return
        if fault in ("late", "too late"):
            time.sleep(0.2 if fault == "late" else 2.0)
        query = json.loads(body)["queries"][0]
        data = json.dumps({"result": [[{"document": {"contents": query[:5]}}]]}).encode()
        data = {"garbage": b"<html>", "nothing": b"", "200 MB": b"x" * (1 << 20)}.get(fault, data)
        with contextlib.suppress(OSError):  # the client has gone
            self.send_response(fault if isinstance(fault, int) else 200)
            self.send_header("Retry-After", "0")
            self.send_header("X-Echo", self.headers.get("Authorization", ""))
            self.end_headers()
            for _ in range(200 if fault == "200 MB" else 1):
                self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(fault):
    """A search service; fault(number of the request) says what goes wrong. Gives its address and the requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fault, server.requests, server.lock = fault, [], threading.Lock()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.requests
    finally:
        server.shutdown()
        server.server_close()


def third(number):
    return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 0 else ""


def read_turn(text):
    """That of the tiny run, half of whose calls are searches: for one of many queries, each in two spellings."""
    parsed, number = tiny_run.read_turn(text), sum(text.encode())
    if parsed.call is None or parsed.call.name == "fly" or (parsed.call.name == "crop" and number % 3):
        return parsed
    return ParsedTurn(call=ToolCall(SEARCH, {"query": f"{'Qq'[number % 2]}{number // 2 % 400}"}))


def patch(setattr_):
    tiny_run.patch(setattr_)
    setattr_(episode, "parse_turn", read_turn)
    setattr_(sources, "tools", lambda config: [world.Crop(), *sources.remote_tools(config.tools)])


def planned(model, **tools):
    config = tiny_run.config(model, **{"log.episodes_every": 1})
    config.eval.update(at_start=False, at_end=False)
    config.tools.update({"timeout_s": 1.0, "max_failures": 1.0, "workers": 8} | tools)
    return config


def numbers(workdir, *, but=TIMED):
    lines = records.read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith(but)} for line in lines]


def weights(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "export").glob("*.safetensors")}


def played(workdir):
    found = []
    for path in sorted((workdir / "episodes").glob("*.npz")):
        for one in records.load(path):
            found.append(
                (path.name, one.sample, one.answer, one.reward, [(t.text, t.result, t.error) for t in one.turns])
            )
    return found


def check_sums(workdir, steps, requests):
    """The numbers of a run against the recorded episodes and what the service has seen."""
    asked = 0.0
    for line in records.read_metrics(workdir / "metrics.jsonl"):
        episodes = records.load(workdir / "episodes" / f"step_{line['step']:06d}.npz")
        assert len(episodes) == 16  # none is lost
        turns = [turn for one in episodes for turn in one.turns if turn.call_name == SEARCH and turn.result is not None]
        value = {
            name.split("/")[1]: 16 * line[name]
            for name in line
            if name.endswith("/search-r1") and line[name] is not None
        }
        for name, source in (("live", "live"), ("cache_hits", "cache"), ("joined", "joined"), ("replayed", "replay")):
            assert value[name] == pytest.approx(sum(turn.source == source for turn in turns))
        assert value["service_calls"] == pytest.approx(len(turns)) == pytest.approx(16 * line[f"tools/calls/{SEARCH}"])
        assert value["failures"] == pytest.approx(sum(turn.error is not None for turn in turns))
        failed = sum(line[f"tools/errors/{kind}"] for kind in ("timeout", "service"))
        assert value["failures"] == pytest.approx(16 * failed) and line["tools/errors/exception"] == 0
        asked += value["live"] + value["retries"]
    assert requests is None or asked == pytest.approx(requests)
    return steps == len(records.read_metrics(workdir / "metrics.jsonl"))


def run_and_replay(folder, steps):
    """A run against the faulty service, then twice its replay; returns the number of failures."""
    model = tiny_run.write_model(folder / "model")
    kept = str(folder / "searches")
    with served(third) as (url, requests):
        config = planned(model, endpoint=url, record=kept, cache=str(folder / "cache" / "c.sqlite"))
        config.total_steps = steps
        train(config, folder / "live")
        probes = sum(b"encyclopedia" in body for body in requests)
        assert check_sums(folder / "live", steps, len(requests) - probes) and probes
    for name in ("first", "second"):
        config = planned(model, replay=kept)
        config.total_steps = steps
        train(config, folder / name)
        assert check_sums(folder / name, steps, 0)
    assert numbers(folder / "first") == numbers(folder / "second")
    assert numbers(folder / "live", but=TIMED + BY_CHANCE) == numbers(folder / "first", but=TIMED + BY_CHANCE)
    assert weights(folder / "live") == weights(folder / "first") == weights(folder / "second") != {}
    assert played(folder / "live") == played(folder / "first") == played(folder / "second") != []
    return sum(16 * line["tools/failures/search-r1"] for line in numbers(folder / "live"))


def test_a_run_with_a_faulty_service_ends_its_numbers_add_up_and_its_replay_is_equal(tmp_path, monkeypatch):
    monkeypatch.setenv("TAPO_SEARCH_KEY", KEY)
    patch(monkeypatch.setattr)
    assert run_and_replay(tmp_path, 2) > 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"searches.sqlite", "c.sqlite", "metrics.jsonl", "episodes.html", "config.json"} <= {
        one.name for one in files
    }
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_service_that_dies_stops_the_run_after_saving_and_the_run_goes_on_when_it_is_back(tmp_path, monkeypatch):
    patch(monkeypatch.setattr)
    model = tiny_run.write_model(tmp_path / "model")
    dead = threading.Event()
    with served(lambda number: 500 if dead.is_set() and number > 1 else "") as (url, _):
        config = planned(model, endpoint=url, max_failures=0.3, failure_window=6, retries=0)
        config.total_steps, config.checkpoint.every = 4, 100
        asked = Watch.note

        def note(watch, episodes):
            dead.set()  # from the second step on
            asked(watch, episodes)

        monkeypatch.setattr(Watch, "note", note)
        with pytest.raises(
            UserError, match=r"requests to the service 'search-r1' at http://127.* failed.*max_failures"
        ):
            train(config, tmp_path / "run")
        saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
        lines = records.read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert saved == [lines[-1]["step"]] and 1 < saved[0] < 4
        monkeypatch.setattr(Watch, "note", asked)
        with pytest.raises(UserError, match="A first search of the service 'search-r1'"):
            train(config, tmp_path / "run")  # it is still dead
        with pytest.raises(UserError, match="A first search of the service"):
            checkpoint.run(config, str(tmp_path / "run"))
        config.tools.failure_window = 1
        monkeypatch.setattr(sources, "tools", lambda c: [world.Crop(), Unprobed(sources.remote_tools(c.tools)[0])])
        with pytest.raises(UserError, match="1 of the last 1 requests to the service 'search-r1'.*nothing is written"):
            checkpoint.run(config, str(tmp_path / "run"))
        assert not (tmp_path / "run" / "eval").exists()
        patch(monkeypatch.setattr)
        dead.clear()
        train(config, tmp_path / "run")
        assert [line["step"] for line in records.read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


class Unprobed:
    """A search of a service that dies after the first question."""

    def __init__(self, tool):
        self.name, self.schema, self.service, self.address = tool.name, tool.schema, tool.service, tool.address
        self._tool = tool

    def __call__(self, arguments, images):
        return self._tool(arguments, images)


# The parts.


def test_all_processes_hear_of_a_service_that_is_broken_for_one(monkeypatch):
    """The sentence of another process stops this one; without a service nothing is asked of the others."""

    class Runner:
        services = ("s",)

    class Players:
        runner = Runner

    one = Agent(Players, None, {}, watch=Watch({"s": ""}, max_failures=0.5, window=1))
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, "9 of the last 9 requests"])
    assert one.broken_service() == "9 of the last 9 requests"
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, ""])
    assert one.broken_service() == ""
    monkeypatch.setattr(Runner, "services", ())
    monkeypatch.setattr(processes, "gather", None)
    assert one.broken_service() == ""


def test_all_processes_hear_of_a_service_that_does_not_answer_one_of_them(monkeypatch):
    class Tool:
        def probe(self):
            return None

    monkeypatch.setattr(sources, "tools", lambda config: [Tool()])
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, "A first search failed."])
    with pytest.raises(UserError, match="A first search failed"):
        open_tools(None, contextlib.ExitStack())
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, ""])
    assert len(open_tools(None, contextlib.ExitStack())) == 1


def episodes_of(*results):
    turns = [Turn(0, 1, "", ToolCall("t", {}), result) for result in results]
    nothing = np.zeros(0, np.int32)
    return [Episode(world.prompts(1)[0], 0, nothing, nothing, nothing, [], [], turns, None, "turns")]


def result(source="live", error=None, *, service="s", seconds=1.0, retries=0):
    return ToolResult("x", error=error, seconds=seconds, origin=Origin(service, source, retries))


def test_a_service_is_broken_by_the_share_of_its_last_requests_and_by_nothing_else():
    watch = Watch({"s": "http://h", "other": ""}, max_failures=0.5, window=4)
    assert watch.broken() == ""
    watch.note(episodes_of(*[result(error="service")] * 3))
    assert watch.broken() == ""  # not enough of them
    watch.note(episodes_of(*[result("cache", "service")] * 9, *[result("replay", "replay_miss")] * 9, ToolResult("x")))
    watch.note(episodes_of(*[result(service="visit", error="page")] * 9, *[result("joined", "service")] * 9))
    assert watch.broken() == ""
    watch.note(episodes_of(result()))
    assert watch.broken() == (
        "3 of the last 4 requests to the service 's' at http://h failed, more than tools.max_failures (0.5) allows"
    )
    watch.note(episodes_of(result(), result(error="bad_url")))
    assert watch.broken() == ""  # the window has moved on: 1 of 4
    never = Watch({"s": ""}, max_failures=1.0, window=1)
    never.note(episodes_of(*[result(error="timeout")] * 50))
    assert never.broken() == ""
    early = Watch({"s": ""}, max_failures=0.5, window=1000)
    early.note(episodes_of(*[result(error="timeout")] * 19))
    assert early.broken() == ""
    early.note(episodes_of(result(error="exception")))
    assert early.broken().startswith("20 of the last 20 requests to the service 's' failed")


def test_the_numbers_of_a_service():
    found = [result(seconds=s / 100, retries=1) for s in range(1, 101)]
    episodes = episodes_of(*found, result("cache"), result("joined", "service"), result("replay"), ToolResult("local"))
    got = service_summary([*episodes, *episodes_of()], ["s", "idle"])
    assert {name: value for name, value in got.items() if name.endswith("/s")} == {
        "tools/service_calls/s": 51.5, "tools/live/s": 50.0, "tools/cache_hits/s": 0.5, "tools/joined/s": 0.5,
        "tools/replayed/s": 0.5, "tools/retries/s": 50.0, "tools/failures/s": 0.5,
        "tools/seconds_p50/s": pytest.approx(0.505), "tools/seconds_p95/s": pytest.approx(0.9505),
        "tools/seconds_p99/s": pytest.approx(0.9901),
    }  # fmt: skip
    assert got["tools/service_calls/idle"] == 0 and np.isnan(got["tools/seconds_p99/idle"])
    assert service_summary(episodes, []) == {}
    (one,) = episodes_of(result())
    tally = evaluate.Tally.of([dataclasses.replace(one, rewards={"accuracy": 0.0})], (), ("s",))
    assert tally.metrics()["tools/live/s"] == 1.0


if __name__ == "__main__":
    patch(setattr)
    place, count = Path(sys.argv[1]), int(sys.argv[2])
    print(f"{run_and_replay(place, count):.0f} failures in {count} steps; the replay is equal, twice")
