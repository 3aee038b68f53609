"""Token sampling over a fixed set of slots whose KV cache outlives the turn. Knows no tools and no text.

The host side: which slots a call works on, in which of a few fixed shapes (`schedule.Shapes`), and what comes back. The
device side is in `slots.py`.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tapo_jax import sharding
from tapo_jax.config import UserError
from tapo_jax.models import qwen3_vl
from tapo_jax.models.attention import decodes_in_place
from tapo_jax.models.inputs import model_inputs
from tapo_jax.rollout import schedule
from tapo_jax.rollout.schedule import Draw, Extension, Round, Shapes
from tapo_jax.rollout.slots import SlotState, copy_slots, decode_slots, extend_slots, init_slots


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a decoding call wrote, still on the device. index_ZxR: the draw of each row, -1 where the row is empty."""

    drawn: tuple[jax.Array, jax.Array, jax.Array]
    index_ZxR: np.ndarray
    draws: int

    def is_ready(self) -> bool:
        return self.drawn[0].is_ready()

    def fetch(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Waits. (token_n, logp_n) of each draw, in the order in which they were given."""
        token_ZxRxN, logp_ZxRxN, count_ZxR = _this_process(self.drawn)
        found: list = [None] * self.draws
        for (z, r), index in np.ndenumerate(self.index_ZxR):
            if index >= 0:
                count = count_ZxR[z, r]
                found[index] = (token_ZxRxN[z, r, :count], logp_ZxRxN[z, r, :count])
        return found


def _this_process(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """The rows that this process holds, in order, of arrays split along their first axis. One transfer."""
    if all(array.is_fully_addressable for array in arrays):
        return jax.device_get(arrays)
    pieces = []
    for array in arrays:
        by_start = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        pieces.append([by_start[start] for start in sorted(by_start)])
    return tuple(np.concatenate(piece) for piece in jax.device_get(pieces))


class Sampler:
    """The slots and the calls on them. Weights are given to every call: they change, the shapes do not.

    model: for its structure, config and dtype; its weights are not kept. slots: over all devices; capacity: places of a
    slot; chunk: tokens of a decoding call at most; image_patches: patches of the largest image
    (`PixelStore.max_patches`); most_patches: of a conversation. stop_ids: the tokens that end a turn. forbidden_V:
    bool, tokens that are never drawn. mesh: None is one device. shapes: the shapes that calls may have; None makes
    ladders from the arguments above. Raises UserError where the mesh does not divide the slots.
    """

    def __init__(
        self,
        model: qwen3_vl.Qwen3VL,
        *,
        slots: int,
        capacity: int,
        chunk: int,
        image_patches: int,
        stop_ids: Sequence[int],
        forbidden_V: np.ndarray,
        most_patches: int,
        mesh: Mesh | None = None,
        shapes: Shapes | None = None,
    ):
        self.config = model.config
        self.mesh = mesh
        self.stop_ids = frozenset(stop_ids)
        self._graphdef = nnx.graphdef(model)
        self._shards = 1 if mesh is None else sharding.batch_shards(mesh)
        if slots % self._shards:
            raise UserError(
                f"rollout.slots is {slots}, split {self._shards} ways by the mesh: give a multiple of {self._shards}."
            )
        self.slots_per_shard = slots // self._shards
        self._local_shards = 1 if mesh is None else len(sharding.local_rows(mesh, self._shards))
        self.slots = self.slots_per_shard * self._local_shards  # of this process
        self.shapes = shapes or Shapes.make(
            slots=self.slots_per_shard,
            capacity=capacity,
            chunk=chunk,
            merge=self.config.vision.merge,
            image_patches=image_patches,
            most_patches=most_patches,
            in_place=self._in_place(capacity),
        )
        self._dtype = model.dtype
        self._state: SlotState | None = None
        self._constants = self._everywhere((np.asarray(forbidden_V, bool), np.array(sorted(self.stop_ids), np.int32)))

    def plan(
        self, extensions: Sequence[Extension], copies: Sequence[tuple[int, int]], draws: Sequence[Draw], *, more: bool
    ) -> Round:
        """The calls of a round; in a pod every process calls this at the same time."""
        together = self.mesh is not None and self.mesh.is_multi_process
        return schedule.plan(
            self.shapes, extensions, copies, draws, more=more, agree=_maximum if together else np.asarray
        )

    def extend(self, params: Any, plan: Round, extensions: Sequence[Extension]) -> None:
        waiting = schedule.group(self.shapes, extensions)
        for piece in plan.pieces:
            queue = waiting.pop((piece.length, piece.patches), [])
            index_ZxR = self._place([extension.slot for extension in queue], piece.rows)
            rows = [queue[index].row if index >= 0 else None for index in index_ZxR.flat]
            fields = [(self._inside(extension.slot), extension.before, int(extension.fresh)) for extension in queue]
            sizes = {"length": piece.length, "patches": piece.patches}
            inputs = model_inputs(rows, **sizes, config=self.config, dtype=self._dtype)
            with self._on_mesh():
                self._state = extend_slots(
                    self._graphdef,
                    params,
                    self._slots(),
                    self._rows(inputs, piece.rows),
                    self._rows(self._request(fields, index_ZxR, 3), 1),
                    window=piece.window,
                )
            used = set(index_ZxR.flat)
            waiting[piece.length, piece.patches] = [extension for i, extension in enumerate(queue) if i not in used]

    def copy(self, plan: Round, copies: Sequence[tuple[int, int]]) -> None:
        """Gives each target slot the prompt of its source slot, in the same shard."""
        if plan.copy_rows:
            index_ZxR = self._place([target for _, target in copies], plan.copy_rows)
            fields = [(self._inside(source), self._inside(target)) for source, target in copies]
            with self._on_mesh():
                self._state = copy_slots(self._slots(), self._rows(self._request(fields, index_ZxR, 2), 1))

    def decode(
        self, params: Any, plan: Round, draws: Sequence[Draw], *, temperature: float, top_p: float, seed: int, step: int
    ) -> Chunk:
        """Starts a chunk and does not wait for it."""
        index_ZxR = self._place([draw.slot for draw in draws], plan.decode_rows)
        fields = [(self._inside(draw.slot), *dataclasses.astuple(draw)[1:]) for draw in draws]
        numbers = (np.array([seed, step], np.int32), np.array([temperature, top_p], np.float32))
        with self._on_mesh():
            self._state, drawn = decode_slots(
                self._graphdef,
                params,
                self._slots(),
                self._rows(self._request(fields, index_ZxR, 8), 1),
                *self._everywhere(numbers),
                *self._constants,
                window=plan.decode_window,
                chunk=self.shapes.chunk,
            )
        return Chunk(drawn, index_ZxR, len(draws))

    def wait(self) -> None:
        """Until the calls made so far have ended."""
        jax.block_until_ready(self._state)

    def release(self) -> None:
        """Frees the memory of the slots, for the updates between two rollouts. The next call begins with empty ones."""
        self._state = None

    def warm_up(self, params: Any) -> None:
        """Compiles every call that can occur, by running each on empty rows."""
        for piece in self.shapes.extend_calls():
            self.extend(params, Round(pieces=(piece,)), [])
        for rows in self.shapes.decode_rows:
            self.copy(Round(copy_rows=rows), [])
        for rows, window in self.shapes.decode_calls():
            plan = Round(decode_rows=rows, decode_window=window)
            self.decode(params, plan, [], temperature=1.0, top_p=1.0, seed=0, step=0)
        self.wait()

    def _slots(self) -> SlotState:
        """Call inside `_on_mesh`."""
        if self._state is None:
            sizes = (self._shards, self.slots_per_shard, self.shapes.capacity)
            self._state = init_slots(self.config, *sizes, self._dtype)
        return self._state

    def _in_place(self, capacity: int) -> bool:
        config = self.config
        with self._on_mesh():
            return decodes_in_place(kv_heads=config.kv_heads, capacity=capacity, head_dim=config.head_dim)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _inside(self, slot: int) -> int:
        return slot % self.slots_per_shard

    def _place(self, slots: Sequence[int], rows: int) -> np.ndarray:
        return schedule.place(slots, self._local_shards, self.slots_per_shard, rows)

    def _request(self, fields: Sequence[tuple[int, ...]], index_ZxR: np.ndarray, width: int) -> np.ndarray:
        """int32 [Z, R, width]: the fields of the row's entry; an empty row has slot C (in a copy, twice) and zeros."""
        empty = [self.slots_per_shard] * 2 if width == 2 else [self.slots_per_shard] + [0] * (width - 1)
        table = np.array([*fields, empty], np.int32)
        return table[index_ZxR]

    def _rows(self, tree: Any, rows_per_shard: int) -> Any:
        """Host arrays of this process's rows -> device, split over the row shards."""
        if self.mesh is None:
            return jax.device_put(tree)
        return sharding.put_rows(tree, self.mesh, self._shards * rows_per_shard)

    def _everywhere(self, tree: Any) -> Any:
        return jax.device_put(tree) if self.mesh is None else sharding.put_replicated(tree, self.mesh)


def _maximum(vector: np.ndarray) -> np.ndarray:
    return multihost_utils.process_allgather(vector.astype(np.int32)).max(axis=0)
