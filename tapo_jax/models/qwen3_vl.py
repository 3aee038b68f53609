"""Qwen3-VL (dense): decoder with interleaved M-RoPE, image features from `vision.py`, cache from `cache.py`.

The arithmetic follows the published model; parity with its PyTorch form is tested in tests/test_model_*.py.
Axes: B rows, T tokens, D width, H heads, K key/value heads, A head dimension, M image features of a row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs
from tapo_jax.models import cache as cache_lib
from tapo_jax.models import decode_kernel, pages, positions, vision
from tapo_jax.models.attention import attention, cached_attention, decodes_in_place
from tapo_jax.models.cache import Cache
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.layers import frequencies, project, rms_norm, rotate
from tapo_jax.models.parameters import Stack, create, specs
from tapo_jax.models.stack import run_stack


class Qwen3VL(Stack):
    """The parameters of the model. The functions of this file compute with it and take it as their first argument.

    Static attributes: config; dtype, that of the computation (the parameters have their own); lora_rank and
    lora_scale (`lora.add`).
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype = jnp.float32,
        dtype: jnp.dtype = jnp.float32,
    ):
        super().__init__(create(specs(config), rngs.params(), jnp.dtype(param_dtype)))
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.lora_rank: int | None = None
        self.lora_scale = 1.0

    def arrays(self) -> dict:
        """Return the parameters as a nested dictionary of arrays; B of a low-rank update is multiplied by its scale."""
        scale = lambda path, x: x * self.lora_scale if path[-1].key.endswith("_lora_b") else x  # noqa: E731
        return super().arrays() if self.lora_rank is None else jax.tree_util.tree_map_with_path(scale, super().arrays())


def hidden_states(model: Qwen3VL, inputs: ModelInputs, *, remat: str = "none") -> jax.Array:
    """Run whole sequences without a cache; return hidden_BxTxD after the final norm.

    remat: see `stack.run_stack`; "full" also recomputes the whole vision tower.
    """
    config, params = model.config, model.arrays()
    x_BxTxD, deep = _embed(params, inputs, config, model.dtype, remat)
    angles = rotary(inputs.position_BxTx3, config)
    segment_BxT = inputs.segment_BxT

    def layer(x_BxTxD: jax.Array, p: dict, index: int | jax.Array) -> jax.Array:
        q, k, v = _qkv(x_BxTxD, p, angles, config)
        out = attention(q, k, v, segment_BxT, segment_BxT, causal=True)
        return _add_deep(_rest(x_BxTxD, out, p, config), deep, index)

    x_BxTxD = run_stack(layer, x_BxTxD, params["decoder"], depth=config.layers, remat=remat)
    return rms_norm(x_BxTxD, params["norm"], config.norm_epsilon)


def logits(model: Qwen3VL, hidden_xD: jax.Array) -> jax.Array:
    """Return float32 logits over the vocabulary for hidden states [..., D]."""
    return times_table(output_table(model).astype(hidden_xD.dtype), hidden_xD)


def output_table(model: Qwen3VL) -> jax.Array:
    """Return the output table [V, D], whose products with hidden states are the logits; a tied model's embedding."""
    table_VxD = model.embedding[...] if model.config.tied else model.lm_head[...]
    return sharding.constrain(table_VxD, "vocab", None)


