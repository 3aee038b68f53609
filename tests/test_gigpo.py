import jax
import numpy as np

from tapo_jax import tapo
from tapo_jax.learn import gigpo


def test_returns_by_hand():
    # Rollout 0 makes two steps and is rewarded 1: the first is one step away. Rollout 1 makes one, of reward 0.5.
    result = gigpo.step_returns(np.float32([[1.0, 0.5]]), np.array([[True, True, True, False]]), discount=0.9)
    np.testing.assert_allclose(result, [[0.9, 1.0, 0.5, 0.0]], rtol=1e-6)


def test_steps_by_hand():
    # Slots 0, 2 and 4 start from state 7 with returns 1, 0, 0: mean 1/3, std (ddof 1) sqrt(1/3). Slots 1 and 3 share
    # state 8 and their return; slot 5 is alone in its state.
    anchor, valid = np.array([[7, 8, 7, 8, 7, 9]], np.int32), np.ones((1, 6), bool)
    returns, advantage = np.float32([[1, 0.3, 0, 0.3, 0, 5]]), np.float32([[1, -1, 2]])
    result = jax.jit(gigpo.step_advantages)(returns, anchor, valid, advantage, omega=0.5)
    up, down = 0.5 * 2 / 3 / np.sqrt(1 / 3), 0.5 * 1 / 3 / np.sqrt(1 / 3)
    np.testing.assert_allclose(result, [[1 + up, 1, -1 - down, -1, 2 - down, 2]], rtol=1e-5)
    assert result[0, [1, 3, 5]].tolist() == [1, -1, 2]


def test_padding_and_tokens():
    anchor, valid = np.array([[7, 7, 7, 7]], np.int32), np.array([[True, False, True, False]])
    result = gigpo.step_advantages(np.float32([[1, 99, 0, -99]]), anchor, valid, np.float32([[0, 0]]))
    side = 0.5 / np.sqrt(0.5)  # returns 1 and 0: 0.5 from their mean, std (ddof 1) sqrt(1/2)
    np.testing.assert_allclose(result, [[side, 0, -side, 0]], rtol=1e-5)
    token = tapo.token_advantages(np.float32([[3, 4]]), result, np.array([[0, -1], [-1, 0]], np.int32))
    np.testing.assert_allclose(token, [[side, 3], [4, -side]], rtol=1e-5)


def test_turns_are_stretches_of_written_tokens():
    mask_BxT = np.array([[0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1], [0] * 6], bool)
    want = [[-1, 0, 0, -1, 1, -1], [0, -1, -1, 1, -1, 2], [-1] * 6]
    assert gigpo.turns(mask_BxT).tolist() == want
