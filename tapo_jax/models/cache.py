"""The key/value cache: a fixed set of slots, each with its own length; or pages, and a table of them for each slot."""

import dataclasses

import jax
import jax.numpy as jnp

from tapo_jax import sharding
from tapo_jax.models.config import Qwen3VLConfig

UNROLLED_LAYERS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of B slots, in arrays [layers, B, K, S, A].

    K: key/value heads; S: entries of a slot; A: head dimension. A shallow model has one array for each layer, so that
    no layer is ever sliced out (on a CPU a slice is a copy); a deep one has a single array, so that its layers can be
    scanned.

    With a table the arrays are [layers, N, K, P, A]: N pages of P entries (`models/pages.py`).
    """

    k: tuple[jax.Array, ...]
    """Keys, already rotated."""
    v: tuple[jax.Array, ...]
    """Values."""
    length_B: jax.Array
    """int32, number of filled entries of each slot. Entries past it are never read."""
    table_BxM: jax.Array | None = None
    """int32, the pages of each slot in order, 0 where it has none; None: slot b is entry b of the second axis."""

    @property
    def slots(self) -> int:
        return self.k[0].shape[1]

    @property
    def capacity(self) -> int:
        return self.k[0].shape[3]

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of the keys of one slot, or page, in one layer."""
        kv_heads, capacity, head_dim = self.k[0].shape[2:]
        return {"kv_heads": kv_heads, "capacity": capacity, "head_dim": head_dim}


def init_cache(config: Qwen3VLConfig, slots: int, capacity: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """Return an empty cache: slots · capacity · 2 · layers · kv_heads · head_dim numbers."""
    parts = config.layers if config.layers <= UNROLLED_LAYERS else 1
    shape = (config.layers // parts, slots, config.kv_heads, capacity, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(parts)) for _ in range(2))
    return Cache(k, v, jnp.zeros(slots, jnp.int32))


def write_all(
    x_LxBxKxSxA: jax.Array, new_BxKxTxA: jax.Array, layer: int | jax.Array, active_B: jax.Array, place_B: jax.Array
) -> jax.Array:
    """Write as `write` does, with one row for every slot, in order; rows that are not active are skipped.

    On a mesh every device writes its own slots: for a scatter by slot index the compiler would gather the rows of all
    devices."""

    def own_part(x: jax.Array, new: jax.Array, layer_B: jax.Array, active_B: jax.Array, place_B: jax.Array):
        slots = x.shape[1]
        return write(x, new, layer_B, jnp.where(active_B, jnp.arange(slots), slots), place_B)

    axes = ((None, "batch", "kv_heads", None, None), ("batch", "kv_heads", None, None), *[("batch",)] * 3)
    layer_B = jnp.full_like(place_B, layer)
    return sharding.on_shards(own_part, axes, x_LxBxKxSxA, new_BxKxTxA, layer_B, active_B, place_B)


def write(
    x_LxBxKxSxA: jax.Array, new_RxKxTxA: jax.Array, layer: int | jax.Array, slot_R: jax.Array, place_R: jax.Array
) -> jax.Array:
    """Write T new entries at (layer, slot_R, :, place_R …).

    Rows whose slot is past the last one, and entries past the end of a slot, are not written.

    x_LxBxKxSxA: one array of the cache.
    new_RxKxTxA: the new entries.
    layer: one index for all rows, or one for each row.
    slot_R: the slot of each row.
    place_R: the first entry to write in each row's slot.
    """
    T, S = new_RxKxTxA.shape[2], x_LxBxKxSxA.shape[3]
    new_RxKxTxA = new_RxKxTxA.astype(x_LxBxKxSxA.dtype)
    index_Rx3 = jnp.stack([jnp.full_like(slot_R, layer), slot_R, place_R], axis=-1)
    if T > 1:
        # A window must fit in the slot: one that does not is moved left, and its first entries keep their old values.
        index_Rx3 = index_Rx3.at[:, 2].min(S - T)
        moved_R = place_R - index_Rx3[:, 2]
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=(1, 2, 3), collapsed_slice_dims=(0, 1), start_index_map=(0, 1, 3)
        )
        size = (1, 1, new_RxKxTxA.shape[1], T, new_RxKxTxA.shape[3])
        old_RxKxTxA = jax.lax.gather(x_LxBxKxSxA, index_Rx3, numbers, size, mode=jax.lax.GatherScatterMode.CLIP)
        # Scatter whole slices: with an index for every number a TPU would need hundreds of times the numbers' memory.
        behind_RxKx2TxA = jnp.concatenate([jnp.zeros_like(new_RxKxTxA), new_RxKxTxA], axis=2)
        shift = jax.vmap(lambda x, moved: jax.lax.dynamic_slice_in_dim(x, T - moved, T, axis=1))
        is_new_RxT = jnp.arange(T)[None] >= moved_R[:, None]
        new_RxKxTxA = jnp.where(is_new_RxT[:, None, :, None], shift(behind_RxKx2TxA, moved_R), old_RxKxTxA)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 3)
    )
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(x_LxBxKxSxA, index_Rx3, new_RxKxTxA, numbers, mode=mode)
