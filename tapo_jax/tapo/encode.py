"""Encode tool calls as fixed-shape arrays, on the host: `encode_steps` fills `Steps`, one row a tool step.

Axes: P prompts, G rollouts, K steps of a rollout at most, S = G·K slots of a group (slot = g·K + k), R regions, X texts
and N numbers of a call at most, F text features.
"""

import dataclasses
import functools
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tapo_jax.types import Identity, Number, Parameter, Region, Text

Array = jax.Array | np.ndarray
Call = tuple[str, tuple[Parameter, ...]]
Groups = Sequence[Sequence[Sequence[Call | None]]]
MAX_COUNT = 255  # a text feature's count is a uint8
NUMBER_BOUND = 1e6  # numbers beyond a million ranges are all the same distance away


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """The tool steps of a batch, ready to be compared. Slots without a step have valid False.

    The arrays are numpy's as `encode_steps` makes them, and JAX's inside jit.

    valid_PxS: bool.
    trajectory_PxS: int32, the rollout g of the slot.
    tool_PxS: int32, hash of the tool's name (`name_hash`).
    identity_PxS: int32, hash of all identity parameters of the call together: they are equal or they are not.
    root_PxSxR: int32, the root image's content hash.
    box_PxSxRx4: float32, (x1, y1, x2, y2) in the root, 0..1.
    text_PxSxXxF: uint8 counts of hashed words and trigrams, or float32 vectors of an embedding.
    text_hash_PxSxX: int32, hash of the normalised text.
    number_PxSxN: float32, the value in units of its schema's range.
    has_region_PxSxR, has_text_PxSxX, has_number_PxSxN: bool, whether the call has such a parameter.
    """

    valid_PxS: Array
    trajectory_PxS: Array
    tool_PxS: Array
    identity_PxS: Array
    root_PxSxR: Array
    box_PxSxRx4: Array
    has_region_PxSxR: Array
    text_PxSxXxF: Array
    text_hash_PxSxX: Array
    has_text_PxSxX: Array
    number_PxSxN: Array
    has_number_PxSxN: Array


def encode_steps(
    groups: Groups,
    *,
    steps: int,
    features: int = 256,
    regions: int | None = None,
    texts: int | None = None,
    numbers: int | None = None,
    embed: Callable[[str], np.ndarray] | None = None,
) -> Steps:
    """Return Steps, of numpy arrays, from the calls of every rollout of every prompt.

    Training passes `parameter_slots(schemas)` for regions, texts and numbers, so that the shapes, and with them the
    compiled program, stay the same.

    Args:
        groups: a list over P of lists over G of lists over at most `steps` = K of (tool name, parameters), or None for
            a turn that is no valid step. All groups have the same G. A call without parameters is compared by its tool
            alone.
        steps: K.
        features: F.
        regions: slots for regions; None takes the most that a call here has.
        texts: slots for texts, likewise.
        numbers: slots for numbers, likewise.
        embed: text -> vector of F floats, in place of the hashed counts (compare with text="cosine").

    Raises ValueError where a rollout has more than K steps, a call has more parameters than slots, groups differ in
    size, or a number's range is empty.
    """
    sizes = {len(group) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"groups have sizes {sorted(sizes)}; every prompt needs the same number of rollouts")
    limits: dict[type, int | None] = {Region: regions, Text: texts, Number: numbers}
    slots = {kind: most_parameters(groups, kind) if limit is None else limit for kind, limit in limits.items()}
    P, S, R, X, N = len(groups), sizes.pop() * steps, slots[Region], slots[Text], slots[Number]
    out = Steps(
        valid_PxS=np.zeros((P, S), bool),
        trajectory_PxS=np.broadcast_to(np.arange(S, dtype=np.int32) // steps, (P, S)).copy(),
        tool_PxS=np.zeros((P, S), np.int32),
        identity_PxS=np.zeros((P, S), np.int32),
        root_PxSxR=np.zeros((P, S, R), np.int32),
        box_PxSxRx4=np.zeros((P, S, R, 4), np.float32),
        has_region_PxSxR=np.zeros((P, S, R), bool),
        text_PxSxXxF=np.zeros((P, S, X, features), np.float32 if embed else np.uint8),
        text_hash_PxSxX=np.zeros((P, S, X), np.int32),
        has_text_PxSxX=np.zeros((P, S, X), bool),
        number_PxSxN=np.zeros((P, S, N), np.float32),
        has_number_PxSxN=np.zeros((P, S, N), bool),
    )
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group):
            if len(rollout) > steps:
                raise ValueError(f"group {p}, rollout {g} has {len(rollout)} steps; room is for {steps}")
            for k, call in enumerate(rollout):
                if call is not None:
                    _write(out, p, g * steps + k, call, slots, features, embed)
    return out


