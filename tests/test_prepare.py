"""From rewards and calls to token advantages, as one program over a mesh. The numbers of TAPO itself are in
test_tapo*.py."""

import jax
import numpy as np
import pytest

from tapo_jax import sharding, tapo
from tapo_jax.batch import ModelInputs, TrainBatch
from tapo_jax.learn import assign_credit, gigpo
from tapo_jax.learn.outcomes import EncodedBatch
from tapo_jax.tapo import adaptive as tapo_adaptive
from tapo_jax.types import Identity

P, G, K, T = 2, 4, 2, 6


def run(reward_PxG, success_PxG, calls, *, mesh_data=1, thresholds=None, past=(), mask_T=None, judged=None, **options):
    """-> (advantage_BxT, mask_BxT, credit, thresholds, metrics) on the host. past: (success, advantage, weight) of M
    remembered rollouts. judged: False for a rollout that nobody could judge. Token 0 is the prompt, 1-2 step
    0, 3-4 step 1, 5 the answer."""
    mesh = sharding.make_mesh(mesh_data, 1, 1, devices=jax.devices()[:mesh_data])
    B = P * G
    step_BxT = np.tile(np.array([-1, 0, 0, 1, 1, -1], np.int32), (B, 1))
    mask_BxT = np.tile(np.arange(T) > 0 if mask_T is None else np.array(mask_T, bool), (B, 1))
    zeros_BxT = np.zeros((B, T), np.int32)
    inputs = ModelInputs(zeros_BxT, zeros_BxT + 1, np.zeros((B, T, 3), np.int32))
    batch = TrainBatch(
        inputs=inputs, mask_BxT=mask_BxT, step_BxT=step_BxT, sampler_logp_BxT=np.zeros((B, T), np.float32)
    )
    success_PxM, advantage_PxM, weight_PxM = past or (np.zeros((P, 0), bool), *[np.zeros((P, 0), np.float32)] * 2)
    encoded = EncodedBatch(
        reward_PxG=np.array(reward_PxG, np.float32), success_PxG=np.array(success_PxG),
        steps=tapo.encode_steps(calls, steps=K, features=16), anchor_PxV=np.array(ANCHORS, np.int32),
        remembered_success_PxM=success_PxM,
        remembered_advantage_PxM=advantage_PxM, remembered_weight_PxM=weight_PxM,
        judged_PxG=None if judged is None else np.array(judged),
    )  # fmt: skip
    settings = assign_credit.Settings(**{"estimator": "dr_grpo", "max_length": T} | options)
    program = assign_credit.make_assign_credit(mesh, settings)
    placed = sharding.put_rows(batch, mesh, B), sharding.put_rows(encoded, mesh, P)
    thresholds, seed_step_2 = sharding.put_replicated((thresholds, np.zeros(2, np.int32)), mesh)
    return jax.device_get(program(*placed, thresholds, seed_step_2))


def call(value: str):
    return ("tool", (Identity(value),))


# Prompt 0: rollout 0 succeeds with call a; rollout 1 fails with a, then b; 2 and 3 fail without a call. Prompt 1: all
# equal.
REWARD = [[1, 0, 0, 0], [1, 1, 1, 1]]
SUCCESS = [[True, False, False, False], [True] * 4]
CALLS = [[[call("a")], [call("a"), call("b")], [], []], [[call("c")], [], [], []]]

# What was seen before each of at most three turns: rollouts 0, 1 and 2 of prompt 0 begin with the same question.
ANCHORS = [[7, 8, 0, 7, 0, 0, 7, 0, 0, 0, 0, 0], [9, 0, 0] * 4]


