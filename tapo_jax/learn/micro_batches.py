"""Cut a batch into mini-batches by a stride and into micro-batches by length, each no wider than its rows need.

Rows never move between devices. S shards of the mesh hold n rows of a mini-batch each, k of them in a micro-batch. A
bucket is a size (tokens, patches) to which rows may be cropped; buckets are ascending, the last one holds any row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs

Buckets = Sequence[tuple[int, int]]
MICRO_BATCHES = 8  # max micro-batches of a mini-batch if there are several widths


def strided_part(tree: Any, parts: int, index: jax.Array | int) -> Any:
    """Take rows index, parts + index, 2·parts + index, … of every array: [B, …] -> [B / parts, …]."""
    if parts == 1:
        return tree

    def leaf(array_Bx: jax.Array) -> jax.Array:
        split = array_Bx.reshape(array_Bx.shape[0] // parts, parts, *array_Bx.shape[1:])
        return jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)

    return jax.tree.map(leaf, tree)


def by_length(inputs: ModelInputs, mesh: Mesh, buckets: Buckets) -> jax.Array | None:
    """Return order_Sxn: every shard's own rows, shortest first (rows of equal length in their order).

    None if all micro-batches have the same width, so that their order does not matter.
    """
    if len(buckets) == 1:
        return None
    rows, shards = inputs.token_BxT.shape[0], sharding.batch_shards(mesh)
    shards = shards if rows % shards == 0 else 1
    return jnp.argsort(jnp.sum(inputs.segment_BxT > 0, axis=1).reshape(shards, -1), axis=1)


def micro_batch_count(order_Sxn: jax.Array | None, least: int) -> int:
    """Return the number of micro-batches: `least`, or a multiple of it up to MICRO_BATCHES if that saves padding."""
    if order_Sxn is None:
        return least
    rows = order_Sxn.shape[1]
    return max(count for count in range(least, max(MICRO_BATCHES, least) + 1, least) if rows % count == 0)


def take_rows(tree: Any, row_Sxk: jax.Array) -> Any:
    """Take from every array the rows that row_Sxk selects among each shard's own: [S·n, …] -> [S·k, …]."""
    shards = row_Sxk.shape[0]
    take = jax.vmap(lambda rows, row_k: rows.at[row_k].get(mode="promise_in_bounds"))

    def leaf(array_Bx: jax.Array) -> jax.Array:
        taken = take(array_Bx.reshape(shards, -1, *array_Bx.shape[1:]), row_Sxk)
        return taken.reshape(-1, *array_Bx.shape[1:])

    return jax.tree.map(leaf, tree)


def micro_batch(rows: Any, order_Sxn: jax.Array | None, count: int, index: jax.Array) -> Any:
    """Take micro-batch `index` of `count`: an equal part of the ordered rows; without an order, every count-th row."""
    if order_Sxn is None:
        return strided_part(rows, count, index)
    size = order_Sxn.shape[1] // count
    return take_rows(rows, jax.lax.dynamic_slice_in_dim(order_Sxn, index * size, size, axis=1))


def in_smallest_bucket(function: Callable, buckets: Buckets, inputs: ModelInputs, rows: Any) -> Any:
    """Apply a function to rows cropped to the smallest bucket that holds all of them.

    function: its results must have the same shapes for every bucket.
    buckets: ascending (tokens, patches); the last one holds any row.
    inputs: the ModelInputs of `rows`, which decide the bucket.
    rows: what the function gets, cropped.
    """
    cropped = [lambda rows, bucket=bucket: function(crop(rows, *bucket)) for bucket in buckets]
    if len(buckets) == 1:
        return cropped[0](rows)
    size = [jnp.max(jnp.sum(inputs.segment_BxT > 0, axis=1)), 0]
    if inputs.patch_image_BxN is not None:
        size[1] = jnp.max(jnp.sum(inputs.patch_image_BxN > 0, axis=1))
    too_small = [(size[0] > tokens) | (size[1] > patches) for tokens, patches in buckets[:-1]]
    return jax.lax.switch(sum(small.astype(jnp.int32) for small in too_small), cropped, rows)


def crop(rows: Any, tokens: int, patches: int) -> Any:
    """Keep the first tokens and patches of every row; a field's name tells whether it has a patch axis."""

    def leaf(path: tuple, array: jax.Array) -> jax.Array:
        return array[:, : patches if "_BxN" in sharding.path_name(path) else tokens]

    return jax.tree_util.tree_map_with_path(leaf, rows)


def pair_buckets(lengths: Sequence[int], patches: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pair two ascending lists from the top: the largest with the largest, and so on.

    The smallest of the shorter list is repeated.
    """
    count = max(len(lengths), len(patches))
    return tuple((lengths[max(len(lengths) - i, 0)], patches[max(len(patches) - i, 0)]) for i in range(count, 0, -1))
