"""Attention on TPU with the Pallas splash kernel, on every device's own rows and heads.

Block sizes are those that other TPU trainers use; scores never leave the chip's fast memory. Axes as in `attention.py`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from tapo_jax import sharding

BLOCKS = (512, 256, 128)
LANES = 128
PADDING = -1
CAUSAL, FULL = "splash_causal", "splash_full"  # scopes by which `kernel_flops` identifies a compiled kernel


def splash_attention(
    q_BxTxHxA: jax.Array,
    k_BxSxKxA: jax.Array,
    v_BxSxKxA: jax.Array,
    q_segment_BxT: jax.Array,
    kv_segment_BxS: jax.Array,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Compute softmax attention within equal segments, as `attention.attention` does.

    interpret: run the kernel step by step on any backend (slow; for tests).

    Returns [B, T, H, A] in the dtype of q.
    """
    _, T, H, A = q_BxTxHxA.shape
    if k_BxSxKxA.shape[2] % sharding.pieces("kv_heads"):  # then heads and key/value heads would be split differently
        k_BxSxKxA, v_BxSxKxA = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k_BxSxKxA, v_BxSxKxA))
    q, k, v = (_padded(x.swapaxes(1, 2), axis=2, value=0) for x in (q_BxTxHxA * A**-0.5, k_BxSxKxA, v_BxSxKxA))
    q_segment, kv_segment = (_padded(x, axis=1, value=PADDING) for x in (q_segment_BxT, kv_segment_BxS))

    def own_part(
        q_bxhxTxA: jax.Array, k: jax.Array, v: jax.Array, q_segment: jax.Array, kv_segment: jax.Array
    ) -> jax.Array:
        kernel = _kernel(q_bxhxTxA.shape[1], q_bxhxTxA.shape[2], k.shape[2], causal, interpret)
        with jax.named_scope(CAUSAL if causal else FULL):
            return jax.vmap(kernel)(q_bxhxTxA, k, v, splash.SegmentIds(q_segment, kv_segment))

    heads, keys, segments = ("batch", "heads", None, None), ("batch", "kv_heads", None, None), ("batch", None)
    axes = (heads, keys, keys, segments, segments)
    out_BxHxTxA = sharding.on_shards(own_part, axes, q, k, v, q_segment, kv_segment)
    return out_BxHxTxA[:, :, :T].swapaxes(1, 2)


def _padded(x: jax.Array, *, axis: int, value: int) -> jax.Array:
    """Pad x to a whole number of lanes along `axis`."""
    missing = -x.shape[axis] % LANES
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def _block(size: int) -> int:
    return next(block for block in BLOCKS if size % block == 0)


def _kernel(heads: int, T: int, S: int, causal: bool, interpret: bool) -> Callable:
    mask = splash.CausalMask((T, S)) if causal else splash.FullMask((T, S))
    q, kv = _block(T), _block(S)
    blocks = splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def kernel_flops(op_name: str, dims: Sequence[tuple[int, ...]]) -> float:
    """Return the flops of one of the kernels in a compiled program, 0 for a kernel of another kind.

    Counted are the products of the blocks that the kernel visits: all, or those on and below the diagonal.

    op_name: the kernel's path in the traced program.
    dims: the sizes of its operands.
    """
    products = next(
        (n for name, n in {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}.items() if name in op_name), 0
    )
    if not products:
        return 0.0
    # Operands: tables of blocks, then q, k and v. A batch of one row has no batch axis.
    large = [d for d in dims if len(d) > 2 and d[-2] % LANES == 0]
    q, k = next((q, k) for q, k, v in zip(large, large[1:], large[2:], strict=False) if k == v and q[-1] == k[-1])
    B, (H, T, A), S = math.prod(q[:-3]), q[-3:], k[-2]
    blocks = T // _block(T)
    visited = (blocks + 1) / (2 * blocks) if CAUSAL in op_name else 1.0
    return 2.0 * products * B * H * T * S * A * visited
