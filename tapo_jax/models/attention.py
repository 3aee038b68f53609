"""Attention over packed rows and over the cache.

One function, several backends: "xla" anywhere, "splash" (Pallas) on TPU, "cudnn" on GPU. Axes: B rows, T queries,
S keys, H query heads, K key/value heads, A numbers of one head.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30


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
    """Softmax attention within equal segments, scaled by A^-1/2; causal: only to keys at the same place or before.

    Padding has a segment of its own (0), so no row of the softmax is empty. Returns [B, T, H, A] in the dtype of q.
    """
    mask_BxTxS = q_segment_BxT[:, :, None] == kv_segment_BxS[:, None, :]
    if causal:
        T, S = mask_BxTxS.shape[1:]
        mask_BxTxS &= jnp.arange(T)[:, None] >= jnp.arange(S)
    return _softmax_attention(q_BxTxHxA, k_BxSxKxA.swapaxes(1, 2), v_BxSxKxA.swapaxes(1, 2), mask_BxTxS)


def cached_attention(
    q_BxTxHxA: jax.Array, k_BxKxSxA: jax.Array, v_BxKxSxA: jax.Array, length_B: jax.Array
) -> jax.Array:
    """New tokens over a cache that holds them already: query t of row b sees the places 0 … length_B[b] + t."""
    T, S = q_BxTxHxA.shape[1], k_BxKxSxA.shape[2]
    last_BxT = length_B[:, None] + jnp.arange(T)
    mask_BxTxS = jnp.arange(S) <= last_BxT[:, :, None]
    return _softmax_attention(q_BxTxHxA, k_BxKxSxA, v_BxKxSxA, mask_BxTxS)


def _softmax_attention(
    q_BxTxHxA: jax.Array, k_BxKxSxA: jax.Array, v_BxKxSxA: jax.Array, mask_BxTxS: jax.Array
) -> jax.Array:
    B, T, H, A = q_BxTxHxA.shape
    K = k_BxKxSxA.shape[1]
    q_BxKxGTxA = q_BxTxHxA.reshape(B, T, K, H // K, A).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * T, A)
    score_BxKxGTxS = jnp.einsum("bkqa,bksa->bkqs", q_BxKxGTxA, k_BxKxSxA, preferred_element_type=jnp.float32)
    score_BxKxGxTxS = score_BxKxGTxS.reshape(B, K, H // K, T, -1) * A**-0.5
    score_BxKxGxTxS = jnp.where(mask_BxTxS[:, None, None], score_BxKxGxTxS, MASKED)
    weight_BxKxGxTxS = jax.nn.softmax(score_BxKxGxTxS, axis=-1).astype(q_BxTxHxA.dtype)
    out_BxKxGTxA = jnp.einsum("bkqs,bksa->bkqa", weight_BxKxGxTxS.reshape(score_BxKxGTxS.shape), v_BxKxSxA)
    return out_BxKxGTxA.reshape(B, K, H // K, T, A).transpose(0, 3, 1, 2, 4).reshape(B, T, H, A)
