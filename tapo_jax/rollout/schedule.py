"""Plan one round of the sampler in shapes that are already compiled. Host side, numpy only.

Slots are split into Z row shards of C slots each (Z = 1 on one device); every call works on R ≤ C rows of each shard,
so that no cache entry ever moves between devices. All processes of a pod make the same calls: they agree on a vector
of needs (an elementwise maximum), and the calls follow from the agreed vector alone.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tapo_jax.models.inputs import Row, bucket

WHOLE_WINDOW = 1024  # slots up to this capacity are always processed whole: half of one would save little


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes that calls may have, ascending. Every combination is a program to compile, so there are few of them."""

    extend_rows: tuple[int, ...]
    """R of an extending call."""
    decode_rows: tuple[int, ...]
    """R of a decoding call; the last one is C, the slots of a shard."""
    lengths: tuple[int, ...]
    """T of an extension."""
    patches: tuple[int, ...]
    """N of an extension with images; never more than T image tokens can represent."""
    windows: tuple[int, ...]
    """Cache entries of each slot that a call works on; the last one is the capacity of a slot."""
    chunk: int
    """Max tokens of a decoding call."""
    merge: int
    """Patches along the side of one image token."""
    tokens_per_call: int = 4096
    """Max R·T of one shard; one row always runs, however long."""
    page: int = 0
    """Cache entries of a page; 0: there are no pages, every slot has all its entries."""
    pages: int = 0
    """Pages of a shard that can be given to slots."""

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
        """Return the sizes for the given limits.

        slots: C, slots of a shard.
        capacity: cache entries of a slot.
        chunk: max tokens of a decoding call.
        merge: patches along the side of one image token.
        image_patches: max patches of an image.
        most_patches: max patches of a conversation.
        in_place: decoding reads only the filled entries of the active slots, without copying them. Then a call on
            fewer rows or entries than all would save nothing, and cost a copy of them.
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

    def slot_sizes(self, pieces: int) -> dict[str, Any]:
        """Return the sizes of a shard of slots that is made of `pieces` shards (`slots.init_slots`)."""
        pool = (pieces * (self.pages + 1), self.page) if self.page else None  # page 0 of each piece is nobody's
        return {"slots": pieces * self.slots, "capacity": self.capacity, "pool": pool}

    def width(self, window: int) -> int:
        """Return M, the pages that hold a window of entries."""
        return -(-window // self.page)

    def patches_of(self, length: int) -> tuple[int, ...]:
        """Return the N that go with a T; 0 is an extension without images."""
        return (0, *sorted({min(patches, length * self.merge**2) for patches in self.patches}))

    def rows_of(self, length: int, patches: int) -> tuple[int, ...]:
        tokens = max(length, patches // self.merge**2)
        fitting = tuple(r for r in self.extend_rows if r * tokens <= self.tokens_per_call)
        return fitting or (max(1, min(self.extend_rows[0], self.tokens_per_call // tokens)),)

    def decode_window(self, longest: int) -> int:
        return next((window for window in self.windows if window >= longest + self.chunk), self.capacity)

    def extend_calls(self) -> Iterator["Piece"]:
        """Yield every extension that can occur."""
        for length in self.lengths:
            for patches in self.patches_of(length):
                for rows in self.rows_of(length, patches):
                    yield from (Piece(rows, length, patches, window) for window in self.windows if window >= length)

    def decode_calls(self) -> Iterator[tuple[int, int]]:
        """Yield every (R, window) of a decoding call that can occur."""
        for rows in self.decode_rows:
            for window in self.windows:
                yield rows, window


@dataclasses.dataclass(frozen=True)
class Piece:
    """The shape of one extending call."""

    rows: int
    """R, rows of each shard."""
    length: int
    """T, tokens of a row."""
    patches: int
    """N, patches of a row."""
    window: int
    """Cache entries of each slot that the call works on."""


@dataclasses.dataclass(frozen=True)
class Extension:
    """Tokens to add to a slot of this process."""

    slot: int
    before: int
    """Tokens that the slot already holds."""
    row: Row
    """The tokens to add, with their images."""
    fresh: bool
    """Whether they are an episode's prompt."""
    pages: tuple[int, ...] = ()
    """Pages of the slot, in order, if there are pages."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """A slot of this process whose turn draws more tokens. prompt, sample and turn choose its random key."""

    slot: int
    length: int
    """Tokens in the cache."""
    position: int
    """Position of the next token."""
    allowance: int
    """Max tokens that it may still draw in this turn."""
    drawn: int
    """Tokens that it has already drawn in this turn."""
    prompt: int
    sample: int
    turn: int
    pages: tuple[int, ...] = ()
    """Pages of the slot, in order, if there are pages: also those for what may be drawn."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one rollout are drawn. The random keys come from (seed, step, prompt, sample, turn)."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    seed: int = 0
    step: int = 0
    first_prompt: int = 0
    """Index of this process's first prompt among the prompts of all processes."""
    prompt_keys: tuple[int, ...] = ()
    """The number that stands for each of this process's prompts in the random keys; () are those from first_prompt."""
    top_k: int = 0
    """Of evaluations, like the two below (`drawing.DrawLimits`): tokens that may be drawn; 0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0

    @property
    def limited(self) -> bool:
        """Return whether draws have limits that only evaluations have. They are a program of their own."""
        return bool(self.top_k or self.min_p or self.presence_penalty)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the slots of this process need in a round."""

    extensions: Sequence[Extension] = ()
    """Tokens to add."""
    copies: Sequence[tuple[int, ...]] = ()
    """(source slot, target slot) in one shard: prompts that another slot already holds. With pages also the page to
    copy and its copy, or 0 and 0: all other pages of a prompt are shared."""
    draws: Sequence[Draw] = ()
    """Turns that draw more tokens."""