def times_table(table_VxD: jax.Array, hidden_xD: jax.Array) -> jax.Array:
    rows = hidden_xD.reshape(-1, hidden_xD.shape[-1])
    out = jax.lax.dot_general(rows, table_VxD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out.reshape(*hidden_xD.shape[:-1], table_VxD.shape[0])


def extend(model: Qwen3VL, cache: Cache, inputs: ModelInputs) -> tuple[jax.Array, Cache]:
    """Add the rows' tokens to their slots (row r is slot r) and attend over all entries of each slot.

    cache: with a table, the pages of the new tokens must be their slot's own.
    inputs: R rows; the valid tokens (segment > 0) are at the left. T = 1 without images is a decoding step.

    Returns (hidden_RxTxD after the final norm, cache with the counts added to the lengths). A row without tokens leaves
    its slot unchanged. The caller must keep length + count within the capacity; padding takes no entries.
    """
    config, params = model.config, model.arrays()
    count_R = jnp.sum(inputs.segment_BxT > 0, axis=1, dtype=jnp.int32)
    length_R = cache.length_B
    write = functools.partial(cache_lib.write_all, active_B=count_R > 0, place_B=length_R)
    x_RxTxD, deep = _embed(params, inputs, config, model.dtype, "none")
    angles = rotary(inputs.position_BxTx3, config)

    in_place = inputs.token_BxT.shape[1] == 1 and decodes_in_place(**cache.sizes)
    table_RxM = cache.table_BxM

    def layer(x_RxTxD, k_cache, v_cache, p, index, place):
        q, k, v = _qkv(x_RxTxD, p, angles, config)
        if in_place:
            k_cache = decode_kernel.write(k_cache, k[:, 0], place, length_R, count_R, table_RxM)
            v_cache = decode_kernel.write(v_cache, v[:, 0], place, length_R, count_R, table_RxM)
            # A row without a token reads nothing: its output is not used.
            reach_R = jnp.where(count_R > 0, length_R + 1, 0)
            out = decode_kernel.attend(q[:, 0], k_cache, v_cache, place, reach_R, table_RxM)
            return _add_deep(_rest(x_RxTxD, out[:, None], p, config), deep, index), k_cache, v_cache
        if table_RxM is not None:
            k_cache = pages.write(k_cache, k.swapaxes(1, 2), place, table_RxM, length_R, count_R)
            v_cache = pages.write(v_cache, v.swapaxes(1, 2), place, table_RxM, length_R, count_R)
            seen = [pages.read(c, place, table_RxM).astype(q.dtype) for c in (k_cache, v_cache)]
            out = cached_attention(q, *seen, length_R)
            return _add_deep(_rest(x_RxTxD, out, p, config), deep, index), k_cache, v_cache
        k_cache = write(k_cache, k.swapaxes(1, 2), place)
        v_cache = write(v_cache, v.swapaxes(1, 2), place)
        seen = [c[place].astype(q.dtype) for c in (k_cache, v_cache)]
        out = cached_attention(q, *seen, length_R)
        return _add_deep(_rest(x_RxTxD, out, p, config), deep, index), k_cache, v_cache

    if len(cache.k) == config.layers:
        k_new, v_new = [], []
        for i in range(config.layers):
            p = jax.tree.map(lambda a, i=i: a[i], params["decoder"])
            x_RxTxD, k_i, v_i = layer(x_RxTxD, cache.k[i], cache.v[i], p, i, 0)
            k_new.append(k_i)
            v_new.append(v_i)
    else:
        xs = (params["decoder"], jnp.arange(config.layers))
        carry = (x_RxTxD, cache.k[0], cache.v[0])
        (x_RxTxD, k_0, v_0), _ = jax.lax.scan(lambda c, xs: (layer(*c, *xs, xs[1]), None), carry, xs)
        k_new, v_new = [k_0], [v_0]
    length_B = length_R + count_R
    hidden_RxTxD = rms_norm(x_RxTxD, params["norm"], config.norm_epsilon)
    return hidden_RxTxD, Cache(tuple(k_new), tuple(v_new), length_B, table_RxM)


def forward(
    model: Qwen3VL,
    tokens_BxT: jax.Array,
    *,
    pixels_NxF: jax.Array | None = None,
    grid_thw_Ix3: np.ndarray | None = None,
    mask_BxT: jax.Array | None = None,
) -> jax.Array:
    """Run a plain forward pass; return float32 logits_BxTxV. For tests and small uses.

    tokens_BxT: ids. With images they must be concrete (not traced), since positions are computed on the host.
    pixels_NxF: the flattened patches of all images as the image processor makes them, in the order of their
        placeholders (row after row).
    grid_thw_Ix3: the patch grids of all images.
    mask_BxT: True for tokens, False for padding on either side.

    Raises ValueError if placeholders and grids do not match.
    """
    if pixels_NxF is not None:
        inputs = positions.row_inputs(tokens_BxT, pixels_NxF, grid_thw_Ix3, mask_BxT, model.config)
    else:
        tokens_BxT = jnp.asarray(tokens_BxT, jnp.int32)
        segment_BxT = jnp.ones_like(tokens_BxT) if mask_BxT is None else jnp.asarray(mask_BxT, jnp.int32)
        position_BxT = jnp.maximum(jnp.cumsum(segment_BxT, axis=1) - 1, 0)
        inputs = {
            "token_BxT": tokens_BxT,
            "segment_BxT": segment_BxT,
            "position_BxTx3": jnp.repeat(position_BxT[..., None], 3, axis=-1),
        }
    graph, state = nnx.split(model)
    return _forward(graph, state, ModelInputs(**inputs))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, state: nnx.State, inputs: ModelInputs) -> jax.Array:
    model = nnx.merge(graph, state)
    return logits(model, hidden_states(model, inputs))


