"""TAPO as a library: encode tool calls, transfer credit from successful trajectories, get advantages per token.

The usual order, host first, then inside one jit:

    steps = encode_steps(groups, steps=K)                                  # calls -> arrays (numpy)
    result = transfer(steps, success_PxG, advantage_PxG, Settings())       # similarity, clusters, correction
    advantage_BxT = token_advantages(advantage_PxG, result.advantage_PxS, step_BxT)
    metrics = diagnostics(result, steps.trajectory_PxS, steps.valid_PxS, success_PxG, advantage_PxG)

Needs no model, no config and no trainer.
"""

from tapo_jax.tapo.diagnostics import THRESHOLDS, diagnostic_counts, diagnostics, diagnostics_from_counts
from tapo_jax.tapo.encode import Steps, encode_steps, name_hash, parameter_slots
from tapo_jax.tapo.settings import AGGREGATES, CLUSTERINGS, PUBLISHED, SCOPES, Settings
from tapo_jax.tapo.similarity import pairwise_similarity
from tapo_jax.tapo.transfer import CreditTransfer, token_advantages, transfer, transfer_from_similarity

__all__ = [
    "AGGREGATES",
    "CLUSTERINGS",
    "PUBLISHED",
    "SCOPES",
    "THRESHOLDS",
    "CreditTransfer",
    "Settings",
    "Steps",
    "diagnostic_counts",
    "diagnostics",
    "diagnostics_from_counts",
    "encode_steps",
    "name_hash",
    "pairwise_similarity",
    "parameter_slots",
    "token_advantages",
    "transfer",
    "transfer_from_similarity",
]
