import numpy as np

from tapo_jax import credit
from tapo_jax.types import Episode, Identity, Prompt, Region, Text, ToolCall, ToolResult, Turn

PROMPT = Prompt("q", "?", (), ("a",))


def episode(correct, *calls, error=None):
    turns = [
        Turn(0, 1, "", ToolCall(name, {}, parameters), ToolResult("", error=error)) for name, parameters in calls
    ]
    turns.append(Turn(0, 1, "answer"))
    empty = np.zeros(0)
    rewards = {"accuracy": float(correct)}
    return Episode(PROMPT, 0, empty, empty, empty, [], [], turns, "a", "answer", rewards)


def zoom(*box):
    return ("zoom", (Region(1, box),))


NEAR, FAR = zoom(0.0, 0.0, 0.4, 0.4), zoom(0.2, 0.0, 0.6, 0.4)  # IoU 1/3
SEARCH = ("search", (Text("tower"), Identity("en")))
GROUPS = [
    [episode(True, NEAR), episode(False, FAR, NEAR, SEARCH), episode(False, SEARCH)],
    [episode(False, NEAR), episode(False)],  # no success: nothing to compare with
    [episode(True), episode(True, SEARCH)],  # no failure
    [episode(True, NEAR, error=None), episode(False, NEAR, error="timeout")],  # the failed call is no step
]


def test_table_by_hand():
    # failing steps: FAR 1/3, NEAR 1, SEARCH 0, SEARCH 0, NEAR 0 (group 2): five; failing trajectories: 2 + 2 + 0 + 1.
    low, high = credit.table(GROUPS, thresholds=(0.3, 0.9))
    assert (low["actions"], low["failing_actions"], low["trajectories"], low["failing_trajectories"]) == (2, 5, 1, 5)
    assert (high["actions"], high["correctable_actions"], high["correctable_trajectories"]) == (1, 1 / 5, 1 / 5)
    assert "40.0% (2/5)" in credit.text_table([low, high])


def test_empty_run():
    assert credit.table([], thresholds=(0.5,))[0]["correctable_actions"] == 0
    assert credit.table([[episode(False)]], thresholds=(0.5,))[0]["failing_trajectories"] == 1


def test_figure(tmp_path):
    credit.plot(credit.table(GROUPS), tmp_path / "credit.png")
    assert (tmp_path / "credit.png").read_bytes().startswith(b"\x89PNG")
