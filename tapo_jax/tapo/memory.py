"""Beyond the paper: witnesses that outlive their step (`config.tapo.memory_steps`, `memory_discount`).

When a question comes again, the successful trajectories that it had in the last N training steps join its group as
extra rollouts, whose step slots are witnesses like the others. One that is a steps old counts with weight discount^a:
as discount^a of a trajectory in sup(C), and with discount^a times the advantage it had in Adv(C) (`credit_transfer`,
weight_PxG). They get no gradient: their slots are cut off again. A group that now has too few
successes to support a call can so be corrected by its own past.

The memory lives on the host and is plain data, a dict that goes into a checkpoint as JSON. `remember` makes a new one.
"""

from collections.abc import Sequence

import jax
import numpy as np

from tapo_jax.tapo.encode import Call
from tapo_jax.types import Identity, Number, Region, Text

# {question id: [{"step": int, "advantage": float, "calls": [[tool, [[kind, fields…], …]], …]}, …]}, newest last
Memory = dict[str, list[dict]]
KINDS = {"region": Region, "text": Text, "identity": Identity, "number": Number}


def remember(
    memory: Memory, step: int, ids: Sequence[str], groups, success_PxG, advantage_PxG, *, steps: int, size: int
) -> Memory:
    """Adds the successful trajectories of this training step (those without a call count in the support of others);
    forgets what is `steps` steps old.

    groups: as for `encode_steps`. size: trajectories kept of one question, the newest ones.
    """
    kept = {name: [entry for entry in entries if step - entry["step"] < steps] for name, entries in memory.items()}
    for p, name in enumerate(ids):
        for g, calls in enumerate(groups[p]):
            if success_PxG[p, g]:
                entry = {
                    "step": step,
                    "advantage": float(advantage_PxG[p, g]),
                    "calls": [_pack(call) for call in calls if call is not None],
                }
                kept[name] = [*kept.get(name, []), entry]
    return {name: entries[-size:] for name, entries in kept.items() if entries}


def recall(memory: Memory, step: int, ids: Sequence[str], groups, *, steps: int, size: int, discount: float):
    """(groups with M = `size` more rollouts each, extra_success_PxM, extra_advantage_PxM, extra_weight_PxM), numpy.

    Always M more, empty and failing where memory has less, so that shapes stay the same. Only earlier steps count.
    """
    extended = []
    success_PxM = np.zeros((len(ids), size), bool)
    advantage_PxM = np.zeros((len(ids), size), np.float32)
    weight_PxM = np.zeros((len(ids), size), np.float32)
    for p, name in enumerate(ids):
        entries = [entry for entry in memory.get(name, []) if 0 < step - entry["step"] <= steps][-size:]
        extra = [[] for _ in range(size)]
        for m, entry in enumerate(entries):
            extra[m] = [_unpack(call) for call in entry["calls"]]
            success_PxM[p, m] = True
            advantage_PxM[p, m] = entry["advantage"]
            weight_PxM[p, m] = discount ** (step - entry["step"])
        extended.append([*groups[p], *extra])
    return extended, success_PxM, advantage_PxM, weight_PxM


def drop_remembered(result, slots: int):
    """A CreditTransfer of the extended groups, cut back to the first `slots` slots: the rollouts that are trained on.
    cluster_PxS and witness_PxS may name a slot beyond them: a remembered witness."""
    return jax.tree.map(lambda x: x[:, :slots] if x.ndim == 2 else x, result)


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