def _write(
    out: Steps,
    p: int,
    s: int,
    call: Call,
    slots: Mapping[type, int],
    features: int,
    embed: Callable[[str], np.ndarray] | None,
) -> None:
    """Write one call into slot s of prompt p of `out`, in place."""
    name, parameters = call
    out.valid_PxS[p, s] = True
    out.tool_PxS[p, s] = name_hash(name)
    used = dict.fromkeys(slots, 0)
    identities = []
    for position, parameter in enumerate(parameters):
        if isinstance(parameter, Identity):
            identities.append((position, parameter.value))
            continue
        kind = type(parameter)
        i, used[kind] = used[kind], used[kind] + 1
        if i >= slots[kind]:
            limit = f"{slots[kind]} {kind.__name__} parameters"
            raise ValueError(f"a call of {name} has more than {limit}; pass more slots")
        if isinstance(parameter, Region):
            out.root_PxSxR[p, s, i] = np.int32(parameter.root)
            out.box_PxSxRx4[p, s, i] = parameter.box
            out.has_region_PxSxR[p, s, i] = True
        elif isinstance(parameter, Text):
            text = normalise(parameter.value)
            out.text_hash_PxSxX[p, s, i] = name_hash(text)
            out.text_PxSxXxF[p, s, i] = embed(text) if embed else text_counts(text, features)
            out.has_text_PxSxX[p, s, i] = True
        else:
            value = range_units(parameter)
            # NaN is not a number to compare: the parameter counts as absent.
            out.has_number_PxSxN[p, s, i] = not np.isnan(value)
            out.number_PxSxN[p, s, i] = np.nan_to_num(value)
    out.identity_PxS[p, s] = name_hash(repr(identities))


def range_units(number: Number) -> float:
    """Return the value as a multiple of its range, in float64: two differ by their distance as a share of the range."""
    if not number.high > number.low:
        raise ValueError(f"a number parameter has the range {number.low}..{number.high}; the schema needs low < high")
    return float(np.clip((number.value - number.low) / (number.high - number.low), -NUMBER_BOUND, NUMBER_BOUND))


def most_parameters(groups: Groups, kind: type) -> int:
    """Return the most parameters of one kind that any call has."""
    calls = (call for group in groups for rollout in group for call in rollout if call is not None)
    return max((sum(type(parameter) is kind for parameter in parameters) for _, parameters in calls), default=0)


def parameter_slots(schemas: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return {"regions", "texts", "numbers"}: the slots that calls of these tools can need.

    They are counted from each property's "x-kind". An image parameter is compared by the region of
    its root that it shows. Raises KeyError for a property without kind.
    """
    kinds = [[prop["x-kind"] for prop in schema["function"]["parameters"]["properties"].values()] for schema in schemas]
    most = {kind: max((row.count(kind) for row in kinds), default=0) for kind in ("region", "image", "text", "number")}
    return {"regions": most["region"] + most["image"], "texts": most["text"], "numbers": most["number"]}


@functools.lru_cache(maxsize=1 << 16)
def name_hash(text: str) -> int:
    """Return a stable int32 of a string (Python's own `hash` differs from process to process)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little", signed=True)


def normalise(text: str) -> str:
    """Return a text in Unicode compatibility form, lower case and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@functools.lru_cache(maxsize=1 << 14)  # the rollouts of a group repeat each other's queries; 4 MiB at 256 features
def text_counts(text: str, features: int) -> np.ndarray:
    """Return uint8 [features]: hashed counts of a normalised text's words and character trigrams.

    Trigrams lie inside a word's bounds (" eiffel " gives " ei", "eif", …, "el "). A text without a letter or digit is
    one word.
    """
    words = re.findall(r"\w+", text) or ([text] if text else [])
    tokens = ["w" + word for word in words]
    for word in words:
        padded = f" {word} "
        tokens.extend(padded[i : i + 3] for i in range(len(padded) - 2))
    bins = [zlib.crc32(token.encode()) % features for token in tokens]
    count_F = np.minimum(np.bincount(bins, minlength=features), MAX_COUNT).astype(np.uint8)
    count_F.flags.writeable = False
    return count_F
