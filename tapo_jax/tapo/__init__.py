"""TAPO as a library: encode tool calls, transfer credit from successful trajectories, get advantages per token.

The usual order, host first, then inside one jit:

    steps = encode_steps(groups, steps=K)                                  # calls -> arrays (numpy)
    transfer = transfer_credit(steps, success_PxG, advantage_PxG)          # similarity, clusters, correction
    advantage_BxT = token_advantages(advantage_PxG, transfer.advantage_PxS, step_BxT)
    metrics = diagnostics(transfer, steps.trajectory_PxS, steps.valid_PxS, success_PxG, advantage_PxG)

Needs no model, no config and no trainer.
"""

from tapo_jax.tapo.diagnostics import THRESHOLDS, diagnostic_counts, diagnostics, diagnostics_from_counts
from tapo_jax.tapo.encode import Steps, encode_steps, name_hash, parameter_slots
from tapo_jax.tapo.similarity import pairwise_similarity
from tapo_jax.tapo.transfer import (
    AGGREGATES,
    CLUSTERINGS,
    SCOPES,
    CreditTransfer,
    credit_transfer,
    token_advantages,
    transfer_credit,
)

__all__ = [
    "AGGREGATES",
    "CLUSTERINGS",
    "SCOPES",
    "THRESHOLDS",
    "CreditTransfer",
    "Steps",
    "credit_transfer",
    "diagnostic_counts",
    "diagnostics",
    "diagnostics_from_counts",
    "encode_steps",
    "name_hash",
    "pairwise_similarity",
    "parameter_slots",
    "token_advantages",
    "transfer_credit",
]
