"""Beyond the paper: witnesses that outlive their step (`config.tapo.memory_steps`, `memory_discount`).

When a question comes again, the successful trajectories that it had in the last N training steps join its group as
extra rollouts, whose step slots are witnesses like the others. One that is a steps old counts with weight discount^a:
as discount^a of a trajectory in sup(C), and with discount^a times the advantage it had in Adv(C) (`transfer`,
weight_PxG). They get no gradient: their slots are cut off again. A group that now has too few
successes to support a call can so be corrected by its own past.

The memory lives on the host and is plain data, a dict that goes into a checkpoint as JSON. `remember` makes a new one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tapo_jax.tapo.encode import Call, Groups
from tapo_jax.tapo.result import CreditTransfer
from tapo_jax.types import Identity, Number, Parameter, Region, Text


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long a successful rollout stays a witness for its question."""

    steps: int = 0
    """Training steps that it is remembered; 0: not at all."""
    size: int = 4
    """Rollouts of one question that are remembered, the newest."""
    discount: float = 0.9
    """The factor of a rollout's weight for each step of its age."""

    @property
    def rollouts(self) -> int:
        """Return M, the rollouts that join every group."""
        return self.size if self.steps else 0


# {question id: [{"step": int, "advantage": float, "calls": [[tool, [[kind, fields…], …]], …]}, …]}, newest last
Memory = dict[str, list[dict[str, Any]]]


def remember(
    memory: Memory,
    step: int,
    ids: Sequence[str],
    groups: Groups,
    success_PxG: np.ndarray,
    advantage_PxG: np.ndarray,
    settings: Settings,
) -> Memory:
    """Add the successful trajectories of this training step, and forget those that are too old.

    Trajectories without a call count in the support of others.

    Args:
        memory: before this step; it is not changed.
        step: the number of this training step.
        ids: of the P questions.
        groups: their rollouts' calls, as for `encode_steps`.
        success_PxG: bool.
        advantage_PxG: of the trajectories.
        settings: how long and how many are remembered.
    """
    fresh = lambda entry: step - entry["step"] < settings.steps  # noqa: E731
    kept = {name: list(filter(fresh, entries)) for name, entries in memory.items()}
    for p, name in enumerate(ids):
        for g, calls in enumerate(groups[p]):
            if success_PxG[p, g]:
                entry = {
                    "step": step,
                    "advantage": float(advantage_PxG[p, g]),
                    "calls": [_pack(call) for call in calls if call is not None],
                }
                kept[name] = [*kept.get(name, []), entry]
    return {name: entries[-settings.rollouts :] for name, entries in kept.items() if entries}


def recall(
    memory: Memory, step: int, ids: Sequence[str], groups: Groups, settings: Settings
) -> tuple[list[list[Sequence[Call | None]]], np.ndarray, np.ndarray, np.ndarray]:
    """Return (groups with M more rollouts each, success_PxM, advantage_PxM, weight_PxM), numpy.

    Always M more, empty and failing where memory has less, so that shapes stay the same. Only earlier steps count.

    Args:
        memory: from `remember`.
        step: the number of this training step.
        ids: of the P questions.
        groups: their rollouts' calls, as for `encode_steps`.
        settings: how long and how many are remembered, and the discount.
    """
    size = settings.rollouts
    extended = []
    success_PxM = np.zeros((len(ids), size), bool)
    advantage_PxM = np.zeros((len(ids), size), np.float32)
    weight_PxM = np.zeros((len(ids), size), np.float32)
    for p, name in enumerate(ids):
        entries = [entry for entry in memory.get(name, []) if 0 < step - entry["step"] <= settings.steps]
        entries = entries[len(entries) - min(size, len(entries)) :]
        extra: list[list[Call]] = [[] for _ in range(size)]
        for m, entry in enumerate(entries):
            extra[m] = [_unpack(call) for call in entry["calls"]]
            success_PxM[p, m] = True
            advantage_PxM[p, m] = entry["advantage"]
            weight_PxM[p, m] = settings.discount ** (step - entry["step"])
        extended.append([*groups[p], *extra])
    return extended, success_PxM, advantage_PxM, weight_PxM


def drop_remembered(result: CreditTransfer, width: int) -> CreditTransfer:
    """Cut a result of the extended groups back to the first `width` steps: the rollouts that are trained on.

    cluster_PxS and witness_PxS may name a step beyond them: a remembered witness.
    """
    return jax.tree.map(lambda x: x[:, :width] if x.ndim == 2 else x, result)


def _pack(call: Call) -> list[Any]:
    """Return a call as plain lists, for JSON."""
    name, parameters = call
    return [name, [_pack_parameter(parameter) for parameter in parameters]]


def _pack_parameter(parameter: Parameter) -> list[Any]:
    if isinstance(parameter, Region):
        return ["region", int(parameter.root), [float(x) for x in parameter.box]]
    if isinstance(parameter, Number):
        return ["number", float(parameter.value), float(parameter.low), float(parameter.high)]
    return ["text" if isinstance(parameter, Text) else "identity", parameter.value]


def _unpack(call: list[Any]) -> Call:
    """Return the call that `_pack` made plain."""
    name, packed = call
    return name, tuple(_unpack_parameter(*fields) for fields in packed)


def _unpack_parameter(kind: str, *fields: Any) -> Parameter:
    if kind == "region":
        return Region(fields[0], tuple(fields[1]))
    return {"text": Text, "identity": Identity, "number": Number}[kind](*fields)
