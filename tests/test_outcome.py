"""Episodes as arrays, and the memory of witnesses across steps."""

import dataclasses
import json

import numpy as np
import pytest

from tapo_jax.learn.outcomes import CallEncoder
from tapo_jax.tapo import memory, name_hash
from tapo_jax.types import Episode, Identity, Prompt, ToolCall, ToolResult, Turn


def episode(prompt: str, calls: list[str], accuracy: float) -> Episode:
    turns = [
        Turn(
            0,
            1,
            "",
            ToolCall("tool", {}, (Identity(value),)),
            ToolResult("", error="timeout" if value == "bad" else None),
        )
        for value in calls
    ]
    nothing = np.zeros(0)
    return Episode(
        Prompt(prompt, "", (), ()),
        0,
        nothing,
        nothing,
        nothing,
        [],
        [],
        turns,
        None,
        "answer",
        {"accuracy": accuracy},
        accuracy / 2,
    )


def encoder(**options) -> CallEncoder:
    return CallEncoder(steps=2, features=8, slots={"regions": 0, "texts": 0, "numbers": 0}, **options)


def test_rewards_successes_and_executed_calls():
    """K = 2 slots a rollout; a call that ended in an error is no step."""
    groups = [
        [episode("p", ["a"], 1.0), episode("p", ["bad", "b"], 0.5)],
        [episode("q", [], 0.0), episode("q", ["c"], 1.0)],
    ]
    made = encoder().encode(groups, step=1)
    np.testing.assert_array_equal(made.reward_PxG, [[0.5, 0.25], [0.0, 0.5]])
    np.testing.assert_array_equal(
        made.success_PxG, [[True, False], [False, True]]
    )  # success is accuracy 1, not a reward
    np.testing.assert_array_equal(made.steps.valid_PxS, [[1, 0, 1, 0], [0, 0, 1, 0]])
    assert set(made.steps.tool_PxS[made.steps.valid_PxS]) == {name_hash("tool")}
    assert made.remembered_success_PxM.shape == (2, 0)
    assert made.anchor_PxV is None  # nobody asked


def test_witnesses_are_remembered_for_their_question_and_fade():
    """Remembered in step 1 with advantage 0.7; at step 3 it is 2 steps old: weight 0.9² = 0.81; at step 5 it is
    forgotten."""
    remembering = encoder(memory=memory.Settings(steps=3, size=2, discount=0.9))
    groups = [[episode("p", ["a"], 1.0), episode("p", ["b"], 0.0)]]
    assert remembering.remembered == 2
    remembering.encode(groups, step=1)
    remembering.remember(groups, 1, np.array([[0.7, -0.7]], np.float32))
    for _ in range(2):  # the same after a round through a checkpoint's JSON
        made = remembering.encode(groups, step=3)
        np.testing.assert_array_equal(made.remembered_success_PxM, [[True, False]])
        np.testing.assert_allclose(made.remembered_advantage_PxM, [[0.7, 0]])
        np.testing.assert_allclose(made.remembered_weight_PxM, [[0.81, 0]])
        np.testing.assert_array_equal(made.steps.valid_PxS, [[1, 0, 1, 0, 1, 0, 0, 0]])
        remembering.set_state(json.loads(json.dumps(remembering.get_state())))
    assert not remembering.encode([[episode("q", [], 0.0)]], step=3).remembered_success_PxM.any()
    assert not remembering.encode(groups, step=5).remembered_success_PxM.any()


def test_without_a_memory_nothing_is_kept():
    made = encoder()
    groups = [[episode("p", ["a"], 1.0)]]
    made.remember(groups, 1, np.ones((1, 1), np.float32))
    assert made.get_state() == {}


def test_turns_that_saw_the_same_have_the_same_anchor():
    """Every turn counts. Two rollouts begin with the question and see "" after call a, which is also what the error of
    "bad" says; the third has no turn."""
    made = encoder(anchor_turns=3).encode(
        [[episode("p", ["a", "b"], 1.0), episode("p", ["bad", "a"], 0.0), episode("p", [], 0.0)]], step=1
    )
    first, second, *rest = made.anchor_PxV[0].tolist()
    assert first != second and 0 not in (first, second)
    assert rest == [0, first, second, 0, 0, 0, 0]


def test_an_unjudged_episode_is_marked_is_no_success_and_is_not_remembered():
    """Its reward is not looked at: it may be anything."""
    failed = dataclasses.replace(episode("p", ["a"], 1.0), judged=False, reward=float("nan"))
    groups = [[episode("p", ["b"], 1.0), failed]]
    made = encoder(may_fail=True, memory=memory.Settings(steps=3, size=2))
    encoded = made.encode(groups, step=1)
    np.testing.assert_array_equal(encoded.judged_PxG, [[True, False]])
    np.testing.assert_array_equal(encoded.success_PxG, [[True, False]])
    np.testing.assert_array_equal(encoded.reward_PxG, [[0.5, 0.0]])
    made.remember(groups, 1, np.ones((1, 2), np.float32))
    assert len(made.get_state()["p"]) == 1
    assert encoder().encode([[episode("p", [], 0.0)]], step=1).judged_PxG is None
    with pytest.raises(ValueError, match="may_fail"):
        encoder().encode(groups, step=1)
