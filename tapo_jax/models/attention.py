"""Attention over packed rows and over the cache.

One function, several backends: "xla" anywhere, "splash" (Pallas) on TPU, "cudnn" on GPU. Axes: B rows, T queries,
S keys, H query heads, K key/value heads, G = H / K, A head dimension.
"""

import jax
import jax.numpy as jnp

from tapo_jax import sharding
from tapo_jax.models import decode_kernel
from tapo_jax.models.layers import MASKED
from tapo_jax.models.splash import splash_attention

QUERY_BLOCK = 256
SCORES = 2**27  # max attention scores that exist at one time on a device


def attention(
    q_BxTxHxA: jax.Array,
    k_BxSxKxA: jax.Array,
    v_BxSxKxA: jax.Array,
    q_segment_BxT: jax.Array,
    kv_segment_BxS: jax.Array,
    *,
    causal: bool,
    backend: str = "auto",
) -> jax.Array:
    """Compute softmax attention within equal segments, scaled by A^-1/2.

    q_segment_BxT, kv_segment_BxS: segments, not negative; padding has its own (0), so no row of the softmax is empty.
    causal: attend only to keys at the same or an earlier position.
    backend: "xla", "splash", "cudnn", or "auto", which chooses by the platform that the program is traced for.

    Returns [B, T, H, A] in the dtype of q. Raises KeyError for another backend.
    """
    if backend == "auto":
        backend = choose_backend(platform(), q_BxTxHxA.dtype, q_BxTxHxA.shape[-1])
    function = {"xla": xla_attention, "splash": splash_attention, "cudnn": cudnn_attention}[backend]
    return function(q_BxTxHxA, k_BxSxKxA, v_BxSxKxA, q_segment_BxT, kv_segment_BxS, causal=causal)


def platform() -> str:
    """Return the platform of the mesh that is traced for; a program may be compiled for devices that are not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose_backend(platform: str, dtype: jnp.dtype, head_dim: int) -> str:
    """Return the backend for a platform.

    cuDNN's kernel takes 16-bit numbers and head dimensions up to 128 in steps of 8; on GPU all else uses XLA."""
    if platform == "tpu":
        return "splash"
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if platform in ("gpu", "cuda") and narrow and head_dim % 8 == 0 and head_dim <= 128 else "xla"


def decodes_in_place(*, kv_heads: int, capacity: int, head_dim: int) -> bool:
    """Return whether decoding steps write and read such a cache without copying it (`decode_kernel`, on TPU only).

    Elsewhere `cached_attention` is as fast, if it gets no more rows and entries than it needs."""
    return platform() == "tpu" and decode_kernel.suits(kv_heads, capacity, head_dim)