@pytest.mark.parametrize("mesh_data", [1, 8])
def test_a_failures_matching_step_gets_credit_and_nothing_else_changes(mesh_data):
    """dr_grpo: advantages 0.75 and -0.25. The step like the witness: sim 1, support 1 of 1, so -0.25 + 0.8 · 0.75 =
    0.35, clipped to 0; its tokens are 1 and 2 of row 1. A group of equal rewards has advantage 0."""
    advantage_BxT, mask_BxT, credit, _, metrics = run(REWARD, SUCCESS, CALLS, mesh_data=mesh_data)
    want_BxT = np.full((P * G, T), -0.25, np.float32)
    want_BxT[0], want_BxT[4:] = 0.75, 0
    want_BxT[1, 1:3] = 0
    np.testing.assert_allclose(advantage_BxT, np.where(mask_BxT, want_BxT, 0), atol=1e-6)
    np.testing.assert_allclose(credit.advantage_PxG, [[0.75, -0.25, -0.25, -0.25], [0] * 4])
    assert (
        credit.transfer.witness_PxS[0, G // 2] == 0 and credit.transfer.corrected_PxS[0, 2]
    )  # slot 1·K + 0; the witness is slot 0
    # 2 failing steps (a and b of rollout 1), one corrected by 0.25; 1 of 2 groups has a signal.
    assert metrics["tapo/corrected_actions"] == 0.5 and metrics["tapo/mean_compensation"] == 0.25
    assert (metrics["reward/mean"], metrics["reward/accuracy"]) == (0.625, 0.625)
    assert metrics["advantage/groups_with_signal"] == 0.5


def test_tapo_off_changes_no_advantage_but_is_still_diagnosed():
    advantage_BxT, mask_BxT, credit, _, metrics = run(REWARD, SUCCESS, CALLS, credit="trajectory")
    np.testing.assert_allclose(advantage_BxT[1][mask_BxT[1]], -0.25, atol=1e-6)
    assert metrics["tapo/correctable_actions"] == 0.5 and metrics["tapo/mean_compensation"] == 0
    # What is recorded: rollout 1's first step (slot 2) is like slot 0, and keeps its advantage.
    assert credit.transfer.sim_PxS[0, 2] == 1 and credit.transfer.witness_PxS[0, 2] == 0
    assert credit.transfer.correctable_PxS[0, 2] and not credit.transfer.corrected_PxS.any()
    np.testing.assert_allclose(credit.transfer.advantage_PxS[0, 2:4], -0.25, atol=1e-6)


def test_questions_in_chunks_get_the_same_credit():
    whole, chunked = (run(REWARD, SUCCESS, CALLS, tapo=tapo.Settings(chunks=chunks)) for chunks in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, chunked[:3], whole[:3])


def test_dynamic_sampling_takes_groups_without_signal_out_of_the_loss():
    _, mask_BxT, _, _, _ = run(REWARD, SUCCESS, CALLS, dynamic_sampling=True)
    assert mask_BxT[:4, 1:].all() and not mask_BxT[4:].any()


def test_the_overlong_penalty_enters_before_the_advantages():
    """All rows have 6 of at most 8 tokens, with a buffer of 4: penalty -(6 - 4) / 4 = -0.5 for all, so only the mean
    reward falls."""
    _, _, credit, _, metrics = run(REWARD, SUCCESS, CALLS, overlong_buffer=4, max_length=8)
    np.testing.assert_allclose(credit.advantage_PxG[0], [0.75, -0.25, -0.25, -0.25], atol=1e-6)
    assert metrics["reward/overlong"] == -0.5 and metrics["reward/mean"] == 0.125


def test_a_remembered_witness_helps_a_group_that_now_fails():
    """Prompt 0 has no success but a reward for form; an earlier rollout with call b, advantage 1.5 and weight 0.5,
    remembers one. Row 1's second step: sim 1, support 1, Adv 0.5 · 1.5 = 0.75: min(-0.25 + 0.8 · 0.75, 0) = 0. Its
    first step has no witness."""
    calls = [[[], [call("a"), call("b")], [], [], [call("b")]], [[], [], [], [], []]]
    past = np.array([[True], [False]]), np.array([[1.5], [0]], np.float32), np.array([[0.5], [0]], np.float32)
    failing = np.zeros((P, G), bool)
    advantage_BxT, _, credit, _, metrics = run([[1, 0, 0, 0], [1] * 4], failing, calls, past=past)
    np.testing.assert_allclose(advantage_BxT[1], [0, -0.25, -0.25, 0, 0, -0.25], atol=1e-6)
    assert (
        credit.transfer.witness_PxS.shape == (P, G * K) and credit.transfer.witness_PxS[0, 3] == G * K
    )  # the remembered rollout's slot
    assert metrics["tapo/failing_actions"] == 2  # what is remembered is no failure of this batch


def test_adaptive_thresholds_follow_the_witnesses_and_are_used_before_they_move():
    """Two successes with the same call: one pair, sim 1. Share with sim ≤ 0.9 is 0, so theta moves by 0.5 · (0.8 - 0)
    to 1.3, cut to 1."""
    calls = [[[call("a")], [call("a")], [call("a")], []], [[], [], [], []]]
    adaptive = tapo_adaptive.Settings(("tool", "other"), quantile=0.8, rate=0.5)
    start = tapo_adaptive.init(adaptive, 0.9)
    reward, success = [[1, 1, 0, 0], [1] * 4], [[True, True, False, False], [True] * 4]
    _, _, credit, moved, metrics = run(reward, success, calls, thresholds=start, adaptive=adaptive)
    np.testing.assert_allclose(moved.theta_N, [1.0, 0.9])
    np.testing.assert_allclose([metrics["tapo/theta/tool"], metrics["tapo/theta/other"]], [1.0, 0.9])
    assert credit.transfer.corrected_PxS[0, 2 * K]


def test_the_comparator_compares_all_turns_that_saw_the_same():
    """Rollout 0 of prompt 0 calls a tool and then answers; 1 and 2 answer the question at once: returns 1, 0, 0 of the
    first turns, mean 1/3, std √(1/3): (2/3) / √(1/3) = 1.1547 more than 0.75 for the call, 0.57735 less than -0.25 for
    the hasty answers. Nobody else saw what rollout 0 answered to."""
    numbers = gigpo.Settings(discount=1.0, omega=1.0)
    turns = {"mask_T": [0, 1, 1, 0, 1, 1]}
    advantage_BxT, _, credit, _, metrics = run(REWARD, SUCCESS, CALLS, credit="gigpo", gigpo=numbers, **turns)
    np.testing.assert_allclose(advantage_BxT[0], [0, 1.90470, 1.90470, 0, 0.75, 0.75], atol=1e-4)
    np.testing.assert_allclose(advantage_BxT[1][:3], [0, -0.82735, -0.82735], atol=1e-4)
    assert not advantage_BxT[4:].any()  # all rewards of prompt 1 are equal
    assert not credit.transfer.corrected_PxS.any()
    assert metrics["tapo/correctable_actions"] == 0.5  # still diagnosed


def test_an_episode_that_is_not_judged_is_neither_success_nor_failure():
    """Rollout 3 of prompt 0 called a and b, and nobody knows whether it is right. The others' advantages are those of a
    group of three: 2/3, -1/3, -1/3. Success 0 supports a with 1 of 1: -1/3 + 0.8 · 2/3 > 0, clipped to 0. Counted are 2
    failing steps (those of rollout 1) and 2 failing trajectories, and means over 7 episodes."""
    calls = [[[call("a")], [call("a"), call("b")], [], [call("a"), call("b")]], CALLS[1]]
    judged = [[True, True, True, False], [True] * 4]
    unknown = [[True, False, False, True], [True] * 4]  # whatever stands there
    advantage_BxT, mask_BxT, credit, _, metrics = run([[1, 0, 0, 1], [1] * 4], unknown, calls, judged=judged)
    np.testing.assert_allclose(credit.advantage_PxG, [[2 / 3, -1 / 3, -1 / 3, 0], [0] * 4], atol=1e-6)
    np.testing.assert_allclose(advantage_BxT[1], [0, 0, 0, -1 / 3, -1 / 3, -1 / 3], atol=1e-6)
    assert not mask_BxT[3].any() and not advantage_BxT[3].any() and mask_BxT[[0, 1, 2, 4], 1:].all()
    transfer = credit.transfer
    assert transfer.support_PxS[0, 2] == 1 and not transfer.corrected_PxS[0, 3 * K :].any()
    assert transfer.witness_PxS[0, 3] == 0  # b of rollout 3 is no witness for b of rollout 1
    assert (metrics["tapo/failing_actions"], metrics["tapo/failing_trajectories"]) == (2, 2)
    assert metrics["tapo/witnesses"] == 2  # a of rollout 0 and c of prompt 1
    np.testing.assert_allclose([metrics["reward/mean"], metrics["reward/accuracy"]], 5 / 7, rtol=1e-6)


@pytest.mark.parametrize("credit", ["tapo", "gigpo"])
def test_what_stands_in_an_unjudged_episode_changes_nothing(credit):
    """Its reward, its success, its calls and what its turns saw: all others' tokens get the same."""
    judged = [[True, True, True, False], [True] * 4]
    found = [
        run([[1, 0, 0, reward], [1] * 4], [[True, False, False, right], [True] * 4],
            [[*CALLS[0][:3], steps], CALLS[1]], judged=judged, credit=credit)
        for reward, right, steps in ((0, False, []), (1, True, [call("b"), call("a")]))
    ]  # fmt: skip
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][4] == found[1][4]


def test_when_all_are_judged_the_bits_are_those_without_a_judge():
    without, judged = (run(REWARD, SUCCESS, CALLS, judged=given) for given in (None, [[True] * G] * P))
    for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(judged), strict=True):
        np.testing.assert_array_equal(a, b)
