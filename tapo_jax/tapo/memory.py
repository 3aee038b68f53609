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

import jax
import numpy as np

from tapo_jax.tapo.encode import Call
from tapo_jax.tapo.transfer import CreditTransfer
from tapo_jax.types import Identity, Number, Region, Text


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
        """M, the rollouts that join every group."""
        return self.size if self.steps else 0


# {question id: [{"step": int, "advantage": float, "calls": [[tool, [[kind, fields…], …]], …]}, …]}, newest last
Memory = dict[str, list[dict]]
Groups = Sequence[Sequence[Sequence[Call | None]]]
KINDS = {"region": Region, "text": Text, "identity": Identity, "number": Number}


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

    Trajectories without a call count in the support of others. groups: as for `encode_steps`.
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
) -> tuple[list, np.ndarray, np.ndarray, np.ndarray]:
    """Return (groups with M more rollouts each, success_PxM, advantage_PxM, weight_PxM), numpy.

    Always M more, empty and failing where memory has less, so that shapes stay the same. Only earlier steps count.
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


def _pack(call: Call) -> list:
    name, parameters = call
    packed = []
    for parameter in parameters:
        kind = next(kind for kind, cls in KINDS.items() if type(parameter) is cls)
        if kind == "region":
            packed.append([kind, int(parameter.root), [float(x) for x in parameter.box]])
        elif kind == "number":
            packed.append([kind, float(parameter.value), float(parameter.low), float(parameter.high)])
        else:
            packed.append([kind, parameter.value])
    return [name, packed]


def _unpack(call: list) -> Call:
    name, packed = call
    parameters = []
    for kind, *fields in packed:
        parameters.append(Region(fields[0], tuple(fields[1])) if kind == "region" else KINDS[kind](*fields))
    return name, tuple(parameters)
