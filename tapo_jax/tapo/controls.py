"""Controls for the ablations: what TAPO must beat. (The third, exact match only, is theta = 1.)"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from tapo_jax.tapo.clusters import membership
from tapo_jax.tapo.encode import Array
from tapo_jax.tapo.result import CreditTransfer

CONTROLS = ("none", "shuffled", "zero_tools")


class Slots(Protocol):
    """The fields of `Steps` that say which trajectory a slot belongs to, and whether it holds a step."""

    @property
    def trajectory_PxS(self) -> Array: ...

    @property
    def valid_PxS(self) -> Array: ...


def failing_steps(trajectory_PxS: Array, valid_PxS: Array, success_PxG: Array) -> jax.Array:
    """Return failing_PxS, bool: the valid steps of trajectories without success."""
    own_PxSxG = membership(trajectory_PxS, success_PxG.shape[1])
    successful_PxS = (own_PxSxG & success_PxG.astype(bool)[:, None, :]).any(axis=2)
    return jnp.asarray(valid_PxS) & own_PxSxG.any(axis=2) & ~successful_PxS


def shuffle_rows(key_P: jax.Array, sim_PxSxS: jax.Array, failing_PxS: jax.Array) -> jax.Array:
    """Exchange the rows of similarities of a group's failing steps at random.

    The group hands out its corrections to steps that did not earn them: up to as many as before, since a step whose
    advantage is not negative takes none. Rows of witnesses stay, so clusters, support and their advantages stay. The
    result is not symmetric. key_P: one PRNG key for each prompt.
    """
    S = failing_PxS.shape[1]

    def one(key: jax.Array, failing_S: jax.Array) -> jax.Array:
        draw_S = jnp.where(failing_S, jax.random.uniform(key, (S,)), 2)
        order_S = jnp.argsort(draw_S)  # the failing slots come first, in random order
        rank_S = jnp.cumsum(failing_S) - 1
        return jnp.where(failing_S, order_S[rank_S], jnp.arange(S))

    source_PxS = jax.vmap(one)(key_P, failing_PxS)
    return jnp.take_along_axis(sim_PxSxS, source_PxS[:, :, None], axis=1)


def zero_tools(transfer: CreditTransfer, steps: Slots, success_PxG: Array) -> CreditTransfer:
    """Punish no tool step of a failing trajectory, whatever it did: the crude alternative."""
    failing_PxS = failing_steps(steps.trajectory_PxS, steps.valid_PxS, success_PxG)
    freed_PxS = failing_PxS & (transfer.advantage_PxS < 0) | transfer.corrected_PxS
    advantage_PxS = jnp.where(freed_PxS, 0, transfer.advantage_PxS)
    return dataclasses.replace(transfer, advantage_PxS=advantage_PxS, corrected_PxS=freed_PxS)