@dataclasses.dataclass(frozen=True)
class Round:
    """The calls of one round, the same in every process."""

    more: bool = True
    """Whether any process still has episodes to play."""
    wish: int = 0
    """The largest wish of a process (`players.Wish`)."""
    pieces: tuple[Piece, ...] = ()
    """The extending calls."""
    copy_rows: int = 0
    """R of the copying call; 0 means that there is none."""
    decode_rows: int = 0
    """R of the decoding call; 0 means that there is none."""
    decode_window: int = 0
    """Cache entries of each slot that the decoding call works on."""


def plan(
    shapes: Shapes, needs: Needs, *, more: bool, wish: int = 0, agree: Callable[[np.ndarray], np.ndarray]
) -> Round:
    """Return the calls that meet the needs of every process.

    shapes: the shapes that calls may have.
    needs: what the slots of this process need.
    more: whether this process still has episodes.
    wish: what this process wants besides playing on (`players.Wish`).
    agree: elementwise maximum over processes.
    """
    extensions, copies, draws = needs.extensions, needs.copies, needs.draws
    slots = shapes.slots
    kinds = [(length, patches) for length in shapes.lengths for patches in shapes.patches_of(length)]
    rows_K, before_K = np.zeros(len(kinds), np.int64), np.zeros(len(kinds), np.int64)
    for kind, members in group(shapes, extensions).items():
        rows_K[kinds.index(kind)] = most_in_a_shard([extension.slot for extension in members], slots)
        before_K[kinds.index(kind)] = max(extension.before for extension in members)
    head = [
        int(more),
        int(wish),
        most_in_a_shard([target for _, target, *_ in copies], slots),
        most_in_a_shard([draw.slot for draw in draws], slots),
        max((draw.length for draw in draws), default=0),
    ]
    agreed = agree(np.concatenate([np.array(head, np.int64), rows_K, before_K]))
    (more_any, wish, copy_rows, draw_rows, longest), rows_K, before_K = np.split(agreed, [5, 5 + len(kinds)])
    pieces = []
    for (length, patches), rows, before in zip(kinds, rows_K.tolist(), before_K.tolist(), strict=True):
        window = bucket(min(before + length, shapes.capacity), shapes.windows)  # padding past the end is not written
        pieces.extend(Piece(r, length, patches, window) for r in cover(rows, shapes.rows_of(length, patches)))
    return Round(
        more=bool(more_any),
        wish=int(wish),
        pieces=tuple(pieces),
        copy_rows=bucket(int(copy_rows), shapes.decode_rows) if copy_rows else 0,
        decode_rows=bucket(int(draw_rows), shapes.decode_rows) if draw_rows else 0,
        decode_window=shapes.decode_window(int(longest)),
    )


def group(shapes: Shapes, extensions: Sequence[Extension]) -> dict[tuple[int, int], list[Extension]]:
    """Group extensions by the (T, N) that they need."""
    groups: dict[tuple[int, int], list[Extension]] = {}
    for extension in extensions:
        length = bucket(len(extension.row.token_T), shapes.lengths)
        patches = bucket(extension.row.patches, shapes.patches_of(length))
        groups.setdefault((length, patches), []).append(extension)
    return groups


def most_in_a_shard(slots: Sequence[int], slots_per_shard: int) -> int:
    """Return the largest number of the given slots in one shard."""
    return int(np.bincount(np.array(slots, np.int64) // slots_per_shard).max()) if len(slots) else 0


def tables(pages: Sequence[Sequence[int]], index_ZxR: np.ndarray, width: int) -> np.ndarray:
    """Return table_ZxRxM int32, the first M pages of each row of a call, 0 where it has fewer or is empty.

    pages: the pages of each thing that the call works on.
    index_ZxR: which of them each row is (`place`).
    width: M.
    """
    table = np.zeros((len(pages) + 1, width), np.int32)  # the last one is that of empty rows
    for row, owned in zip(table, pages, strict=False):
        row[: len(owned)] = owned[:width]
    return table[index_ZxR]


def cover(rows: int, sizes: Sequence[int]) -> list[int]:
    """Return the sizes of calls that together hold `rows` rows: one call if at most half of it is wasted."""
    calls = []
    while rows > 0:
        fitting = next((size for size in sizes if size >= rows), sizes[-1])
        smaller = max((size for size in sizes if size <= rows), default=sizes[0])
        calls.append(fitting if fitting <= 2 * rows else smaller)
        rows -= calls[-1]
    return calls


def place(slots: Sequence[int], shards: int, slots_per_shard: int, rows: int) -> np.ndarray:
    """Return the slot of each row of a call: index_ZxR into `slots`, -1 for an empty row.

    slots: the slots to work on; the first R of each shard are taken.
    shards: Z.
    slots_per_shard: C.
    rows: R.

    A call on all slots of a shard keeps their own order, so that the cache is used without copying it."""
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
