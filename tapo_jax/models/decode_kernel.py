"""Decode on TPU in place: write the new token's keys and values into the cache, and attend without copying it.

The compiler alone would keep the cache in one layout for writing and copy every layer to another for reading. These
two Pallas kernels work on the cache as it is, [L, B, K, S, A], and read only the entries that a slot has filled.
Axes: L layers, B slots, K key/value heads, G query heads of each, S entries of a slot, A head dimension.

With a table (`models/pages.py`) the cache is a pool of pages, [L, N, K, P, A], and slot b has the pages of row b. Only
the kernels' index maps differ. JAX has kernels for pages, `paged_attention` and `ragged_paged_attention`; theirs have
no axis of layers, so that a scan over layers would copy the pool's layers out and in.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tapo_jax import sharding
from tapo_jax.models.layers import MASKED
from tapo_jax.models.pages import page_of

BLOCKS = (512, 256, 128)
ROWS = 16  # rows of the smallest tile of a 16-bit array
QUERIES = 8  # min query rows of a head: the rows of a float32 tile
WRITE, ATTEND = "cache_write", "cache_attend"  # names that identify the kernels in a compiled program
WRITE_PAGES, ATTEND_PAGES = "page_write", "page_attend"
_CACHE = (None, "batch", "kv_heads", None, None)


def suits(kv_heads: int, capacity: int, head_dim: int) -> bool:
    """Return whether the kernels take such a cache: whole blocks of entries, whole lanes, heads split by the mesh.

    capacity: entries of a slot, or of a page."""
    return capacity % BLOCKS[-1] == 0 and head_dim % 128 == 0 and kv_heads % sharding.pieces("kv_heads") == 0


def write(
    cache_LxBxKxSxA: jax.Array,
    new_BxKxA: jax.Array,
    layer: jax.Array,
    place_B: jax.Array,
    active_B: jax.Array,
    table_BxM: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Write new_BxKxA at (layer, b, :, place_B[b]) of every active slot b.

    Returns the cache; it is changed in place if it is donated."""
    layer_B = jnp.broadcast_to(jnp.asarray(layer, jnp.int32), place_B.shape)
    axes = (_CACHE, ("batch", "kv_heads", None), ("batch",), ("batch",), ("batch",))
    arrays = (cache_LxBxKxSxA, new_BxKxA, layer_B, place_B, active_B.astype(jnp.int32))
    if table_BxM is not None:
        axes, arrays = (*axes, ("batch", None)), (*arrays, table_BxM)
    return sharding.on_shards(functools.partial(_write, interpret=interpret), axes, *arrays)


