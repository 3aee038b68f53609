"""The vision tower: patches of a row's images in, one feature for each merge × merge block of patches out."""

import math

import jax
import jax.numpy as jnp

from tapo_jax.batch import ModelInputs
from tapo_jax.models.attention import attention
from tapo_jax.models.config import VisionConfig
from tapo_jax.models.stack import run_stack

EPSILON = 1e-6


def features(
    params: dict, inputs: ModelInputs, vision: VisionConfig, dtype: jnp.dtype, *, remat: str = "none"
) -> tuple[jax.Array, jax.Array | None]:
    """Image features of every row: (feature_BxMxD, deep_nxBxMxD or None), M = N // merge².

    params: the arrays under `vision`. deep: the outputs of the n deepstack mergers, for the decoder's first n layers.
    Rows hold their own images only; padding patches (patch_image 0) see each other and their features are never read.
    """
    x_BxNxE = layer_patches(params, inputs, dtype)
    angle = rotary(inputs.patch_rowcol_BxNx2, vision)
    segment_BxN = inputs.patch_image_BxN

    def block(x_BxNxE: jax.Array, p: dict, index: int | jax.Array) -> jax.Array:
        del index
        return vision_block(x_BxNxE, p, angle, segment_BxN)

    deep, start = [], 0
    blocks, deepstack = params["blocks"], params.get("deepstack")
    for i, index in enumerate(vision.deepstack):
        x_BxNxE = run_stack(block, x_BxNxE, jax.tree.map(lambda a, s=start, e=index + 1: a[s:e], blocks), remat=remat)
        start = index + 1
        deep.append(merge(x_BxNxE, jax.tree.map(lambda a, i=i: a[i], deepstack), vision, after=True))
    if start < vision.depth:
        x_BxNxE = run_stack(block, x_BxNxE, jax.tree.map(lambda a: a[start:], blocks), remat=remat)
    return merge(x_BxNxE, params["merger"], vision, after=False), jnp.stack(deep) if deep else None


def layer_patches(params: dict, inputs: ModelInputs, dtype: jnp.dtype) -> jax.Array:
    """Patch embedding plus the learned position table, read between its entries."""
    x_BxNxE = inputs.pixels_BxNxF.astype(dtype) @ params["patch"].astype(dtype) + params["patch_bias"].astype(dtype)
    corner_BxNx4xE = params["position"][inputs.patch_corner_BxNx4]
    position_BxNxE = jnp.sum(corner_BxNx4xE * inputs.patch_weight_BxNx4[..., None], axis=2)
    return x_BxNxE + position_BxNxE.astype(dtype)


def rotary(rowcol_BxNx2: jax.Array, vision: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, N, 1, A/2]: the first half of the frequencies turns with the row, the other with the column."""
    quarter = vision.head_dim // 4
    frequency = vision.rope_theta ** (-jnp.arange(quarter, dtype=jnp.float32) * 2 / (vision.head_dim // 2))
    angle_BxNx2xQ = rowcol_BxNx2[..., None].astype(jnp.float32) * frequency
    angle_BxNx1xA = angle_BxNx2xQ.reshape(*rowcol_BxNx2.shape[:2], 1, 2 * quarter)
    return jnp.cos(angle_BxNx1xA), jnp.sin(angle_BxNx1xA)


def rotate(x_BxTxHxA: jax.Array, angle: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (a, a + A/2) of every head, in float32."""
    cos, sin = angle
    low, high = jnp.split(x_BxTxHxA.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BxTxHxA.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + EPSILON)
    return (normal * scale + bias).astype(x.dtype)


def product(x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
    """x · kernel over the last `axes` axes of x and the first of the kernel.

    Written as a product of two matrices: with more axes the gradient of the kernel costs transposed copies on a CPU.
    """
    rows, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
    inputs = math.prod(kernel.shape[:axes])
    y = x.reshape(math.prod(rows), inputs) @ kernel.astype(x.dtype).reshape(inputs, math.prod(outputs))
    return y.reshape(*rows, *outputs)


def dense(x: jax.Array, p: dict, name: str, axes: int = 1) -> jax.Array:
    return product(x, p[name], axes) + p[f"{name}_bias"].astype(x.dtype)


def vision_block(
    x_BxNxE: jax.Array, p: dict, angle: tuple[jax.Array, jax.Array], segment_BxN: jax.Array
) -> jax.Array:
    qkv_BxNx3xHxA = dense(layer_norm(x_BxNxE, p["norm1"], p["norm1_bias"]), p, "qkv")
    q, k, v = (qkv_BxNx3xHxA[:, :, i] for i in range(3))
    out_BxNxHxA = attention(rotate(q, angle), rotate(k, angle), v, segment_BxN, segment_BxN, causal=False)
    x_BxNxE = x_BxNxE + dense(out_BxNxHxA, p, "proj", axes=2)
    up_BxNxM = jax.nn.gelu(dense(layer_norm(x_BxNxE, p["norm2"], p["norm2_bias"]), p, "fc1"), approximate=True)
    return x_BxNxE + dense(up_BxNxM, p, "fc2")


def merge(x_BxNxE: jax.Array, p: dict, vision: VisionConfig, *, after: bool) -> jax.Array:
    """Joins the merge² patches of a block (they are neighbours in the order) to one feature of the decoder's width.

    after: normalise the joined block (deepstack mergers) instead of each patch.
    """
    B, N, E = x_BxNxE.shape
    block = (B, N // vision.merge**2, E * vision.merge**2)
    x = layer_norm(x_BxNxE.reshape(block) if after else x_BxNxE, p["norm"], p["norm_bias"])
    return dense(jax.nn.gelu(dense(x.reshape(block), p, "fc1"), approximate=False), p, "fc2")
