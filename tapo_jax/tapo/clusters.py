"""Cluster the witnesses into parameter-equivalent calls. Axes: P prompts, S step slots of a group.

`components` and `leaders` return label_PxS int32: the lowest slot of the witness's cluster, S where the slot holds no
witness.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tapo_jax.tapo.encode import Array


def membership(trajectory_PxS: Array, group: int) -> jax.Array:
    """Return own_PxSxG, bool: whether slot s belongs to trajectory g.

    A slot with a number outside 0..G-1 belongs to none.
    """
    return trajectory_PxS[:, :, None] == jnp.arange(group, dtype=jnp.int32)[None, None, :]


def narrow_slots(S: int) -> tuple[np.ndarray, np.unsignedinteger]:
    """Return (0 .. S-1 as [1, S], S itself) in the narrowest unsigned type.

    Reductions over pairs of slots are bound by the bytes they read, and a byte holds a slot of most groups.
    """
    dtype = np.min_scalar_type(S)
    return np.arange(S, dtype=dtype)[None, :], dtype.type(S)


def components(sim_PxSxS: jax.Array, witness_PxS: jax.Array, theta_PxSx1: jax.Array) -> jax.Array:
    """Label the connected components of sim ≥ theta among the witnesses.

    The partition does not depend on the order of the witnesses. theta_PxSx1: broadcast to [P, S, S].

    Every witness takes the smallest label of its neighbours, then its label's label, until nothing changes: a few
    rounds for what rollouts give, and always right, since labels only fall and a component's labels end equal. A
    similarity of 0 never links, so that tools stay apart at theta 0 too.
    """
    S = sim_PxSxS.shape[1]
    slot_1xS, none = narrow_slots(S)
    both_PxSxS = witness_PxS[:, :, None] & witness_PxS[:, None, :]
    link_PxSxS = both_PxSxS & (sim_PxSxS >= theta_PxSx1) & (sim_PxSxS > 0)
    start_PxS = jnp.where(witness_PxS, slot_1xS, none)

    def spread(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        label_PxS, _ = carry
        near_PxS = jnp.where(link_PxSxS, label_PxS[:, None, :], none).min(axis=2)
        new_PxS = jnp.minimum(label_PxS, near_PxS)
        jump_PxS = jnp.take_along_axis(new_PxS, jnp.minimum(new_PxS, S - 1).astype(jnp.int32), axis=1)
        new_PxS = jnp.where(witness_PxS, jnp.minimum(new_PxS, jump_PxS), none)
        return new_PxS, (new_PxS != label_PxS).any()

    label_PxS = jax.lax.while_loop(lambda carry: carry[1], spread, (start_PxS, jnp.bool_(True)))[0]
    return label_PxS.astype(jnp.int32)


def leaders(sim_PxSxS: jax.Array, witness_PxS: jax.Array, theta_PxSx1: jax.Array) -> jax.Array:
    """Label greedy clusters in slot order.

    A witness joins the earlier leader most similar to it (the first of equals) where that similarity is ≥ theta and
    above 0, else it leads a new cluster. theta_PxSx1: broadcast to [P, S, 1].
    """
    P, S = witness_PxS.shape
    slot_1xS = jnp.arange(S, dtype=jnp.int32)[None, :]
    theta_PxS = jnp.broadcast_to(theta_PxSx1, (P, S, 1))[:, :, 0]

    def visit(s: jax.Array, label_PxS: jax.Array) -> jax.Array:
        sim_PxS = jax.lax.dynamic_index_in_dim(sim_PxSxS, s, axis=1, keepdims=False)
        leading_PxS = (label_PxS == slot_1xS) & (slot_1xS < s)
        sim_PxS = jnp.where(leading_PxS, sim_PxS, -1)
        best_P, leader_P = sim_PxS.max(axis=1), sim_PxS.argmax(axis=1).astype(jnp.int32)
        joins_P = (best_P >= theta_PxS[:, s]) & (best_P > 0)
        label_P = jnp.where(witness_PxS[:, s], jnp.where(joins_P, leader_P, s), S)
        return label_PxS.at[:, s].set(label_P)

    return jax.lax.fori_loop(0, S, visit, jnp.full((P, S), S, jnp.int32))
