"""GiGPO, the step-level comparator (Feng et al. 2025, arXiv 2505.10978): equal states, where TAPO has similar actions.

Steps of a group that start from the same state form a step-level group: each is compared with the others that were
tried in that state. Unlike in TAPO, every turn of the policy is a step, the answer and failed calls included.
Axes: P prompts, G rollouts, K steps of a rollout, S = G·K slots (slot = g·K + k); B rows, T tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Settings:
    """GiGPO's numbers; the defaults are the paper's."""

    omega: float = 1.0
    """The weight of the step-level advantage."""
    discount: float = 0.95
    """The discount of a rollout's reward for each step that follows."""


def turns(mask_BxT: jax.Array) -> jax.Array:
    """Return turn_BxT: int32, the turn in which the policy wrote a token, -1 for tokens that it did not write.

    Between two turns there is always a token that it did not write.
    """
    before_BxT = jnp.pad(mask_BxT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(mask_BxT, jnp.cumsum(mask_BxT & ~before_BxT, axis=1) - 1, -1)


def step_returns(reward_PxG: jax.Array, valid_PxS: jax.Array, discount: float = 0.95) -> jax.Array:
    """Return return_PxS = discount^(later steps of the rollout) · its reward, which comes only at the end."""
    P, G = reward_PxG.shape
    valid_PxGxK = valid_PxS.reshape(P, G, -1)
    following_PxGxK = jnp.flip(jnp.cumsum(jnp.flip(valid_PxGxK, axis=2), axis=2), axis=2) - valid_PxGxK
    return_PxGxK = reward_PxG[:, :, None] * jnp.asarray(discount, reward_PxG.dtype) ** following_PxGxK
    return jnp.where(valid_PxGxK, return_PxGxK, 0).reshape(P, -1)


def step_advantages(
    return_PxS: jax.Array,
    anchor_PxS: jax.Array,
    valid_PxS: jax.Array,
    advantage_PxG: jax.Array,
    *,
    omega: float = 1.0,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Return the trajectory's advantage + omega · (return - mean) / std over the steps with the same anchor state.

    The standard deviation has ddof 1. A state with only one step, or with equal returns, adds exactly 0.

    return_PxS: see `step_returns`.
    anchor_PxS: int32 hash of the state in which the step was taken (for a tool agent, the last observation).
    valid_PxS: bool, False for a slot without a step, which gets 0.
    advantage_PxG: the trajectory's advantage.
    omega: the weight of the step-level advantage.
    epsilon: added to the standard deviation.
    """
    G = advantage_PxG.shape[1]
    same_PxSxS = (anchor_PxS[:, :, None] == anchor_PxS[:, None, :]) & valid_PxS[:, :, None] & valid_PxS[:, None, :]
    count_PxS = jnp.maximum(same_PxSxS.sum(axis=2), 1)
    # Differences instead of returns: equal returns give exactly 0, whatever their mean rounds to.
    difference_PxSxS = jnp.where(same_PxSxS, return_PxS[:, :, None] - return_PxS[:, None, :], 0)
    centred_PxS = difference_PxSxS.sum(axis=2) / count_PxS
    square_PxS = jnp.where(same_PxSxS, (centred_PxS**2)[:, None, :], 0).sum(axis=2)
    centred_PxS = centred_PxS / (jnp.sqrt(square_PxS / jnp.maximum(count_PxS - 1, 1)) + epsilon)
    own_PxS = jnp.repeat(advantage_PxG, return_PxS.shape[1] // G, axis=1)
    return jnp.where(valid_PxS, own_PxS + omega * centred_PxS, 0)


def turn_advantages(
    anchor_PxV: jax.Array, reward_PxG: jax.Array, advantage_PxG: jax.Array, settings: Settings
) -> jax.Array:
    """Return the advantage of every turn, [P, V].

    anchor_PxV: hash of the state before each turn; 0 means no turn.
    reward_PxG: the trajectories' rewards.
    advantage_PxG: the trajectories' advantages.
    settings: weight and discount.
    """
    valid_PxV = anchor_PxV != 0
    return_PxV = step_returns(reward_PxG, valid_PxV, settings.discount)
    return step_advantages(return_PxV, anchor_PxV, valid_PxV, advantage_PxG, omega=settings.omega)
