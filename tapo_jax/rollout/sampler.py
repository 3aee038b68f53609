"""Sample tokens in a fixed set of slots whose KV cache outlives the turn. Knows no tools and no text.

This is the host side: which slots a call works on, in which of a few fixed shapes (`schedule.Shapes`), and what comes
back. The device side is in `slots.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tapo_jax import sharding
from tapo_jax.config import UserError
from tapo_jax.models import qwen3_vl
from tapo_jax.models.attention import decodes_in_place
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.inputs import model_inputs
from tapo_jax.rollout import schedule
from tapo_jax.rollout.drawing import DrawLimits
from tapo_jax.rollout.schedule import Draw, Extension, Needs, Round, Sampling, Shapes
from tapo_jax.rollout.slots import (
    DrawRequest,
    DrawRule,
    SlotState,
    copy_slots,
    decode_slots,
    extend_slots,
    init_seen,
    init_slots,
)
from tapo_jax.rollout.weights import Reshard


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The output of a decoding call, still on the device."""

    drawn: tuple[jax.Array, jax.Array, jax.Array]
    """token_ZxRxN, logp_ZxRxN and count_ZxR of `decode_slots`."""
    index_ZxR: np.ndarray
    """Index of the draw of each row, -1 for an empty row."""
    draws: int
    """Number of draws."""
    own_Z: np.ndarray
    """Which of the shards that this process's devices hold are its own."""

    def is_ready(self) -> bool:
        return self.drawn[0].is_ready()

    def fetch(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Wait for the call; return (token_n, logp_n) of each draw, in the order in which they were given."""
        token_ZxRxN, logp_ZxRxN, count_ZxR = _this_process(self.drawn, self.own_Z)
        found: list = [None] * self.draws
        for (z, r), index in np.ndenumerate(self.index_ZxR):
            if index >= 0:
                count = count_ZxR[z, r]
                found[index] = (token_ZxRxN[z, r, :count], logp_ZxRxN[z, r, :count])
        return found


def _this_process(arrays: tuple[jax.Array, ...], own_Z: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fetch this process's rows, in order, of arrays split along their first axis, in one transfer.

    own_Z: which of the rows that its devices hold these are.
    """
    if all(array.is_fully_addressable for array in arrays):
        return jax.device_get(arrays)
    pieces = []
    for array in arrays:
        by_start = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        pieces.append([by_start[start] for start in sorted(by_start)])
    return tuple(np.concatenate(piece)[own_Z] for piece in jax.device_get(pieces))


def make_shapes(
    config: Qwen3VLConfig,
    mesh: Mesh,
    *,
    slots: int,
    capacity: int,
    chunk: int,
    image_patches: int,
    most_patches: int,
) -> Shapes:
    """Return the shapes that the calls of a sampler may have.

    mesh: where the calls run.
    slots: number of slots over all devices.
    capacity: max tokens of a slot.
    chunk: max tokens of a decoding call.
    image_patches: patches of the largest image (`PixelStore.max_patches`).
    most_patches: max patches of a conversation.

    Raises UserError if the mesh does not divide the slots.
    """
    shards = sharding.batch_shards(sharding.rows_mesh(mesh))
    if slots % shards:
        raise UserError(f"rollout.slots is {slots}, split {shards} ways by the mesh: give a multiple of {shards}.")
    with jax.set_mesh(mesh):
        in_place = decodes_in_place(kv_heads=config.kv_heads, capacity=capacity, head_dim=config.head_dim)
    return Shapes.make(
        slots=slots // shards,
        capacity=capacity,
        chunk=chunk,
        merge=config.vision.merge,
        image_patches=image_patches,
        most_patches=most_patches,
        in_place=in_place,
    )


def with_pages(shapes: Shapes, config: Qwen3VLConfig, mesh: Mesh, page_size: int, pages: int) -> Shapes:
    """Return the shapes for slots whose keys and values lie in pages.

    shapes: those without pages, for the same config and mesh.
    page_size: tokens of a page; 0 returns `shapes`.
    pages: number of pages over all devices; 0: as many as all slots need when they are full.

    Raises UserError if the mesh does not divide the pages, or they do not hold the longest conversation.
    """
    if page_size == 0:
        return shapes
    shards = sharding.batch_shards(sharding.rows_mesh(mesh))
    most = -(-shapes.capacity // page_size)
    if pages % shards:
        raise UserError(f"rollout.pages is {pages}, split {shards} ways by the mesh: give a multiple of {shards}.")
    if pages and pages // shards <= most:
        raise UserError(
            f"rollout.pages is {pages}, {pages // shards} for each of {shards} parts of the slots: a conversation of "
            f"rollout.max_length {shapes.capacity} takes {most} pages of {page_size} tokens, and a shared prompt one "
            f"more; give at least {(most + 1) * shards}."
        )
    with jax.set_mesh(mesh):
        in_place = decodes_in_place(kv_heads=config.kv_heads, capacity=page_size, head_dim=config.head_dim)
    changes: dict[str, Any] = {"page": page_size, "pages": pages // shards or shapes.slots * most + 1}
    if in_place:
        changes |= {"decode_rows": (shapes.slots,), "windows": (shapes.capacity,)}
    return dataclasses.replace(shapes, **changes)


class Sampler:
    """The slots and the calls on them. Weights are given to every call: they change, the shapes do not.

    They are those that `reshard` makes of the trained parameters, once a rollout.

    model: for its structure, config and dtype; its weights are not kept.
    mesh: where the calls run.
    shapes: the shapes that calls may have (`make_shapes`).
    stop_ids: the tokens that end a turn.
    forbidden_V: bool, tokens that are never drawn.
    """

    def __init__(
        self,
        model: qwen3_vl.Qwen3VL,
        mesh: Mesh,
        shapes: Shapes,
        *,
        stop_ids: Sequence[int],
        forbidden_V: np.ndarray,
    ):
        self.config, self.mesh, self.shapes = model.config, mesh, shapes
        self.stop_ids = frozenset(stop_ids)
        self.slots_per_shard = shapes.slots
        self.reshard = Reshard(model, mesh)
        self._rows_mesh = sharding.rows_mesh(mesh)
        self._shards = sharding.batch_shards(self._rows_mesh)
        own_Z, held_Z = (sharding.local_rows(m, self._shards) for m in (self._rows_mesh, mesh))
        self._local_shards, self._own_Z = len(own_Z), np.searchsorted(held_Z, own_Z)
        self.slots = self.slots_per_shard * self._local_shards  # of this process
        self._dtype = model.dtype
        self._state: SlotState | None = None
        self._seen: jax.Array | None = None
        self._constants = sharding.put_replicated(
            {"forbidden_V": np.asarray(forbidden_V, bool), "stop_E": np.array(sorted(self.stop_ids), np.int32)}, mesh
        )

    def plan(self, needs: Needs, *, more: bool, wish: int = 0) -> Round:
        """Return the calls of a round; in a pod every process calls this at the same time."""
        agree = _maximum if self.mesh.is_multi_process else np.asarray
        return schedule.plan(self.shapes, needs, more=more, wish=wish, agree=agree)

    def extend(self, weights: Any, plan: Round, extensions: Sequence[Extension]) -> None:
        """Add given tokens to slots."""
        waiting = schedule.group(self.shapes, extensions)
        for piece in plan.pieces:
            queue = waiting.pop((piece.length, piece.patches), [])
            index_ZxR = self._place([extension.slot for extension in queue], piece.rows)
            rows = [queue[index].row if index >= 0 else None for index in index_ZxR.flat]
            fields = [(self._inside(extension.slot), extension.before, int(extension.fresh)) for extension in queue]
            request_ZxRx3 = np.array([*fields, (self.slots_per_shard, 0, 0)], np.int32)[index_ZxR]
            sizes = {"length": piece.length, "patches": piece.patches}
            table = self._table([extension.pages for extension in queue], index_ZxR, piece.window)
            inputs = model_inputs(rows, **sizes, config=self.config, dtype=self._dtype)
            with jax.set_mesh(self.mesh):
                self._state = extend_slots(
                    self.reshard.graphdef,
                    weights,
                    self._slots(),
                    self._rows(inputs, piece.rows),
                    self._rows(request_ZxRx3, 1),
                    table,
                    window=piece.window,
                )
            used = set(index_ZxR.flat)
            waiting[piece.length, piece.patches] = [extension for i, extension in enumerate(queue) if i not in used]

    def copy(self, plan: Round, copies: Sequence[tuple[int, ...]]) -> None:
        """Give each target slot the prompt of its source slot, in the same shard (`Needs.copies`)."""
        if plan.copy_rows:
            index_ZxR = self._place([target for _, target, *_ in copies], plan.copy_rows)
            fields = [(self._inside(source), self._inside(target)) for source, target, *_ in copies]
            request_ZxRx2 = np.array([*fields, [self.slots_per_shard] * 2], np.int32)[index_ZxR]
            pages = None
            if self.shapes.page:
                pages = np.array([*(pair for _, _, *pair in copies), (0, 0)], np.int32)[index_ZxR]
            with jax.set_mesh(self.mesh):
                self._state = copy_slots(self._slots(), self._rows(request_ZxRx2, 1), self._rows(pages, 1))

    def decode(self, weights: Any, plan: Round, draws: Sequence[Draw], sampling: Sampling) -> Chunk:
        """Start a chunk and do not wait for it."""
        index_ZxR = self._place([draw.slot for draw in draws], plan.decode_rows)
        request = DrawRequest.of(draws, index_ZxR, self.slots_per_shard)
        numbers = {"seed": np.int32(sampling.seed), "step": np.int32(sampling.step)}
        numbers |= {"temperature": np.float32(sampling.temperature), "top_p": np.float32(sampling.top_p)}
        if sampling.limited:
            numbers["limits"] = DrawLimits(
                np.int32(sampling.top_k), np.float32(sampling.min_p), np.float32(sampling.presence_penalty)
            )
        rule = DrawRule(**sharding.put_replicated(numbers, self.mesh), **self._constants)
        table = self._table([draw.pages for draw in draws], index_ZxR, plan.decode_window)
        with jax.set_mesh(self.mesh):
            state, drawn = decode_slots(
                self.reshard.graphdef,
                weights,
                self._with_seen() if sampling.limited else self._slots(),
                self._rows(request, 1),
                rule,
                table,
                window=plan.decode_window,
                chunk=self.shapes.chunk,
            )
        # The other calls get a state without it, so that they are the same programs with and without limits.
        self._seen, self._state = state.seen_ZxCxV, dataclasses.replace(state, seen_ZxCxV=None)
        return Chunk(drawn, index_ZxR, len(draws), self._own_Z)

    def wait(self) -> None:
        """Return when the calls made so far have ended."""
        jax.block_until_ready(self._state)

    def release(self) -> None:
        """Free the memory of the slots, for the updates between two rollouts. The next call begins with empty ones."""
        self._state = self._seen = None

    def get_state(self, most_bytes: int) -> SlotState | None:
        """Return the slots as they are, to be saved; None if they are empty, or larger than this in this process."""
        if self._state is None:
            return None
        pieces = [shard.data.nbytes for leaf in jax.tree.leaves(self._state) for shard in leaf.addressable_shards]
        return self._state if sum(pieces) <= most_bytes else None

    def set_state(self, state: SlotState) -> None:
        """Go on with slots that `get_state` returned; their buffers are donated to the next call."""
        self._state = state

    def abstract_state(self) -> SlotState:
        """Return the shapes, dtypes and layouts of the slots."""
        with jax.set_mesh(self.mesh):
            state = self._slots()
        self.release()
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)

    def warm_up(self, params: Any) -> None:
        """Compile every call that can occur, by running each on empty rows.

        params: the trained parameters.
        """
        weights = self.reshard(params)
        for piece in self.shapes.extend_calls():
            self.extend(weights, Round(pieces=(piece,)), [])
        for rows in self.shapes.decode_rows:
            self.copy(Round(copy_rows=rows), [])
        for rows, window in self.shapes.decode_calls():
            self.decode(weights, Round(decode_rows=rows, decode_window=window), [], Sampling())
        self.wait()

    def _slots(self) -> SlotState:
        """Return the state, making empty slots if there are none. Call inside `jax.set_mesh`."""
        if self._state is None:
            shards = sharding.batch_shards(self.mesh)
            sizes = self.shapes.slot_sizes(self._shards // shards)
            self._state = init_slots(self.config, shards, dtype=self._dtype, **sizes)
        return self._state

    def _with_seen(self) -> SlotState:
        """Return the state with the tokens of the open turns. Call inside `jax.set_mesh`."""
        state = self._slots()
        if self._seen is None:
            self._seen = init_seen(*state.hidden_ZxCxD.shape[:2], self.config.vocab)
        return dataclasses.replace(state, seen_ZxCxV=self._seen)

    def _inside(self, slot: int) -> int:
        return slot % self.slots_per_shard

    def _table(self, pages: Sequence[Sequence[int]], index_ZxR: np.ndarray, window: int) -> jax.Array | None:
        """Return the table of the pages of a call's rows on the devices; None without pages."""
        if not self.shapes.page:
            return None
        return self._rows(schedule.tables(pages, index_ZxR, self.shapes.width(window)), 1)

    def _place(self, slots: Sequence[int], rows: int) -> np.ndarray:
        return schedule.place(slots, self._local_shards, self.slots_per_shard, rows)

    def _rows(self, tree: Any, rows_per_shard: int) -> Any:
        """Put host arrays of this process's rows on the devices, split over the row shards."""
        return sharding.put_rows(tree, self._rows_mesh, self._shards * rows_per_shard)


def _maximum(vector: np.ndarray) -> np.ndarray:
    return multihost_utils.process_allgather(vector.astype(np.int32)).max(axis=0)
