"""Tools that keep something for an episode: opened before their first call in it, and closed however it ends."""

import threading
import time

import pytest

from tapo_jax.config import UserError
from tapo_jax.tools import BadCall, ToolRunner, function_schema
from tapo_jax.tools.base import stop
from tapo_jax.tools.sessions import new_episode
from tapo_jax.types import ToolCall


class Notebook:
    """Keeps the lines of each episode. `log` has what was opened and closed, in order."""

    name = "note"
    schema = function_schema("note", "", {"line": {"type": "string"}}, ("line",))

    def __init__(self, fails: int = 0, slow_s: float = 0.0):
        self.lines, self.log, self.fails, self.slow_s, self.stopped = {}, [], fails, slow_s, 0

    def open(self, episode):
        time.sleep(self.slow_s)
        if self.fails:
            self.fails -= 1
            raise OSError("no room")
        self.log.append(("open", episode))
        self.lines[episode] = []

    def close(self, episode):
        self.log.append(("close", episode))
        del self.lines[episode]
        if self.slow_s:
            raise RuntimeError("closing fails too")

    def __call__(self, arguments, images, episode):
        if arguments["line"] == "raise":
            raise KeyError("x")
        self.lines[episode].append(arguments["line"])
        return " ".join(self.lines[episode])

    def stop(self):
        self.stopped += 1


def runner(tool, **settings) -> ToolRunner:
    return ToolRunner([tool], **{"workers": 2, "timeout_s": 30.0, "retries": 1} | settings)


def say(run: ToolRunner, line: str, episode: str | None):
    return run.run(ToolCall("note", {"line": line}), [], None, episode)[1]


def test_each_episode_has_its_own_state_and_equal_calls_are_not_cached():
    tool = Notebook()
    run = runner(tool)
    a, b = new_episode(), new_episode()
    assert [say(run, "x", a).text, say(run, "x", a).text, say(run, "y", b).text] == ["x", "x x", "y"]
    run.end(a)
    run.close()
    assert sorted(tool.log) == sorted([("open", a), ("open", b), ("close", a), ("close", b)]) and not tool.lines


def test_an_episode_that_calls_nothing_opens_nothing():
    tool = Notebook()
    run = runner(tool)
    run.end(new_episode())
    run.close()
    assert tool.log == []


def test_a_call_outside_of_an_episode_is_an_episode_of_its_own():
    tool = Notebook()
    run = runner(tool)
    assert [say(run, "x", None).text, say(run, "y", None).text] == ["x", "y"]
    assert [word for word, _ in tool.log] == ["open", "close", "open", "close"] and not tool.lines


def test_a_failed_call_is_not_tried_again_and_the_tool_is_closed_all_the_same():
    tool = Notebook()
    run, a = runner(tool, retries=3), new_episode()
    assert say(run, "x", a).text == "x"
    assert say(run, "raise", a).error == "exception" and say(run, "y", a).text == "x y"
    run.end(a)
    run.close()
    assert tool.log == [("open", a), ("close", a)]


def test_a_tool_that_does_not_open_is_an_observation_and_the_next_call_tries_again():
    tool = Notebook(fails=1)
    run, a = runner(tool), new_episode()
    assert say(run, "x", a).text == "Error: note failed: OSError."
    assert say(run, "x", a).text == "x"
    run.end(a)
    run.close()
    assert tool.log == [("open", a), ("close", a)]


def test_what_opens_too_late_is_closed_and_a_failing_close_harms_nobody():
    tool = Notebook(slow_s=0.6)
    run, a = runner(tool, timeout_s=0.2), new_episode()
    assert say(run, "x", a).error == "timeout"
    run.end(a)
    run.close()
    deadline = time.monotonic() + 20
    while len(tool.log) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tool.log == [("open", a), ("close", a)]


def test_the_calls_of_a_turn_run_in_their_order_for_a_tool_that_remembers():
    tool = Notebook()
    run, a = runner(tool, workers=8), new_episode()
    calls = [ToolCall("note", {"line": str(n)}) for n in range(8)]
    texts = [future.result()[1].text for future in run.submit_turn(calls, [], None, a)]
    assert texts == [" ".join(map(str, range(n + 1))) for n in range(8)]


class Meet:
    """Waits until two calls are there."""

    name = "meet"
    schema = function_schema("meet", "", {"who": {"type": "string"}}, ("who",))

    def __init__(self):
        self.barrier = threading.Barrier(2)

    def __call__(self, arguments, images):
        self.barrier.wait(20)
        return arguments["who"]


def test_the_calls_of_a_turn_run_at_the_same_time():
    futures = ToolRunner([Meet()], workers=2, timeout_s=30, retries=0).submit_turn(
        [ToolCall("meet", {"who": who}) for who in ("Ann", "Ben")], []
    )
    assert [future.result()[1].text for future in futures] == ["Ann", "Ben"]


class Random:
    """Gives another number each time, and fails first."""

    name = "random"
    schema = function_schema("random", "", {}, ())

    def __init__(self, repeatable: bool):
        self.repeatable, self.calls = repeatable, 0

    def __call__(self, arguments, images):
        self.calls += 1
        if self.calls == 1:
            raise OSError("first")
        return self.calls


@pytest.mark.parametrize(
    ("repeatable", "texts"), [(True, ["2", "2"]), (False, ["Error: random failed: OSError.", "2"])]
)
def test_a_tool_that_is_not_repeatable_is_neither_cached_nor_tried_again(repeatable, texts):
    run = ToolRunner([Random(repeatable)], workers=1, timeout_s=30, retries=1)
    assert [run.run(ToolCall("random", {}), [])[1].text for _ in range(2)] == texts


def test_stop_is_called_and_may_fail():
    tool = Notebook()
    stop([tool, Random(True)])
    assert tool.stopped == 1
    tool.stop = lambda: 1 / 0
    stop([tool])


class NoId(Notebook):
    def open(self):
        pass


class NoEpisode(Notebook):
    def __call__(self, arguments, images):
        return ""


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [(NoId, "its open must take one argument, the episode's id"), (NoEpisode, "its __call__ must take episode=")],
)
def test_a_tool_whose_methods_do_not_fit_is_one_sentence_at_start(kind, sentence):
    with pytest.raises(UserError, match=sentence):
        runner(kind())


def test_a_call_after_the_end_of_its_episode_does_not_open_it_again():
    tool = Notebook()
    run, a = runner(tool), new_episode()
    say(run, "x", a)
    session = run._sessions._of[a]["note"]
    [shut] = run._sessions.leave(a)
    shut()
    shut()
    assert tool.log == [("open", a), ("close", a)] and session.over
    run._sessions._of[a] = {"note": session}  # what a call that was late would find
    with pytest.raises(BadCall, match="after the end of its episode"):
        run._sessions.enter(tool, a)
