"""How a batch is cut: into mini-batches by a stride, into micro-batches by length, each no wider than it must be.

Every device keeps the rows that it holds. S shards of the mesh hold n rows of a mini-batch each, k of them in a
micro-batch. A rung is a size that rows may be cut to, (tokens, patches); rungs are ascending, the last holds any row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs

Rungs = Sequence[tuple[int, int]]
PARTS = 8  # micro-batches of a mini-batch where there are widths to choose from, if its rows allow it


def take_piece(tree: Any, pieces: int, index: jax.Array | int) -> Any:
    """Rows index, pieces + index, 2·pieces + index, … of every array: [B, …] -> [B / pieces, …]."""
    if pieces == 1:
        return tree

    def leaf(array_Bx: jax.Array) -> jax.Array:
        split = array_Bx.reshape(array_Bx.shape[0] // pieces, pieces, *array_Bx.shape[1:])
        return jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)

    return jax.tree.map(leaf, tree)


def by_length(inputs: ModelInputs, mesh: Mesh | None, rungs: Rungs) -> jax.Array | None:
    """order_Sxn: every shard's own rows, shortest first (rows of equal length as they stood). None where all
    micro-batches have the same width, so that their order does not matter."""
    if len(rungs) == 1:
        return None
    rows, shards = inputs.token_BxT.shape[0], 1 if mesh is None else sharding.batch_shards(mesh)
    shards = shards if rows % shards == 0 else 1
    return jnp.argsort(jnp.sum(inputs.segment_BxT > 0, axis=1).reshape(shards, -1), axis=1)


def parts(order_Sxn: jax.Array | None, least: int) -> int:
    """Into how many equal parts a mini-batch is cut: `least`, or a multiple of it up to PARTS if that saves padding."""
    if order_Sxn is None:
        return least
    rows = order_Sxn.shape[1]
    return max(count for count in range(least, max(PARTS, least) + 1, least) if rows % count == 0)


def take_rows(tree: Any, row_Sxk: jax.Array) -> Any:
    """Of every array the rows that each shard names among its own: [S·n, …] -> [S·k, …]."""
    shards = row_Sxk.shape[0]
    take = jax.vmap(lambda rows, row_k: rows.at[row_k].get(mode="promise_in_bounds"))

    def leaf(array_Bx: jax.Array) -> jax.Array:
        taken = take(array_Bx.reshape(shards, -1, *array_Bx.shape[1:]), row_Sxk)
        return taken.reshape(-1, *array_Bx.shape[1:])

    return jax.tree.map(leaf, tree)


def micro_batch(rows: Any, order_Sxn: jax.Array | None, count: int, index: jax.Array) -> Any:
    """Micro-batch `index` of `count`: the rows of a mini-batch in their order, cut into equal parts; without an order,
    every count-th row."""
    if order_Sxn is None:
        return take_piece(rows, count, index)
    size = order_Sxn.shape[1] // count
    return take_rows(rows, jax.lax.dynamic_slice_in_dim(order_Sxn, index * size, size, axis=1))


def as_narrow_as_possible(function: Callable, rungs: Rungs, inputs: ModelInputs, rows: Any) -> Any:
    """`function(rows)` with rows cut to the smallest of `rungs`, ascending (tokens, patches), that holds all of them;
    its results must have the same shapes whatever the rung. The last rung holds any row. inputs: those of `rows`."""
    cut = [lambda rows, rung=rung: function(narrow(rows, *rung)) for rung in rungs]
    if len(rungs) == 1:
        return cut[0](rows)
    size = [jnp.max(jnp.sum(inputs.segment_BxT > 0, axis=1)), 0]
    if inputs.patch_image_BxN is not None:
        size[1] = jnp.max(jnp.sum(inputs.patch_image_BxN > 0, axis=1))
    too_small = [(size[0] > tokens) | (size[1] > patches) for tokens, patches in rungs[:-1]]
    return jax.lax.switch(sum(small.astype(jnp.int32) for small in too_small), cut, rows)


def narrow(rows: Any, tokens: int, patches: int) -> Any:
    """The first tokens and patches of every row. Arrays with a patch axis are those of `ModelInputs` named so."""

    def leaf(path: tuple, array: jax.Array) -> jax.Array:
        return array[:, : patches if "_BxN" in sharding.path_name(path) else tokens]

    return jax.tree_util.tree_map_with_path(leaf, rows)


def make_rungs(lengths: Sequence[int], patches: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pairs the two ascending ladders from the top: the largest with the largest, and so on; the smallest of the
    shorter one stands for the rest."""
    count = max(len(lengths), len(patches))
    return tuple((lengths[max(len(lengths) - i, 0)], patches[max(len(patches) - i, 0)]) for i in range(count, 0, -1))