def rotary(position_BxTx3: jax.Array, config: Qwen3VLConfig) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, float32 [B, T, 1, A/2].

    The pairs alternate between time, height and width (interleaved M-RoPE): height and width get every third one up to
    3 · their section, time all the others."""
    pairs = config.head_dim // 2
    axis_P = np.zeros(pairs, np.int32)
    for axis in (1, 2):
        axis_P[axis : 3 * config.mrope_section[axis] : 3] = axis
    frequency_P = frequencies(pairs, config.rope_theta)
    angle_BxTx1xP = (position_BxTx3[..., axis_P].astype(jnp.float32) * frequency_P[None, None])[:, :, None]
    return jnp.cos(angle_BxTx1xP), jnp.sin(angle_BxTx1xP)


def _embed(params: dict, inputs: ModelInputs, config: Qwen3VLConfig, dtype: jnp.dtype, remat: str):
    """Return token embeddings with image features at the placeholders: (x_BxTxD, deep_nxBxTxD or None)."""
    # Each device holds whole rows of the table: a lookup in a table split along D makes the compiler gather the batch.
    table_VxD = sharding.constrain(params["embedding"], "vocab", None)
    x_BxTxD = sharding.constrain(table_VxD[inputs.token_BxT].astype(dtype), "batch", None, None)
    if inputs.pixels_BxNxF is None:
        return x_BxTxD, None
    tower = functools.partial(vision.features, vision=config.vision, dtype=dtype, remat=remat)
    if remat == "full":  # the tower's activations need not stay in memory while the decoder runs
        tower = jax.checkpoint(tower)
    feature_BxMxD, deep_nxBxMxD = tower(params["vision"], inputs)
    # Every device holds the complete features of its rows, so that taking entries of them needs no other device.
    feature_BxMxD = sharding.constrain(feature_BxMxD, "batch", None, None)
    is_image_BxTx1 = inputs.feature_BxT[..., None] >= 0
    place_BxTx1 = jnp.maximum(inputs.feature_BxT, 0)[..., None]
    x_BxTxD = jnp.where(is_image_BxTx1, jnp.take_along_axis(feature_BxMxD, place_BxTx1, axis=1), x_BxTxD)
    if deep_nxBxMxD is None:
        return x_BxTxD, None
    deep_nxBxMxD = sharding.constrain(deep_nxBxMxD, None, "batch", None, None)
    deep_nxBxTxD = jnp.take_along_axis(deep_nxBxMxD, place_BxTx1[None], axis=2)
    return x_BxTxD, jnp.where(is_image_BxTx1, deep_nxBxTxD, 0)


def _add_deep(x_BxTxD: jax.Array, deep_nxBxTxD: jax.Array | None, index: int | jax.Array) -> jax.Array:
    """Add the deepstack features of decoder layer `index`; only the first n layers have some."""
    if deep_nxBxTxD is None:
        return x_BxTxD
    n = deep_nxBxTxD.shape[0]
    if isinstance(index, int):
        return x_BxTxD + deep_nxBxTxD[index] if index < n else x_BxTxD
    return x_BxTxD + jnp.where(index < n, deep_nxBxTxD[jnp.minimum(index, n - 1)], 0)


def _qkv(x_BxTxD: jax.Array, p: dict, angles: tuple[jax.Array, jax.Array], config: Qwen3VLConfig):
    """Return queries, keys and values of one layer, [B, T, H|K, A]; queries and keys are normalised and rotated."""
    x_BxTxD = rms_norm(x_BxTxD, p["input_norm"], config.norm_epsilon)
    q_BxTxHxA = rms_norm(project(x_BxTxD, p, "q"), p["q_norm"], config.norm_epsilon)
    k_BxTxKxA = rms_norm(project(x_BxTxD, p, "k"), p["k_norm"], config.norm_epsilon)
    return rotate(q_BxTxHxA, angles), rotate(k_BxTxKxA, angles), project(x_BxTxD, p, "v")


def _rest(x_BxTxD: jax.Array, out_BxTxHxA: jax.Array, p: dict, config: Qwen3VLConfig) -> jax.Array:
    """Apply what follows attention in a layer: output projection, residual, SwiGLU, residual."""
    x_BxTxD = x_BxTxD + project(out_BxTxHxA, p, "o", axes=2)
    y_BxTxD = rms_norm(x_BxTxD, p["mlp_norm"], config.norm_epsilon)
    x_BxTxD = x_BxTxD + project(jax.nn.silu(project(y_BxTxD, p, "gate")) * project(y_BxTxD, p, "up"), p, "down")
    return sharding.constrain(x_BxTxD, "batch", None, None)