def cudnn_attention(
    q_BxTxHxA: jax.Array,
    k_BxSxKxA: jax.Array,
    v_BxSxKxA: jax.Array,
    q_segment_BxT: jax.Array,
    kv_segment_BxS: jax.Array,
    *,
    causal: bool,
    implementation: str = "cudnn",
) -> jax.Array:
    """Call NVIDIA's fused kernel through jax.nn; implementation "xla" is the same call on any backend, for tests."""
    mask_Bx1xTxS = (q_segment_BxT[:, :, None] == kv_segment_BxS[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BxTxHxA, k_BxSxKxA, v_BxSxKxA, mask=mask_Bx1xTxS, is_causal=causal, implementation=implementation
    )


def xla_attention(
    q_BxTxHxA: jax.Array,
    k_BxSxKxA: jax.Array,
    v_BxSxKxA: jax.Array,
    q_segment_BxT: jax.Array,
    kv_segment_BxS: jax.Array,
    *,
    causal: bool,
) -> jax.Array:
    """Compute attention in blocks of queries, with the memory of one block.

    Causal blocks never touch later keys, and the backward pass recomputes a block's weights instead of keeping them."""
    T = q_BxTxHxA.shape[1]
    k_BxKxSxA, v_BxKxSxA = k_BxSxKxA.swapaxes(1, 2), v_BxSxKxA.swapaxes(1, 2)
    size = min(max(80, -(-T // 8)), 512)
    out = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        S = stop if causal else k_BxKxSxA.shape[2]
        mask_BxtxS = q_segment_BxT[:, start:stop, None] == kv_segment_BxS[:, None, :S]
        if causal:
            mask_BxtxS &= (jnp.arange(start, stop)[:, None] >= jnp.arange(S)[None])[None]
        out.append(_block(q_BxTxHxA[:, start:stop], k_BxKxSxA[:, :, :S], v_BxKxSxA[:, :, :S], mask_BxtxS))
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def cached_attention(
    q_BxTxHxA: jax.Array, k_BxKxSxA: jax.Array, v_BxKxSxA: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Attend over a cache that already holds the new tokens: query t of row b sees entries 0 … length_B[b] + t.

    Many queries are processed in blocks, so that the scores of all T queries never exist together.
    """
    B, T, H, A = q_BxTxHxA.shape
    place_S = jnp.arange(k_BxKxSxA.shape[2])

    def block(q_BxtxHxA: jax.Array, start: int | jax.Array) -> jax.Array:
        last_Bxt = length_B[:, None] + start + jnp.arange(q_BxtxHxA.shape[1])[None]
        return _block(q_BxtxHxA, k_BxKxSxA, v_BxKxSxA, place_S[None, None] <= last_Bxt[:, :, None])

    size = query_block(B, H, k_BxKxSxA.shape[2])
    if size >= T:
        return block(q_BxTxHxA, 0)
    blocks = -(-T // size)
    padded = jnp.pad(q_BxTxHxA, ((0, 0), (0, blocks * size - T), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(B, blocks, size, H, A), 1, 0)
    out = jax.lax.map(lambda xs: block(*xs), (split, jnp.arange(blocks) * size))
    return jnp.moveaxis(out, 0, 1).reshape(B, blocks * size, H, A)[:, :T]


def query_block(rows: int, heads: int, places: int) -> int:
    """Return the number of queries in a block of `cached_attention`.

    It is a multiple of 32, at most QUERY_BLOCK, and keeps a device's scores within SCORES unless 32 are too many."""
    of_one = max(1, rows // sharding.pieces("batch")) * max(1, heads // sharding.pieces("heads")) * places
    return min(QUERY_BLOCK, max(32, SCORES // of_one // 32 * 32))


def _block(q_BxtxHxA: jax.Array, k_BxKxSxA: jax.Array, v_BxKxSxA: jax.Array, mask_BxtxS: jax.Array) -> jax.Array:
    """Attend with one block of queries over all its keys. The G heads that share a key head are rows of one product."""
    B, t, H, A = q_BxtxHxA.shape
    K, G = k_BxKxSxA.shape[1], H // k_BxKxSxA.shape[1]
    q_BxKxRxA = (q_BxtxHxA * A**-0.5).reshape(B, t, K, G, A).transpose(0, 2, 3, 1, 4).reshape(B, K, G * t, A)
    mask_Bx1xRxS = jnp.broadcast_to(mask_BxtxS[:, None], (B, G, *mask_BxtxS.shape[1:])).reshape(B, 1, G * t, -1)
    out_BxKxRxA = _softmax_product(q_BxKxRxA, k_BxKxSxA, v_BxKxSxA, mask_Bx1xRxS)
    return out_BxKxRxA.reshape(B, K, G, t, A).transpose(0, 3, 1, 2, 4).reshape(B, t, H, A)


@jax.custom_vjp
def _softmax_product(q_BxKxRxA, k_BxKxSxA, v_BxKxSxA, mask_Bx1xRxS):
    return _softmax_product_forward(q_BxKxRxA, k_BxKxSxA, v_BxKxSxA, mask_Bx1xRxS)[0]


def _scores(q_BxKxRxA, k_BxKxSxA, mask_Bx1xRxS):
    score_BxKxRxS = jnp.einsum("bkra,bksa->bkrs", q_BxKxRxA, k_BxKxSxA, preferred_element_type=jnp.float32)
    return jnp.where(mask_Bx1xRxS, score_BxKxRxS, MASKED)


def _softmax_product_forward(q_BxKxRxA, k_BxKxSxA, v_BxKxSxA, mask_Bx1xRxS):
    score_BxKxRxS = _scores(q_BxKxRxA, k_BxKxSxA, mask_Bx1xRxS)
    top_BxKxRx1 = jnp.max(score_BxKxRxS, axis=-1, keepdims=True)
    weight_BxKxRxS = jnp.exp(score_BxKxRxS - top_BxKxRx1)
    total_BxKxRx1 = jnp.sum(weight_BxKxRxS, axis=-1, keepdims=True)
    out32_BxKxRxA = jnp.einsum(
        "bkrs,bksa->bkra", weight_BxKxRxS.astype(v_BxKxSxA.dtype), v_BxKxSxA, preferred_element_type=jnp.float32
    )
    out_BxKxRxA = (out32_BxKxRxA / total_BxKxRx1).astype(q_BxKxRxA.dtype)
    lse_BxKxRx1 = top_BxKxRx1 + jnp.log(total_BxKxRx1)
    return out_BxKxRxA, (q_BxKxRxA, k_BxKxSxA, v_BxKxSxA, mask_Bx1xRxS, out_BxKxRxA, lse_BxKxRx1)


def _softmax_product_backward(kept, dout_BxKxRxA):
    q_BxKxRxA, k_BxKxSxA, v_BxKxSxA, mask_Bx1xRxS, out_BxKxRxA, lse_BxKxRx1 = kept
    dtype = q_BxKxRxA.dtype
    weight_BxKxRxS = jnp.exp(_scores(q_BxKxRxA, k_BxKxSxA, mask_Bx1xRxS) - lse_BxKxRx1)
    dweight_BxKxRxS = jnp.einsum("bkra,bksa->bkrs", dout_BxKxRxA, v_BxKxSxA, preferred_element_type=jnp.float32)
    # Σ over keys of weight · dweight, without another pass over the keys.
    mean_BxKxRx1 = jnp.sum((dout_BxKxRxA * out_BxKxRxA).astype(jnp.float32), axis=-1, keepdims=True)
    dscore_BxKxRxS = (weight_BxKxRxS * (dweight_BxKxRxS - mean_BxKxRx1)).astype(dtype)
    dq_BxKxRxA = jnp.einsum("bkrs,bksa->bkra", dscore_BxKxRxS, k_BxKxSxA)
    dk_BxKxSxA = jnp.einsum("bkrs,bkra->bksa", dscore_BxKxRxS, q_BxKxRxA)
    dv_BxKxSxA = jnp.einsum("bkrs,bkra->bksa", weight_BxKxRxS.astype(dtype), dout_BxKxRxA)
    return dq_BxKxRxA, dk_BxKxSxA, dv_BxKxSxA, None


_softmax_product.defvjp(_softmax_product_forward, _softmax_product_backward)