def attend(
    q_BxHxA: jax.Array,
    k_LxBxKxSxA: jax.Array,
    v_LxBxKxSxA: jax.Array,
    layer: jax.Array,
    length_B: jax.Array,
    table_BxM: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend with one query for each slot over the first length_B entries of a layer.

    Returns [B, H, A] in the dtype of q; 0 for a slot of length 0."""
    layer_B = jnp.broadcast_to(jnp.asarray(layer, jnp.int32), length_B.shape)
    axes = (("batch", "heads", None), _CACHE, _CACHE, ("batch",), ("batch",))
    arrays = (q_BxHxA, k_LxBxKxSxA, v_LxBxKxSxA, layer_B, length_B)
    if table_BxM is not None:
        axes, arrays = (*axes, ("batch", None)), (*arrays, table_BxM)
    return sharding.on_shards(functools.partial(_attend, interpret=interpret), axes, *arrays)


# On one device.


def _write(cache, new_BxKxA, layer_B, place_B, active_B, table_BxM=None, *, interpret: bool):
    B, K, A = new_BxKxA.shape
    S = cache.shape[3]
    if table_BxM is None:
        place_B = jnp.minimum(place_B, S - 1)  # the index of a full slot, which is not active, is past the end
        scalars = (layer_B, place_B, active_B)
    else:  # slots that are not active write to page 0
        scalars = (layer_B, place_B % S, active_B, page_of(table_BxM, place_B, active_B > 0, S))
    place = lambda b, layer, place, active, *page: (layer[b], page[0][b] if page else b, 0, place[b] // ROWS, 0)  # noqa: E731
    tile = pl.BlockSpec((None, None, K, ROWS, A), place)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(B,),
        in_specs=[pl.BlockSpec((None, K, 1, A), lambda b, *_: (b, 0, 0, 0)), tile],
        out_specs=tile,
    )
    return pl.pallas_call(
        _write_kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={len(scalars) + 1: 0},
        interpret=interpret,
        name=WRITE if table_BxM is None else WRITE_PAGES,
    )(*scalars, new_BxKxA[:, :, None].astype(cache.dtype), cache)


def _write_kernel(layer_ref, place_ref, active_ref, *refs):
    del layer_ref
    new_ref, old_ref, out_ref = refs[-3:]  # behind the pages, if there are some
    b = pl.program_id(0)
    row = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 1)
    here = (row == place_ref[b] % ROWS) & (active_ref[b] > 0)
    out_ref[...] = jnp.where(here, new_ref[...], old_ref[...])


def _attend(q_BxHxA, k, v, layer_B, length_B, table_BxM=None, *, interpret: bool):
    B, H, A = q_BxHxA.shape
    K, S = k.shape[2:4]  # S: of a slot, or of a page
    M, scalars = 1, (layer_B, length_B)
    if table_BxM is not None:
        M, scalars = table_BxM.shape[1], (*scalars, table_BxM.reshape(-1))  # two axes would be padded to tiles
    size = next(block for block in BLOCKS if S % block == 0)
    q_BxKxGxA = (q_BxHxA * A**-0.5).reshape(B, K, H // K, A)
    q_BxKxGxA = jnp.pad(q_BxKxGxA, ((0, 0), (0, 0), (0, -(H // K) % QUERIES), (0, 0)))
    G = q_BxKxGxA.shape[2]

    def block(b, j, layer, length, *table):  # past the end the last block is repeated, so that nothing is read
        j = jnp.minimum(j, jnp.maximum(length[b] - 1, 0) // size)
        if not table:
            return layer[b], b, 0, j, 0
        return layer[b], table[0][b * M + j // (S // size)], 0, j % (S // size), 0

    query = pl.BlockSpec((None, K, G, A), lambda b, j, *_: (b, 0, 0, 0))
    places = pl.BlockSpec((None, None, K, size, A), block)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(B, M * S // size),
        in_specs=[query, places, places],
        out_specs=query,
        scratch_shapes=[pltpu.VMEM((K, G, 128), jnp.float32)] * 2 + [pltpu.VMEM((K, G, A), jnp.float32)],
    )
    out_BxKxGxA = pl.pallas_call(
        functools.partial(_attend_kernel, size=size),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(q_BxKxGxA.shape, q_BxHxA.dtype),
        interpret=interpret,
        name=ATTEND if table_BxM is None else ATTEND_PAGES,
    )(*scalars, q_BxKxGxA, k, v)
    return out_BxKxGxA[:, :, : H // K].reshape(B, H, A)


def _attend_kernel(layer_ref, length_ref, *refs, size: int):
    """Process one block of entries: update the running max score, the sum of weights and the weighted values."""
    del layer_ref
    q_ref, k_ref, v_ref, out_ref, top_ref, total_ref, sum_ref = refs[-7:]  # behind the table, if there is one
    b, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(j * size < length_ref[b])
    def _():
        k, v = k_ref[...], v_ref[...]
        score_KxGxS = jnp.einsum("kga,ksa->kgs", q_ref[...].astype(k.dtype), k, preferred_element_type=jnp.float32)
        place = j * size + jax.lax.broadcasted_iota(jnp.int32, score_KxGxS.shape, 2)
        score_KxGxS = jnp.where(place < length_ref[b], score_KxGxS, MASKED)
        old_KxGx1 = top_ref[:, :, :1]
        top_KxGx1 = jnp.maximum(old_KxGx1, jnp.max(score_KxGxS, axis=2, keepdims=True))
        weight_KxGxS = jnp.exp(score_KxGxS - top_KxGx1)
        shrink_KxGx1 = jnp.exp(old_KxGx1 - top_KxGx1)
        total_KxGx1 = total_ref[:, :, :1] * shrink_KxGx1 + jnp.sum(weight_KxGxS, axis=2, keepdims=True)
        part_KxGxA = jnp.einsum("kgs,ksa->kga", weight_KxGxS.astype(v.dtype), v, preferred_element_type=jnp.float32)
        sum_ref[...] = sum_ref[...] * shrink_KxGx1 + part_KxGxA
        top_ref[...] = jnp.broadcast_to(top_KxGx1, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total_KxGx1, total_ref.shape)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = (sum_ref[...] / jnp.maximum(total_ref[:, :, :1], 1e-30)).astype(out_ref.dtype)


def kernel_flops(op_name: str, dims: Sequence[tuple[int, ...]], filled: float = 1.0) -> float:
    """Return the flops of the attention kernel, 0 for a kernel of another name.

    The first arguments are those of `splash.kernel_flops`. filled: the share of the slots' entries that are filled.
    Rows that pad a tile of queries are counted too."""
    if ATTEND not in op_name and ATTEND_PAGES not in op_name:
        return 0.0
    (B, K, G, A), S = _attended(op_name, dims)
    return 4.0 * B * K * G * S * A * filled


def kernel_numbers(op_name: str, dims: Sequence[tuple[int, ...]], filled: float = 1.0) -> float | None:
    """Return how many numbers one of the kernels moves between memory and core.

    None for other kernels, which move their operands and results. filled: as in `kernel_flops`."""
    if ATTEND in op_name or ATTEND_PAGES in op_name:
        (B, K, G, A), S = _attended(op_name, dims)
        return 2.0 * B * K * (G + S * filled) * A
    if WRITE in op_name or WRITE_PAGES in op_name:
        B, K, _, A = dims[3 if WRITE in op_name else 4]
        return 2.0 * B * K * ROWS * A
    return None


def _attended(op_name: str, dims: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """Return the shape of the queries, and the entries of a slot."""
    if ATTEND in op_name:
        return dims[2], dims[3][3]
    return dims[3], dims[2][0] // dims[3][0] * dims[4][3]
