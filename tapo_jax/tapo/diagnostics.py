"""Summarise what TAPO found and did in a batch, as scalars.

Counts come first: those of parts of a batch add up, fractions do not.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tapo_jax.tapo.clusters import membership
from tapo_jax.tapo.controls import failing_steps
from tapo_jax.tapo.encode import Array
from tapo_jax.tapo.result import CreditTransfer

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def diagnostic_counts(
    transfer: CreditTransfer,
    trajectory_PxS: Array,
    valid_PxS: Array,
    success_PxG: ArrayLike,
    advantage_PxG: Array,
    thresholds: Sequence[float] = THRESHOLDS,
    judged_PxG: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Return float32 sums over the batch; those of several batches may be added before `diagnostics_from_counts`.

    A failing step is a valid step of a trajectory without success.

    Args:
        transfer: what `transfer` gave for the same arrays.
        trajectory_PxS: int, the slot's rollout.
        valid_PxS: bool, whether the slot holds a step.
        success_PxG: bool.
        advantage_PxG: the base algorithm's.
        thresholds: similarities at which correctable steps are counted too.
        judged_PxG: bool, False if nobody knows whether the rollout succeeded (None: all are known). It is no failing
            rollout; its steps must be invalid.
    """
    success_PxG = jnp.asarray(success_PxG).astype(bool)
    own_PxSxG = membership(trajectory_PxS, success_PxG.shape[1])
    adv_PxS = jnp.where(own_PxSxG, advantage_PxG[:, None, :], 0).sum(axis=2)
    failing_PxS = failing_steps(trajectory_PxS, valid_PxS, success_PxG)
    witness_PxS = jnp.asarray(valid_PxS) & own_PxSxG.any(axis=2) & ~failing_PxS
    witnessed_P = witness_PxS.any(axis=1)
    failed_PxG = ~success_PxG if judged_PxG is None else ~success_PxG & judged_PxG

    def total(x: jax.Array) -> jax.Array:
        return x.sum(dtype=jnp.float32)

    def trajectories(flag_PxS: jax.Array) -> jax.Array:
        return total((own_PxSxG & flag_PxS[:, :, None]).any(axis=1) & ~success_PxG)

    counts = {
        "failing_actions": total(failing_PxS),
        "failing_trajectories": total(failed_PxG),
        "correctable_actions": total(transfer.correctable_PxS),
        "correctable_trajectories": trajectories(transfer.correctable_PxS),
        "corrected_actions": total(transfer.corrected_PxS),
        "compensation": total(jnp.where(transfer.corrected_PxS, transfer.advantage_PxS - adv_PxS, 0)),
        "witnesses": total(witness_PxS),
        "witness_clusters": total(transfer.clusters_P),
        "groups": jnp.asarray(success_PxG.shape[0], jnp.float32),
        "groups_without_witness": total(~witnessed_P),
    }
    for threshold in thresholds:
        near_PxS = failing_PxS & (transfer.cluster_PxS >= 0) & (transfer.sim_PxS >= threshold)
        counts[f"correctable_actions_at_{float(threshold)}"] = total(near_PxS)
        counts[f"correctable_trajectories_at_{float(threshold)}"] = trajectories(near_PxS)
    return counts


def diagnostics_from_counts(counts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return scalars named tapo/…; a fraction of nothing is 0.

    correctable_actions: failing steps with sim ≥ theta / failing steps.
    correctable_trajectories: failing trajectories with such a step / failing trajectories.
    correctable_…_at_t: the same at threshold t.
    corrected_actions: failing steps that passed both gates / failing steps.
    mean_compensation: mean of A(O) - adv over the corrected steps.
    witness_clusters: mean number of clusters of a group that has a witness.
    groups_without_witness: groups without a valid step of a successful trajectory / groups.
    failing_actions, failing_trajectories, witnesses: the counts themselves.
    """

    def ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
        return part / jnp.maximum(whole, 1)

    out = {
        "tapo/corrected_actions": ratio(counts["corrected_actions"], counts["failing_actions"]),
        "tapo/mean_compensation": ratio(counts["compensation"], counts["corrected_actions"]),
        "tapo/witness_clusters": ratio(counts["witness_clusters"], counts["groups"] - counts["groups_without_witness"]),
        "tapo/groups_without_witness": ratio(counts["groups_without_witness"], counts["groups"]),
        "tapo/failing_actions": counts["failing_actions"],
        "tapo/failing_trajectories": counts["failing_trajectories"],
        "tapo/witnesses": counts["witnesses"],
    }
    for name, value in counts.items():
        for unit in ("actions", "trajectories"):
            if name.startswith(f"correctable_{unit}"):
                out[f"tapo/{name}"] = ratio(value, counts[f"failing_{unit}"])
    return out


def diagnostics(
    transfer: CreditTransfer,
    trajectory_PxS: Array,
    valid_PxS: Array,
    success_PxG: ArrayLike,
    advantage_PxG: Array,
    thresholds: Sequence[float] = THRESHOLDS,
    judged_PxG: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Return the metrics of one batch: `diagnostics_from_counts` of `diagnostic_counts`, with its arguments."""
    counts = diagnostic_counts(transfer, trajectory_PxS, valid_PxS, success_PxG, advantage_PxG, thresholds, judged_PxG)
    return diagnostics_from_counts(counts)
