"""What one round of the sampler does, in shapes that are already compiled. Host side, numpy only.

Slots lie in Z row shards of C slots each (Z = 1 on one device); every call works on R ≤ C rows of each shard, so that
no cache entry ever moves between devices. All processes of a pod make the same calls: they agree on a vector of needs
(an elementwise maximum), and the calls follow from the agreed vector alone.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tapo_jax.models.inputs import Row, bucket

WHOLE_WINDOW = 1024  # a slot of no more places is always worked on as a whole: half of it would save little


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes that calls may have, ascending. Every combination is a program to compile, so there are few of them.

    slots: C, slots of a shard. extend_rows, decode_rows: R of the two kinds of calls; the last of decode_rows is C.
    lengths: T of an extension. patches: N of an extension with images (never more than T tokens can stand for).
    windows: cache places that a call works on; the last one is the capacity of a slot.
    chunk: tokens of a decoding call at most. tokens_per_call: bound on R·T of one shard (one row always runs).
    merge: patches along the side of one image token.
    """

    extend_rows: tuple[int, ...]
    decode_rows: tuple[int, ...]
    lengths: tuple[int, ...]
    patches: tuple[int, ...]
    windows: tuple[int, ...]
    chunk: int
    merge: int
    tokens_per_call: int = 4096

    @classmethod
    def make(
        cls,
        *,
        slots: int,
        capacity: int,
        chunk: int,
        merge: int,
        image_patches: int,
        most_patches: int,
        in_place: bool = False,
    ) -> "Shapes":
        """Ladders for `slots` slots a shard of `capacity` places, images of at most `image_patches` patches and
        conversations of at most `most_patches`.

        in_place: decoding reads only the filled places of the slots that are active, where they lie. Then fewer rows or
        places than all would save nothing, and cost a copy of them.
        """
        lengths = tuple(length for length in (64, 128, 256, 1024, 4096) if length < capacity)
        patches = {size for size in (image_patches, 2 * image_patches) if 2 * size <= most_patches}
        windows = (-(-capacity // 2), capacity) if capacity > WHOLE_WINDOW and not in_place else (capacity,)
        return cls(
            extend_rows=tuple(sorted({min(8, slots), slots})),
            decode_rows=(slots,) if in_place else tuple(sorted({min(8, slots), -(-slots // 2), slots})),
            lengths=(*lengths, capacity),
            patches=(*sorted(patches), most_patches),
            windows=windows,
            chunk=chunk,
            merge=merge,
        )

    @property
    def slots(self) -> int:
        return self.decode_rows[-1]

    @property
    def capacity(self) -> int:
        return self.windows[-1]

    def patches_of(self, length: int) -> tuple[int, ...]:
        """The N that go with a T; 0 is an extension without images."""
        return (0, *sorted({min(patches, length * self.merge**2) for patches in self.patches}))

    def rows_of(self, length: int, patches: int) -> tuple[int, ...]:
        tokens = max(length, patches // self.merge**2)
        fitting = tuple(r for r in self.extend_rows if r * tokens <= self.tokens_per_call)
        return fitting or (max(1, min(self.extend_rows[0], self.tokens_per_call // tokens)),)

    def decode_window(self, longest: int) -> int:
        return next((window for window in self.windows if window >= longest + self.chunk), self.capacity)

    def extend_calls(self) -> Iterator["Piece"]:
        """Every extension that can occur."""
        for length in self.lengths:
            for patches in self.patches_of(length):
                for rows in self.rows_of(length, patches):
                    yield from (Piece(rows, length, patches, window) for window in self.windows if window >= length)

    def decode_calls(self) -> Iterator[tuple[int, int]]:
        """Every (R, window) that can occur."""
        for rows in self.decode_rows:
            for window in self.windows:
                yield rows, window


@dataclasses.dataclass(frozen=True)
class Piece:
    """One extending call: R rows of each shard, T tokens, N patches, cache places."""

    rows: int
    length: int
    patches: int
    window: int


@dataclasses.dataclass(frozen=True)
class Extension:
    """Tokens to add to a slot of this process that holds `before` tokens. fresh: they are an episode's prompt."""

    slot: int
    before: int
    row: Row
    fresh: bool


@dataclasses.dataclass(frozen=True)
class Draw:
    """A slot of this process that goes on writing: `length` tokens in the cache, the next one at `position`; it may
    write `allowance` more, and has written `drawn` in this turn. prompt, sample, turn choose its random key."""

    slot: int
    length: int
    position: int
    allowance: int
    drawn: int
    prompt: int
    sample: int
    turn: int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one rollout are drawn. The random keys come from (seed, step, prompt, sample, turn)."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    step: int = 0
    first_prompt: int = 0
    """The number of this process's first prompt among those of all processes."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the slots of this process need in a round.

    extensions: tokens to add.
    copies: (source slot, target slot) of one shard: prompts that another slot has.
    draws: turns to go on writing.
    """

    extensions: Sequence[Extension] = ()
    copies: Sequence[tuple[int, int]] = ()
    draws: Sequence[Draw] = ()


@dataclasses.dataclass(frozen=True)
class Round:
    """The calls of one round, the same in every process. rows = 0: no such call. more: somebody still has episodes."""

    more: bool = True
    pieces: tuple[Piece, ...] = ()
    copy_rows: int = 0
    decode_rows: int = 0
    decode_window: int = 0


def plan(shapes: Shapes, needs: Needs, *, more: bool, agree: Callable[[np.ndarray], np.ndarray]) -> Round:
    """Return the round of these needs. more: whether this process still has episodes. agree: elementwise maximum over
    processes."""
    extensions, copies, draws = needs.extensions, needs.copies, needs.draws
    slots = shapes.slots
    kinds = [(length, patches) for length in shapes.lengths for patches in shapes.patches_of(length)]
    rows_K, before_K = np.zeros(len(kinds), np.int64), np.zeros(len(kinds), np.int64)
    for kind, members in group(shapes, extensions).items():
        rows_K[kinds.index(kind)] = most_in_a_shard([extension.slot for extension in members], slots)
        before_K[kinds.index(kind)] = max(extension.before for extension in members)
    head = [
        int(more),
        most_in_a_shard([target for _, target in copies], slots),
        most_in_a_shard([draw.slot for draw in draws], slots),
        max((draw.length for draw in draws), default=0),
    ]
    agreed = agree(np.concatenate([np.array(head, np.int64), rows_K, before_K]))
    (more_any, copy_rows, draw_rows, longest), rows_K, before_K = np.split(agreed, [4, 4 + len(kinds)])
    pieces = []
    for (length, patches), rows, before in zip(kinds, rows_K.tolist(), before_K.tolist(), strict=True):
        window = bucket(min(before + length, shapes.capacity), shapes.windows)  # padding past the end is not written
        pieces.extend(Piece(r, length, patches, window) for r in cover(rows, shapes.rows_of(length, patches)))
    return Round(
        more=bool(more_any),
        pieces=tuple(pieces),
        copy_rows=bucket(int(copy_rows), shapes.decode_rows) if copy_rows else 0,
        decode_rows=bucket(int(draw_rows), shapes.decode_rows) if draw_rows else 0,
        decode_window=shapes.decode_window(int(longest)),
    )


def group(shapes: Shapes, extensions: Sequence[Extension]) -> dict[tuple[int, int], list[Extension]]:
    """Extensions by the (T, N) that they need."""
    groups: dict[tuple[int, int], list[Extension]] = {}
    for extension in extensions:
        length = bucket(len(extension.row.token_T), shapes.lengths)
        patches = bucket(extension.row.patches, shapes.patches_of(length))
        groups.setdefault((length, patches), []).append(extension)
    return groups


def most_in_a_shard(slots: Sequence[int], slots_per_shard: int) -> int:
    """How many of the slots are in the shard that has most of them."""
    return int(np.bincount(np.array(slots, np.int64) // slots_per_shard).max()) if len(slots) else 0


def cover(rows: int, sizes: Sequence[int]) -> list[int]:
    """Calls of the given sizes that hold `rows` rows: one call where that wastes at most half of it."""
    calls = []
    while rows > 0:
        fitting = next((size for size in sizes if size >= rows), sizes[-1])
        smaller = max((size for size in sizes if size <= rows), default=sizes[0])
        calls.append(fitting if fitting <= 2 * rows else smaller)
        rows -= calls[-1]
    return calls


def place(slots: Sequence[int], shards: int, slots_per_shard: int, rows: int) -> np.ndarray:
    """Where each slot goes in a call: index_ZxR into `slots`, -1 where a row is empty. Takes from each shard the first
    R.

    A call on all slots of a shard has them in their own order, so that the cache is used where it lies."""
    index_ZxR = np.full((shards, rows), -1, np.int64)
    filled = [0] * shards
    for index, slot in enumerate(slots):
        shard, inside = divmod(slot, slots_per_shard)
        if rows == slots_per_shard:
            index_ZxR[shard, inside] = index
        elif filled[shard] < rows:
            index_ZxR[shard, filled[shard]] = index
            filled[shard] += 1
    return index_ZxR
