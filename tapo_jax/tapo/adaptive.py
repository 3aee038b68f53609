"""Beyond the paper: a similarity threshold for each tool that follows the data (`config.tapo.adaptive_theta`).

How similar two calls are that both led to success depends on the tool: two good crops overlap by a half, two good
queries share four words of five. So theta_n of tool n is a running quantile of sim(w, w') over all pairs of witnesses
of tool n from different successful trajectories of one group, found by stochastic approximation (Robbins and Monro
1951) of the quantile's own equation P(sim ≤ theta) = quantile:

    theta_n ← clip(theta_n + rate · (quantile − share of this batch's pairs with sim ≤ theta_n), low, high)

A tool without a pair in the batch keeps its threshold. The state is a pytree of arrays: it belongs to the train state
and its checkpoints.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tapo_jax.tapo.clusters import membership
from tapo_jax.tapo.encode import Array, Steps, name_hash


@dataclasses.dataclass(frozen=True)
class Settings:
    """How thresholds follow the data. Raises ValueError unless 0 < quantile < 1."""

    tools: tuple[str, ...]
    """The names of the tools that have a threshold of their own."""
    quantile: float = 0.8
    """The quantile of similarities between witnesses that theta follows."""
    rate: float = 0.05
    """The step of the stochastic approximation."""
    low: float = 0.3
    high: float = 1.0
    """The bounds of theta."""

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile is {self.quantile}; it must lie between 0 and 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveTheta:
    """The state of the thresholds.

    tool_N: int32 hashes of the tools' names.
    theta_N: float32 thresholds.
    pairs_N: float32, pairs seen so far.
    """

    tool_N: jax.Array
    theta_N: jax.Array
    pairs_N: jax.Array


def init(settings: Settings, theta: float) -> AdaptiveTheta:
    """Start every tool at the same threshold."""
    tool_N = jnp.array([name_hash(name) for name in settings.tools], jnp.int32)
    return AdaptiveTheta(tool_N, jnp.full(tool_N.shape, theta, jnp.float32), jnp.zeros(tool_N.shape, jnp.float32))


def thresholds(state: AdaptiveTheta, steps: Steps, theta: float) -> jax.Array:
    """Return theta_PxS: the threshold of each step's tool; `theta` for tools not in the state."""
    is_tool_PxSxN = steps.tool_PxS[:, :, None] == state.tool_N[None, None, :]
    theta_PxS = jnp.where(is_tool_PxSxN, state.theta_N[None, None, :], 0).sum(axis=2)
    return jnp.where(is_tool_PxSxN.any(axis=2), theta_PxS, theta)


def update(
    state: AdaptiveTheta, steps: Steps, sim_PxSxS: jax.Array, success_PxG: Array, settings: Settings
) -> AdaptiveTheta:
    """Return the state after one batch.

    It sums over P, so it runs sharded over prompts.

    Args:
        state: before the batch.
        steps: the batch's, from `encode_steps`.
        sim_PxSxS: from `pairwise_similarity`.
        success_PxG: bool.
        settings: the quantile, the rate and the bounds.
    """
    own_PxSxG = membership(steps.trajectory_PxS, success_PxG.shape[1])
    witness_PxS = (own_PxSxG & success_PxG.astype(bool)[:, None, :]).any(axis=2) & steps.valid_PxS
    other_PxSxS = steps.trajectory_PxS[:, :, None] != steps.trajectory_PxS[:, None, :]
    pair_PxSxS = witness_PxS[:, :, None] & witness_PxS[:, None, :] & other_PxSxS
    pair_PxSxS &= steps.tool_PxS[:, :, None] == steps.tool_PxS[:, None, :]

    def count(tool: jax.Array, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine_PxSxS = pair_PxSxS & (steps.tool_PxS == tool)[:, :, None]
        return mine_PxSxS.sum(dtype=jnp.float32) / 2, (mine_PxSxS & (sim_PxSxS <= theta)).sum(dtype=jnp.float32) / 2

    pairs_N, below_N = jax.lax.map(lambda pair: count(*pair), (state.tool_N, state.theta_N))
    moved_N = state.theta_N + settings.rate * (settings.quantile - below_N / jnp.maximum(pairs_N, 1))
    moved_N = jnp.clip(moved_N, settings.low, settings.high)
    theta_N = jnp.where(pairs_N > 0, moved_N, state.theta_N)
    return AdaptiveTheta(state.tool_N, theta_N, state.pairs_N + pairs_N)
