"""What one round of the sampler does, in shapes that are already compiled. Host side, numpy only.

Slots lie in Z row shards of C slots each (Z = 1 on one device); every call works on R ≤ C rows of each shard, so that no
cache entry ever moves between devices. All processes of a pod make the same calls: they agree on a vector of needs (an
elementwise maximum), and the calls follow from the agreed vector alone.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tapo_jax.inputs import Row, bucket, ladder


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes that calls may have, ascending.

    rows: R; the last one is C, all slots of a shard. lengths: T of an extension. patches: N of an extension with images.
    windows: cache places that a call reads; the last one is the capacity of a slot.
    chunk: tokens of a decoding call at most. tokens_per_call: bound on R·T of one shard (at least the fewest rows run).
    merge: patches along the side of one image token.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    patches: tuple[int, ...]
    windows: tuple[int, ...]
    chunk: int
    merge: int
    tokens_per_call: int = 4096

    @classmethod
    def make(cls, *, slots: int, capacity: int, chunk: int, merge: int, patches: Sequence[int] = ()) -> "Shapes":
        """Ladders for `slots` slots a shard of `capacity` places. Without `patches` a row may have any that its tokens allow."""
        lengths = ladder(capacity, smallest=min(64, capacity), factor=4)
        return cls(
            rows=ladder(slots, smallest=min(4, slots), factor=4),
            lengths=lengths,
            patches=tuple(patches) or tuple(length * merge**2 for length in lengths[-2:]),
            windows=ladder(capacity, smallest=max(capacity // 4, min(256, capacity)), factor=2),
            chunk=chunk,
            merge=merge,
        )

    @property
    def capacity(self) -> int:
        return self.windows[-1]

    def extend_rows(self, length: int, patches: int) -> tuple[int, ...]:
        tokens = max(length, patches // self.merge**2)
        return tuple(r for r in self.rows if r * tokens <= self.tokens_per_call) or self.rows[:1]

    def extend_window(self, before: int, length: int) -> int:
        """Places for an extension of T = `length` behind `before`: the padding of T is written too, past the capacity if need be."""
        wanted = before + length
        return next((window for window in self.windows if window >= wanted), self.capacity + length)

    def decode_window(self, longest: int) -> int:
        return next((window for window in self.windows if window >= longest + self.chunk), self.capacity)

    def extend_calls(self) -> Iterator[tuple[int, int, int, int]]:
        """Every (R, T, N, window) that can occur."""
        for length in self.lengths:
            smaller = (0, *self.patches)
            for n, patches in enumerate((0, *self.patches)):
                if n and smaller[n - 1] >= length * self.merge**2:
                    continue  # so many patches need more placeholders than T
                for rows in self.extend_rows(length, patches):
                    for window in (*(w for w in self.windows if w >= length), self.capacity + length):
                        yield rows, length, patches, window

    def decode_calls(self) -> Iterator[tuple[int, int]]:
        """Every (R, window) that can occur."""
        for rows in self.rows:
            for window in self.windows:
                yield rows, window


@dataclasses.dataclass(frozen=True)
class Extension:
    """Tokens to add to a slot of this process that holds `before` tokens. fresh: they are an episode's prompt."""

    slot: int
    before: int
    row: Row
    fresh: bool


@dataclasses.dataclass(frozen=True)
class Draw:
    """A slot of this process that goes on writing: `length` tokens in the cache, the next one at `position`; it may write
    `allowance` more, and has written `drawn` in this turn. prompt, sample, turn choose its random key."""

    slot: int
    length: int
    position: int
    allowance: int
    drawn: int
    prompt: int
    sample: int
    turn: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """One extending call: R rows of each shard, T tokens, N patches, cache places."""

    rows: int
    length: int
    patches: int
    window: int


@dataclasses.dataclass(frozen=True)
class Round:
    """The calls of one round, the same in every process. rows = 0: no such call. more: somebody still has episodes."""

    more: bool = True
    pieces: tuple[Piece, ...] = ()
    copy_rows: int = 0
    decode_rows: int = 0
    decode_window: int = 0


def plan(
    shapes: Shapes,
    extensions: Sequence[Extension],
    copies: Sequence[tuple[int, int]],
    draws: Sequence[Draw],
    *,
    more: bool,
    agree: Callable[[np.ndarray], np.ndarray],
) -> Round:
    """The round of these needs. copies: (source slot, target slot) of one shard. agree: elementwise maximum over processes."""
    slots = shapes.rows[-1]
    kinds = [(length, patches) for length in shapes.lengths for patches in (0, *shapes.patches)]
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
        window = shapes.extend_window(before, length)
        pieces.extend(Piece(r, length, patches, window) for r in cover(rows, shapes.extend_rows(length, patches)))
    return Round(
        more=bool(more_any),
        pieces=tuple(pieces),
        copy_rows=bucket(int(copy_rows), shapes.rows) if copy_rows else 0,
        decode_rows=bucket(int(draw_rows), shapes.rows) if draw_rows else 0,
        decode_window=shapes.decode_window(int(longest)),
    )


def group(shapes: Shapes, extensions: Sequence[Extension]) -> dict[tuple[int, int], list[Extension]]:
    """Extensions by the (T, N) that they need."""
    groups: dict[tuple[int, int], list[Extension]] = {}
    for extension in extensions:
        patches = extension.row.patches and bucket(extension.row.patches, shapes.patches)
        groups.setdefault((bucket(len(extension.row.token_T), shapes.lengths), patches), []).append(extension)
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
    """Where each slot goes in a call: index_ZxR into `slots`, -1 where a row is empty. Takes from each shard the first R.

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
