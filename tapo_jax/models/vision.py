"""The vision tower: turns patches of a row's images into one feature for each merge × merge block of patches."""

import jax
import jax.numpy as jnp

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs
from tapo_jax.models.attention import attention
from tapo_jax.models.config import VisionConfig
from tapo_jax.models.layers import frequencies, layer_norm, project, rotate
from tapo_jax.models.stack import run_stack


def features(
    params: dict, inputs: ModelInputs, vision: VisionConfig, dtype: jnp.dtype, *, remat: str = "none"
) -> tuple[jax.Array, jax.Array | None]:
    """Return the image features of every row: (feature_BxMxD, deep_nxBxMxD or None), M = N // merge².

    deep_nxBxMxD are the outputs of the n deepstack mergers, for the decoder's first n layers. A row holds only its own
    images; padding patches (patch_image 0) see each other and their features are never read.

    params: the arrays under `vision`.
    inputs: the batch.
    vision: the tower's shapes.
    dtype: dtype of the computation.
    remat: see `stack.run_stack`.
    """
    x_BxNxE = embed_patches(params, inputs, dtype)
    angles = rotary(inputs.patch_rowcol_BxNx2, vision)
    segment_BxN = inputs.patch_image_BxN

    def block(x_BxNxE: jax.Array, p: dict, index: int | jax.Array) -> jax.Array:
        del index
        return vision_block(x_BxNxE, p, angles, segment_BxN)

    deep, start = [], 0
    blocks, deepstack = params["blocks"], params.get("deepstack")
    for i, index in enumerate(vision.deepstack):
        segment = jax.tree.map(lambda a, start=start, stop=index + 1: a[start:stop], blocks)
        x_BxNxE = run_stack(block, x_BxNxE, segment, depth=vision.depth, remat=remat)
        start = index + 1
        deep.append(merge(x_BxNxE, jax.tree.map(lambda a, i=i: a[i], deepstack), vision, after=True))
    if start < vision.depth:
        rest = jax.tree.map(lambda a: a[start:], blocks)
        x_BxNxE = run_stack(block, x_BxNxE, rest, depth=vision.depth, remat=remat)
    return merge(x_BxNxE, params["merger"], vision, after=False), jnp.stack(deep) if deep else None


def embed_patches(params: dict, inputs: ModelInputs, dtype: jnp.dtype) -> jax.Array:
    """Return the patch embedding plus the learned position table, interpolated between its entries."""
    x_BxNxE = project(inputs.pixels_BxNxF.astype(dtype), params, "patch")
    # Each device holds whole rows, and corners are added one by one, so that no [B, N, 4, E] array exists.
    table_PxE = sharding.constrain(params["position"], None, None)
    corner, weight = inputs.patch_corner_BxNx4, inputs.patch_weight_BxNx4[..., None]
    position_BxNxE = sum(table_PxE[corner[:, :, c]] * weight[:, :, c] for c in range(4))
    return x_BxNxE + position_BxNxE.astype(dtype)


def rotary(rowcol_BxNx2: jax.Array, vision: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, float32 [B, N, 1, A/2].

    The first half of the pairs rotates with the row, the other half with the column."""
    frequency_Q = frequencies(vision.head_dim // 4, vision.rope_theta)
    angle_BxNx2xQ = rowcol_BxNx2[..., None].astype(jnp.float32) * frequency_Q[None, None, None]
    angle_BxNx1xP = angle_BxNx2xQ.reshape(*rowcol_BxNx2.shape[:2], 1, -1)
    return jnp.cos(angle_BxNx1xP), jnp.sin(angle_BxNx1xP)


def vision_block(x_BxNxE: jax.Array, p: dict, angles: tuple[jax.Array, jax.Array], segment_BxN: jax.Array) -> jax.Array:
    qkv_BxNx3xHxA = project(layer_norm(x_BxNxE, p["norm1"], p["norm1_bias"]), p, "qkv")
    q, k, v = (qkv_BxNx3xHxA[:, :, i] for i in range(3))
    q, k = rotate(q, angles), rotate(k, angles)
    out_BxNxHxA = attention(q, k, v, segment_BxN, segment_BxN, causal=False)
    x_BxNxE = x_BxNxE + project(out_BxNxHxA, p, "proj", axes=2)
    up_BxNxM = jax.nn.gelu(project(layer_norm(x_BxNxE, p["norm2"], p["norm2_bias"]), p, "fc1"), approximate=True)
    return sharding.constrain(x_BxNxE + project(up_BxNxM, p, "fc2"), "batch", None, None)


def merge(x_BxNxE: jax.Array, p: dict, vision: VisionConfig, *, after: bool) -> jax.Array:
    """Merge the merge² patches of a block (consecutive in the order) into one feature of the decoder's width.

    after: normalise the joined block (deepstack mergers) instead of each patch.
    """
    B, N, E = x_BxNxE.shape
    block = (B, N // vision.merge**2, E * vision.merge**2)
    x = layer_norm(x_BxNxE.reshape(block) if after else x_BxNxE, p["norm"], p["norm_bias"])
    return project(jax.nn.gelu(project(x.reshape(block), p, "fc1"), approximate=False), p, "fc2")
