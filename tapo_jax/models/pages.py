"""Write and read keys and values through tables of pages, where the compiler does it: `decode_kernel` does it on TPU.

The cache is a pool of N pages of P entries, [L, N, K, P, A], and row r has the table page_RxM: its entry s is entry
s mod P of page table[r, s // P]. Page 0 belongs to no row: what is not to be written goes there, and a table names it
where the row has no page. On a mesh every device has its own pages, and its rows name only those.
"""

import jax
import jax.numpy as jnp

from tapo_jax import sharding
from tapo_jax.models import cache

_POOL = (None, "batch", "kv_heads", None, None)


def write(
    pool_LxNxKxPxA: jax.Array,
    new_RxKxTxA: jax.Array,
    layer: int | jax.Array,
    table_RxM: jax.Array,
    place_R: jax.Array,
    count_R: jax.Array,
) -> jax.Array:
    """Write the first count_R of T new entries behind the place_R entries that each row has already.

    The pages from entry place_R on must be the row's own. Places behind the new entries may be written too, up to the
    end of their page."""
    layer_R = jnp.full_like(place_R, layer)
    axes = (_POOL, ("batch", "kv_heads", None, None), ("batch",), ("batch", None), ("batch",), ("batch",))
    return sharding.on_shards(_write, axes, pool_LxNxKxPxA, new_RxKxTxA, layer_R, table_RxM, place_R, count_R)


def read(pool_LxNxKxPxA: jax.Array, layer: int | jax.Array, table_RxM: jax.Array) -> jax.Array:
    """Return the entries of each row in one layer, [R, K, M·P, A]. What lies in page 0 is no row's."""
    layer_R = jnp.full(table_RxM.shape[:1], layer, jnp.int32)
    return sharding.on_shards(_read, (_POOL, ("batch", None), ("batch",)), pool_LxNxKxPxA, table_RxM, layer_R)[0]


def page_of(table_RxM: jax.Array, place_R: jax.Array, active_R: jax.Array, size: int) -> jax.Array:
    """Return the page in which each row's entry place_R lies; 0 for a row that is not active."""
    index_Rx1 = jnp.minimum(place_R // size, table_RxM.shape[1] - 1)[:, None]
    return jnp.where(active_R, jnp.take_along_axis(table_RxM, index_Rx1, axis=1)[:, 0], 0)


# On one device.


def _read(pool, table_RxM, layer_R):
    R, M = table_RxM.shape
    found_RxMxKxPxA = pool[layer_R[:, None], table_RxM]
    return found_RxMxKxPxA.swapaxes(1, 2).reshape(1, R, pool.shape[2], M * pool.shape[3], pool.shape[4])


def _write(pool, new_RxKxTxA, layer_R, table_RxM, place_R, count_R):
    (R, K, T, A), P = new_RxKxTxA.shape, pool.shape[3]
    if T == 1:
        page_R = page_of(table_RxM, place_R, count_R > 0, P)
        return cache.write(pool, new_RxKxTxA, layer_R, page_R, place_R % P)
    # Whole pages are written: the entries of the first that are there already, then the new ones.
    pages = -(-(T + P - 1) // P)  # that T entries may touch
    index_Rxn = (place_R // P)[:, None] + jnp.arange(pages)[None]
    touched_Rxn = (index_Rxn * P < (place_R + count_R)[:, None]) & (count_R > 0)[:, None]
    named_Rxn = jnp.take_along_axis(table_RxM, jnp.minimum(index_Rxn, table_RxM.shape[1] - 1), axis=1)
    page_Rxn = jnp.where(touched_Rxn, named_Rxn, 0)
    behind_R = place_R % P
    padded = jnp.pad(new_RxKxTxA.astype(pool.dtype), ((0, 0), (0, 0), (P, pages * P - T), (0, 0)))
    shift = jax.vmap(lambda x, behind: jax.lax.dynamic_slice_in_dim(x, P - behind, pages * P, axis=1))
    moved_RxKxnPxA = shift(padded, behind_R)
    old_RxKxPxA = pool[layer_R, page_Rxn[:, 0]]
    is_old_RxP = jnp.arange(P)[None] < behind_R[:, None]
    first_RxKxPxA = jnp.where(is_old_RxP[:, None, :, None], old_RxKxPxA, moved_RxKxnPxA[:, :, :P])
    moved_RxKxnPxA = jnp.concatenate([first_RxKxPxA, moved_RxKxnPxA[:, :, P:]], axis=2)
    new_RxnxKxPxA = moved_RxKxnPxA.reshape(R, K, pages, P, A).swapaxes(1, 2)
    return pool.at[layer_R[:, None], page_Rxn].set(new_RxnxKxPxA)
