import jax
import jax.numpy as jnp
import numpy as np
import pinned_losses
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_jax.learn import advantages

REWARD = np.array([[1.0, 0.0, 1.0, 0.0]], np.float32)
# mean 1/2; squared deviations sum to 4 · 1/4 = 1, so std (ddof 1) = sqrt(1/3).
EXPECTED = {
    "grpo": 0.5 / (np.sqrt(1 / 3) + 1e-6),
    "dr_grpo": 0.5,
    "rloo": 0.5 * 4 / 3,  # the others' mean is 1/3: 1 - 1/3 = 2/3
    "reinforce_pp_baseline": 0.5 / (np.sqrt(1 / 3) + 1e-6),  # one group: the batch is the group
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("estimator", advantages.ESTIMATORS)
def test_values(estimator, jit):
    function = jax.jit(advantages.group_advantages, static_argnames="estimator") if jit else advantages.group_advantages
    result = function(REWARD, estimator=estimator)
    np.testing.assert_allclose(result, EXPECTED[estimator] * np.array([[1, -1, 1, -1]]), rtol=1e-6)


@pytest.mark.parametrize("estimator", advantages.ESTIMATORS)
def test_equal_to_verl(estimator):
    # verl whitens with rsqrt(var + 1e-8) where we divide by std + epsilon: the same to 1e-7 at epsilon 0.
    epsilon = 0.0 if estimator == "reinforce_pp_baseline" else 1e-6
    tolerance = 1e-7 if estimator == "reinforce_pp_baseline" else 1e-8
    with jax.enable_x64(True):
        result = advantages.group_advantages(np.array(pinned_losses.REWARD), estimator, epsilon)
        assert result.dtype == np.float64
    np.testing.assert_allclose(result, pinned_losses.VERL_ADVANTAGE[estimator], atol=tolerance, rtol=0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("estimator", advantages.ESTIMATORS)
def test_constant_groups_and_groups_of_one_are_exactly_zero(estimator, jit):
    # 0.3 seven times: the float32 mean is not 0.3, and noise / (noise + 1e-6) is no small number.
    reward = np.full((3, 7), 0.3, np.float32)
    reward[1] = 1.1
    function = jax.jit(advantages.group_advantages, static_argnames="estimator") if jit else advantages.group_advantages
    assert (function(reward, estimator=estimator) == 0).all()
    assert (function(reward[:, :1], estimator=estimator) == 0).all()


def test_constant_group_beside_another_stays_zero_under_batch_normalisation():
    reward = np.array([[0.3, 0.3, 0.3], [1.0, 0.0, 0.0]], np.float32)
    result = advantages.group_advantages(reward, "reinforce_pp_baseline")
    # deviations 2/3, -1/3, -1/3 and three zeros: squares sum to 2/3, over 6 - 1: std = sqrt(2/15).
    np.testing.assert_allclose(result[1], np.array([2, -1, -1]) / 3 / np.sqrt(2 / 15), rtol=1e-5)
    assert (result[0] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_reward_names_its_group(bad):
    reward = np.ones((4, 2), np.float32)
    reward[2, 1] = bad
    with pytest.raises(ValueError, match="group 2"):
        advantages.group_advantages(reward)


def test_unknown_estimator_and_wrong_shape():
    with pytest.raises(ValueError, match="reinforce_pp_baseline"):
        advantages.group_advantages(REWARD, "gae")
    with pytest.raises(ValueError, match="shape"):
        advantages.group_advantages(REWARD[0])


def test_integer_rewards_become_floats():
    assert advantages.group_advantages(np.array([[1, 0]]), "dr_grpo").tolist() == [[0.5, -0.5]]


def test_a_common_offset_changes_nothing():
    # Subtracting the group's lowest reward first keeps 1000 + {0, 1} as exact as {0, 1}.
    reward = np.array([[0.0, 1.0, 1.0, 0.0, 1.0]], np.float32)
    np.testing.assert_array_equal(advantages.group_advantages(reward + 1000), advantages.group_advantages(reward))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=12), st.permutations(range(12)))
def test_advantages_are_centred_and_follow_permutations(rewards, order):
    reward = np.array([rewards], np.float32) / 8
    order = [i for i in order if i < len(rewards)]
    for estimator in advantages.ESTIMATORS:
        result = np.asarray(advantages.group_advantages(reward, estimator))
        assert abs(result.sum()) < 1e-4
        permuted = np.asarray(advantages.group_advantages(reward[:, order], estimator))
        np.testing.assert_allclose(permuted, result[:, order], atol=1e-5)


def test_signal_and_overlong():
    assert advantages.has_signal(jnp.array([[0.3, 0.3], [0.0, 1.0]])).tolist() == [False, True]
    # 100 tokens at most, buffer 20: free up to 80, half-way at 90, full from 100.
    length = np.array([0, 80, 85, 90, 100, 130])
    np.testing.assert_allclose(advantages.overlong_penalty(length, 100, 20), [0, 0, -0.25, -0.5, -1, -1])
    assert (advantages.overlong_penalty(length, 100, 0) == 0).all()
    with pytest.raises(ValueError, match="buffer"):
        advantages.overlong_penalty(length, 100, 101)


@pytest.mark.parametrize("estimator", advantages.ESTIMATORS)
def test_a_group_with_an_unknown_reward_is_the_group_without_it(estimator):
    """Rewards 1, 0, ?, 1, 0 are those of REWARD, whatever stands at the place of the unknown one."""
    reward = np.array([[1.0, 0.0, 77.0, 1.0, 0.0]], np.float32)
    valid = np.array([[True, True, False, True, True]])
    function = jax.jit(advantages.group_advantages, static_argnames="estimator")
    result = np.asarray(function(reward, estimator=estimator, valid_PxG=valid))
    without = np.asarray(function(REWARD, estimator=estimator))
    np.testing.assert_array_equal(result[valid], without[0])
    assert result[0, 2] == 0


@pytest.mark.parametrize("estimator", advantages.ESTIMATORS)
def test_with_everybody_valid_nothing_changes(estimator):
    """But for rounding: XLA multiplies by the reciprocal of a size that it knows. A run without a judge gives None."""
    reward = np.random.default_rng(0).integers(0, 4, (64, 7)).astype(np.float32) / 2
    function = jax.jit(advantages.group_advantages, static_argnames="estimator")
    every = np.ones(reward.shape, bool)
    np.testing.assert_allclose(
        function(reward, estimator=estimator, valid_PxG=every),
        function(reward, estimator=estimator),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_array_equal(
        advantages.has_signal(jnp.array(reward), jnp.array(every)), advantages.has_signal(jnp.array(reward))
    )


@pytest.mark.parametrize("estimator", advantages.ESTIMATORS)
def test_fewer_than_two_known_rewards_give_exactly_zero(estimator):
    """Beside a group with a signal: by hand, of rewards 1 and 0 each is 1/2 from the mean."""
    reward = np.array([[1, 0, 0], [5, 0, 0], [1, 9, 0]], np.float32)
    valid = np.array([[False] * 3, [True, False, False], [True, False, True]])
    result = np.asarray(advantages.group_advantages(reward, estimator, valid_PxG=valid))
    assert not result[:2].any() and result[2, 1] == 0
    # Standard deviations: of the group √(1/2); of the batch's three known rewards √((1/4 + 1/4) / 2) = 1/2.
    want = {"grpo": np.sqrt(0.5), "dr_grpo": 0.5, "rloo": 1.0, "reinforce_pp_baseline": 1.0}[estimator]
    np.testing.assert_allclose(result[2, [0, 2]], [want, -want], rtol=1e-5)
    assert advantages.has_signal(jnp.array(reward), jnp.array(valid)).tolist() == [False, False, True]
