"""The result of TAPO. Axes: P prompts, S step slots of a group."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CreditTransfer:
    """What TAPO decided about every step slot O, C* being the cluster of witnesses that it is most similar to.

    advantage_PxS: corrected; the trajectory's own advantage where not corrected, 0 where the slot has no trajectory.
    corrected_PxS: bool, both gates passed.
    correctable_PxS: bool, valid step of a failing trajectory with sim ≥ theta.
    sim_PxS: sim(O, C*), 0 where there is no witness.
    support_PxS: sup(C*), 0 where there is no witness.
    cluster_PxS: int32, C* named by the lowest slot of its members, -1 where there is no witness. A witness's C* is its
        own cluster.
    witness_PxS: int32, the slot of the member of C* that O is most similar to, -1 likewise.
    clusters_P: int32, the number of clusters of the group.
    """

    advantage_PxS: jax.Array
    corrected_PxS: jax.Array
    correctable_PxS: jax.Array
    sim_PxS: jax.Array
    support_PxS: jax.Array
    cluster_PxS: jax.Array
    witness_PxS: jax.Array
    clusters_P: jax.Array
