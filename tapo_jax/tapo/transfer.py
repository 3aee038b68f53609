"""Transfer credit: tool steps of failing trajectories that match successful ones' get part of their punishment back.

From Dong et al., "TAPO: Tool-Aware Policy Optimization via Credit Transfer for Multimodal Search Agents", arXiv
2606.05784.

Axes: P prompts, G rollouts of each, B = P·G rows (row = p·G + g), K tool steps of a rollout at most, S = G·K step slots
of a group (slot = g·K + k), T tokens.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tapo_jax.tapo import clusters, controls
from tapo_jax.tapo.encode import Array, Steps
from tapo_jax.tapo.result import CreditTransfer
from tapo_jax.tapo.settings import CLUSTERINGS, PUBLISHED, Settings
from tapo_jax.tapo.similarity import pairwise_similarity

# The arguments of `transfer`: steps, success_PxG, advantage_PxG, weight_PxG, theta_PxS, key_P.
Part = tuple[Steps, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def transfer_from_similarity(
    sim_PxSxS: ArrayLike,
    trajectory_PxS: ArrayLike,
    valid_PxS: ArrayLike,
    success_PxG: ArrayLike,
    advantage_PxG: ArrayLike,
    settings: Settings = PUBLISHED,
    *,
    theta_PxS: ArrayLike | None = None,
    weight_PxG: ArrayLike | None = None,
) -> CreditTransfer:
    """Transfer credit between steps whose pairwise similarities are known.

    Witnesses are the valid steps of successful trajectories, clustered where sim ≥ cluster_theta. With n(C) the
    successful trajectories that have a member in cluster C (arXiv 2606.05784; the definitions that it leaves open are
    this project's):

        sup(C) = |n(C)| / (successful trajectories of the group); 1 with support=False
        Adv(C) = mean (or max, min: `aggregate`) of the advantages of n(C)
        C*     = argmax_C max_{w in C} sim(O, w); ties go to the larger sup, then to the lower first slot
        F(O)   = sim(O, C*) · sup(C*) · Adv(C*), 0 where Adv(C*) ≤ 0

    A valid step O of a failing trajectory with adv < 0, sim(O, C*) ≥ theta and sim(O, C*) · sup(C*) ≥ alpha_min gets
    min(adv + beta · F, 0) (clip=False: without the min). Everything else keeps adv.

    Args:
        sim_PxSxS: symmetric, 0..1. Thresholds are compared in its type: a float32 similarity of 0.7 passes theta 0.7.
        trajectory_PxS: int, the slot's rollout 0..G-1; a slot with another number is invalid.
        valid_PxS: bool, whether the slot holds a step.
        success_PxG: bool, by the accuracy part of the reward.
        advantage_PxG: the base algorithm's; the result has its type.
        settings: TAPO's numbers; text, scope, control and chunks are `transfer`'s.
        theta_PxS: a threshold for each step in place of settings.theta (`adaptive.py`).
        weight_PxG: a trajectory counts as this share of one in sup, its advantage times it in Adv (`memory.py`).
    """
    return _transfer(
        jnp.asarray(sim_PxSxS),
        jnp.asarray(trajectory_PxS),
        jnp.asarray(valid_PxS),
        jnp.asarray(success_PxG),
        jnp.asarray(advantage_PxG),
        settings,
        theta_PxS,
        None if weight_PxG is None else jnp.asarray(weight_PxG),
        questions=1,
    )


def _transfer(
    sim_PxSxS: jax.Array,
    trajectory_PxS: jax.Array,
    valid_PxS: jax.Array,
    success_PxG: jax.Array,
    advantage_PxG: jax.Array,
    settings: Settings,
    theta_PxS: ArrayLike | None,
    weight_PxG: jax.Array | None,
    questions: int,
) -> CreditTransfer:
    """Transfer credit, as `transfer_from_similarity`, where G may hold several questions.

    questions: G holds the trajectories of this many questions, one after another (scope "batch"): sup(C) then divides
        by the successful trajectories of the questions represented in C.
    """
    if not jnp.issubdtype(sim_PxSxS.dtype, jnp.floating):
        sim_PxSxS = sim_PxSxS.astype(advantage_PxG.dtype)
    success_PxG = success_PxG.astype(bool)
    theta_PxS = _per_step(settings.theta if theta_PxS is None else theta_PxS, sim_PxSxS)
    cluster_theta_PxS = theta_PxS if settings.cluster_theta is None else _per_step(settings.cluster_theta, sim_PxSxS)

    own_PxSxG = clusters.membership(trajectory_PxS, success_PxG.shape[1])
    valid_PxS = valid_PxS.astype(bool) & own_PxSxG.any(axis=2)
    successful_PxS = (own_PxSxG & success_PxG[:, None, :]).any(axis=2)
    adv_PxS = jnp.where(own_PxSxG, advantage_PxG[:, None, :], 0).sum(axis=2)
    witness_PxS = valid_PxS & successful_PxS

    label_PxS = CLUSTERINGS[settings.cluster](sim_PxSxS, witness_PxS, cluster_theta_PxS[:, :, None])
    in_cluster_PxSxG = _trajectories_of_clusters(label_PxS, witness_PxS, own_PxSxG)
    sup_PxS, cluster_adv_PxS = _support_and_advantage(
        in_cluster_PxSxG, success_PxG, advantage_PxG, weight_PxG, settings.aggregate, questions
    )
    if not settings.support:
        sup_PxS = jnp.ones_like(sup_PxS)

    best_PxS, nearest_PxS = _nearest_cluster(sim_PxSxS, witness_PxS, sup_PxS, label_PxS)
    found_PxS = valid_PxS & (best_PxS >= 0)
    best_sup_PxS, star_adv_PxS, star_PxS = (
        jnp.take_along_axis(x, nearest_PxS, axis=1) for x in (sup_PxS, cluster_adv_PxS, label_PxS)
    )
    evidence_PxS = best_PxS.astype(best_sup_PxS.dtype) * best_sup_PxS
    correctable_PxS = found_PxS & ~successful_PxS & (best_PxS >= theta_PxS)
    corrected_PxS = correctable_PxS & (evidence_PxS >= settings.alpha_min) & (adv_PxS < 0)
    new_PxS = adv_PxS + settings.beta * jnp.where(star_adv_PxS > 0, evidence_PxS * star_adv_PxS, 0)
    if settings.clip:
        new_PxS = jnp.minimum(new_PxS, 0)
    leads_PxS = witness_PxS & (label_PxS == jnp.arange(label_PxS.shape[1])[None, :])
    return CreditTransfer(
        advantage_PxS=jnp.where(corrected_PxS, new_PxS, adv_PxS),
        corrected_PxS=corrected_PxS,
        correctable_PxS=correctable_PxS,
        sim_PxS=jnp.where(found_PxS, best_PxS, 0),
        support_PxS=jnp.where(found_PxS, best_sup_PxS, 0),
        cluster_PxS=jnp.where(found_PxS, star_PxS, -1),
        witness_PxS=jnp.where(found_PxS, nearest_PxS, -1),
        clusters_P=leads_PxS.sum(axis=1, dtype=jnp.int32),
    )


def _per_step(theta: ArrayLike, sim_PxSxS: jax.Array) -> jax.Array:
    """Return a threshold for each step, in the type of the similarities."""
    return jnp.broadcast_to(jnp.asarray(theta, sim_PxSxS.dtype), sim_PxSxS.shape[:2])


def _trajectories_of_clusters(label_PxS: jax.Array, witness_PxS: jax.Array, own_PxSxG: jax.Array) -> jax.Array:
    """Return in_cluster_PxSxG, bool: for every witness, the trajectories that have a member in its cluster."""
    same_PxSxS = (label_PxS[:, :, None] == label_PxS[:, None, :]) & witness_PxS[:, :, None] & witness_PxS[:, None, :]
    # Products of 0 and 1 are exact in any precision; the sum is at most S.
    members_PxSxG = jnp.einsum("pso,pog->psg", same_PxSxS.astype(jnp.float32), own_PxSxG.astype(jnp.float32))
    return members_PxSxG > 0


def _support_and_advantage(
    in_cluster_PxSxG: jax.Array,
    success_PxG: jax.Array,
    advantage_PxG: jax.Array,
    weight_PxG: jax.Array | None,
    aggregate: str,
    questions: int,
) -> tuple[jax.Array, jax.Array]:
    """Return sup(C) and Adv(C) of the cluster of every witness; 0 at the other slots."""
    P, S, G = in_cluster_PxSxG.shape
    weight_PxG = jnp.ones_like(advantage_PxG) if weight_PxG is None else weight_PxG.astype(advantage_PxG.dtype)
    credit_Px1xG = (advantage_PxG * weight_PxG)[:, None, :]
    counted_PxG = jnp.where(success_PxG, weight_PxG, 0)

    here_PxSxG = jnp.where(in_cluster_PxSxG, counted_PxG[:, None, :], 0)
    asked_PxSxQ = in_cluster_PxSxG.reshape(P, S, questions, G // questions).any(axis=3)
    successes_PxQ = counted_PxG.reshape(P, questions, G // questions).sum(axis=2)
    total_PxS = jnp.where(asked_PxSxQ, successes_PxQ[:, None, :], 0).sum(axis=2)
    sup_PxS = here_PxSxG.sum(axis=2) / jnp.where(total_PxS > 0, total_PxS, 1)

    if aggregate == "mean":
        credit_PxS = jnp.where(in_cluster_PxSxG, credit_Px1xG, 0).sum(axis=2)
        return sup_PxS, credit_PxS / jnp.maximum(in_cluster_PxSxG.sum(axis=2), 1)
    if aggregate == "max":
        credit_PxS = jnp.where(in_cluster_PxSxG, credit_Px1xG, -jnp.inf).max(axis=2)
    else:
        credit_PxS = jnp.where(in_cluster_PxSxG, credit_Px1xG, jnp.inf).min(axis=2)
    return sup_PxS, jnp.where(in_cluster_PxSxG.any(axis=2), credit_PxS, 0)


def _nearest_cluster(
    sim_PxSxS: jax.Array, witness_PxS: jax.Array, sup_PxS: jax.Array, label_PxS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (sim, slot) of the best witness of every slot: largest sim, largest sup, lowest label, lowest slot.

    sim is -1 where there is no witness. The barrier makes both reductions read the same array: recomputed inside each
    of two fused loops, a similarity may round differently, and then no slot equals the maximum.
    """
    S = sim_PxSxS.shape[1]
    slot_1xS, none = clusters.narrow_slots(S)
    key_PxS = label_PxS * S + slot_1xS
    ahead_PxSxS = (sup_PxS[:, None, :] > sup_PxS[:, :, None]) | (
        (sup_PxS[:, None, :] == sup_PxS[:, :, None]) & (key_PxS[:, None, :] < key_PxS[:, :, None])
    )
    rank_PxS = ahead_PxSxS.sum(axis=2, dtype=slot_1xS.dtype)
    masked_PxSxS = jax.lax.optimization_barrier(jnp.where(witness_PxS[:, None, :], sim_PxSxS, -1))
    best_PxS = masked_PxSxS.max(axis=2)
    best_rank_PxS = jnp.where(masked_PxSxS == best_PxS[:, :, None], rank_PxS[:, None, :], none).min(axis=2)
    chosen_PxSxS = best_rank_PxS[:, :, None] == rank_PxS[:, None, :]
    nearest_PxS = jnp.where(chosen_PxSxS, slot_1xS[:, None, :], 0).max(axis=2)
    return best_PxS, nearest_PxS.astype(jnp.int32)


def transfer(
    steps: Steps,
    success_PxG: ArrayLike,
    advantage_PxG: ArrayLike,
    settings: Settings = PUBLISHED,
    *,
    key: jax.Array | None = None,
    theta_PxS: ArrayLike | None = None,
    weight_PxG: ArrayLike | None = None,
) -> CreditTransfer:
    """Compare the encoded calls of every group and transfer credit: the whole of TAPO.

    Args:
        steps: from `encode_steps`.
        success_PxG: bool.
        advantage_PxG: the base algorithm's.
        settings: with scope "batch", C* and its witness are numbered p·S + slot.
        key: PRNG key; needed by the control "shuffled".
        theta_PxS: as in `transfer_from_similarity`.
        weight_PxG: as in `transfer_from_similarity`.

    Raises ValueError for the control "shuffled" without a key.
    """
    if settings.control == "shuffled" and key is None:
        raise ValueError("tapo.control 'shuffled' draws random steps: pass key=jax.random.key(...)")
    success_PxG, advantage_PxG = jnp.asarray(success_PxG), jnp.asarray(advantage_PxG)
    P, G = success_PxG.shape
    theta_PxS = settings.theta if theta_PxS is None else theta_PxS
    theta_PxS = jnp.broadcast_to(jnp.asarray(theta_PxS, jnp.float32), steps.valid_PxS.shape)
    weight_PxG = jnp.ones((P, G), advantage_PxG.dtype) if weight_PxG is None else jnp.asarray(weight_PxG)
    key_P = jax.random.split(jax.random.key(0) if key is None else key, P)
    questions = P if settings.scope == "batch" else 1

    def work(part: Part) -> CreditTransfer:
        steps, success_PxG, advantage_PxG, weight_PxG, theta_PxS, key_P = part
        sim_PxSxS = pairwise_similarity(steps, settings.text)
        if settings.control == "shuffled":
            failing_PxS = controls.failing_steps(steps.trajectory_PxS, steps.valid_PxS, success_PxG)
            sim_PxSxS = controls.shuffle_rows(key_P, sim_PxSxS, failing_PxS)
        trajectory_PxS, valid_PxS = jnp.asarray(steps.trajectory_PxS), jnp.asarray(steps.valid_PxS)
        result = _transfer(
            sim_PxSxS,
            trajectory_PxS,
            valid_PxS,
            success_PxG,
            advantage_PxG,
            settings,
            theta_PxS,
            weight_PxG,
            questions,
        )
        return controls.zero_tools(result, steps, success_PxG) if settings.control == "zero_tools" else result

    part = (steps, success_PxG, advantage_PxG, weight_PxG, theta_PxS, key_P)
    if settings.scope == "batch":
        return _unpool(work(_pool(part)), P)
    return work(part) if settings.chunks == 1 else _chunked(work, part, settings.chunks)


def _chunked(work: Callable[[Part], CreditTransfer], part: Part, chunks: int) -> CreditTransfer:
    """Run work over prompts p = c, c + chunks, c + 2·chunks, … for c = 0, 1, …

    So a shard of prompts stays on its device.
    """

    def split(x: Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(join, jax.lax.map(work, jax.tree.map(split, part)))


def _pool(part: Part) -> Part:
    """Make one group of all prompts: trajectory p·G + g, slot p·S + s."""
    steps, success_PxG, advantage_PxG, weight_PxG, theta_PxS, key_P = part
    P, G = success_PxG.shape
    trajectory_PxS = steps.trajectory_PxS + G * jnp.arange(P, dtype=jnp.int32)[:, None]
    steps = dataclasses.replace(steps, trajectory_PxS=trajectory_PxS)
    arrays = (steps, success_PxG, advantage_PxG, weight_PxG, theta_PxS)
    pooled = jax.tree.map(lambda x: x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]), arrays)
    return *pooled, key_P[:1]


def _unpool(result: CreditTransfer, prompts: int) -> CreditTransfer:
    """Split the result of `_pool`'s one group into those of its prompts."""
    # The clusters are the batch's: all of them are counted at prompt 0, so that the sum over P is right.
    clusters_P = jnp.zeros(prompts, jnp.int32).at[0].set(result.clusters_P[0])
    split = {
        field.name: getattr(result, field.name).reshape(prompts, -1)
        for field in dataclasses.fields(result)
        if field.name != "clusters_P"
    }
    return CreditTransfer(**split, clusters_P=clusters_P)


def token_advantages(advantage_PxG: Array, step_advantage_PxS: Array, step_BxT: Array) -> jax.Array:
    """Return advantage_BxT: the step's where step_BxT ≥ 0 (the slot k of the token's step), the trajectory's elsewhere.

    S = G·K, row b = p·G + g. A chain of K selects, since a gather of B·T elements is slow on every accelerator.
    """
    P, G = advantage_PxG.shape
    K = step_advantage_PxS.shape[1] // G
    step_advantage_BxK = step_advantage_PxS.reshape(P * G, K)
    advantage_BxT = jnp.broadcast_to(advantage_PxG.reshape(P * G, 1), step_BxT.shape)
    for k in range(K):
        advantage_BxT = jnp.where(step_BxT == k, step_advantage_BxK[:, k, None], advantage_BxT)
    return advantage_BxT
