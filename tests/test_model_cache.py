"""Extending slots of the cache gives what the whole forward gives, slot by slot, and touches no other slot."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_models import CONFIGS, conversation

from tapo_jax.batch import ModelInputs
from tapo_jax.models import positions, qwen3_vl
from tapo_jax.models.cache import init_cache

TOLERANCE = 1e-5
PER_TOKEN = ("token_BxT", "segment_BxT", "position_BxTx3", "feature_BxT")


@functools.cache
def model(name):
    return nnx.split(qwen3_vl.Qwen3VL(CONFIGS[name], rngs=nnx.Rngs(1)))


@functools.partial(jax.jit, static_argnums=0)
def _extend(graph, state, cache, inputs):
    return qwen3_vl.extend(nnx.merge(graph, state), cache, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _whole(graph, state, inputs):
    return qwen3_vl.hidden_states(nnx.merge(graph, state), inputs)


def cut(inputs, start, stop):
    return dataclasses.replace(inputs, **{name: getattr(inputs, name)[:, start:stop] for name in PER_TOKEN})


def pictures(name):
    """A conversation with two images, padded in T, as inputs of one row."""
    config = CONFIGS[name]
    merge = config.vision.merge
    tokens, pixels, grid = conversation(config, [(1, 2 * merge, merge), (1, merge, merge)], text=4)
    return ModelInputs(**jax.tree.map(jnp.asarray, positions.row_inputs(tokens, pixels, grid, None, config)))


def text(rows, start=0):
    """Rows of given ids, left-aligned; position = index."""
    T = max(len(row) for row in rows)
    token, segment = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), np.int32)
    for b, row in enumerate(rows):
        token[b, : len(row)], segment[b, : len(row)] = row, 1
    place = np.arange(T)[None, :, None] + np.broadcast_to(start, len(rows))[:, None, None] + np.zeros((1, 1, 3), int)
    return ModelInputs(jnp.asarray(token), jnp.asarray(segment), jnp.asarray(place, jnp.int32))


@pytest.mark.parametrize("name", ["grouped", "deep_stacked"], ids=["a part for each layer", "one part, scanned"])
def test_images_in_two_extensions_into_one_slot(name):
    graph, state = model(name)
    inputs = pictures(name)
    expected = _whole(graph, state, inputs)
    T, middle = inputs.token_BxT.shape[1], 8
    cache = init_cache(CONFIGS[name], slots=3, capacity=32)
    rows = jax.tree.map(lambda x: jnp.pad(x, ((1, 1), *[(0, 0)] * (x.ndim - 1))), inputs)  # slots 0 and 2 get nothing
    first, cache = _extend(graph, state, cache, cut(rows, 0, middle))
    second, cache = _extend(graph, state, cache, cut(rows, middle, T))
    np.testing.assert_allclose(jnp.concatenate([first, second], 1)[1:2], expected, atol=TOLERANCE)
    assert cache.length_B.tolist() == [0, T, 0]
    for part in (*cache.k, *cache.v):
        assert not np.asarray(part)[:, [0, 2]].any()


def test_rows_of_different_lengths_then_decoding():
    """Three of four slots get a prompt, the second none; then a token for two of them."""
    graph, state = model("grouped")
    rows = [[8, 9], [], [3, 4, 5, 6, 7], [10, 11, 12]]
    cache = init_cache(CONFIGS["grouped"], slots=4, capacity=16)
    hidden, cache = _extend(graph, state, cache, text(rows))
    assert cache.length_B.tolist() == [2, 0, 5, 3]
    for b, row in enumerate(rows):
        if row:
            np.testing.assert_allclose(hidden[b, : len(row)], _whole(graph, state, text([row]))[0], atol=TOLERANCE)
    before = cache
    hidden, cache = _extend(graph, state, cache, text([[20], [], [21], []], start=[2, 0, 5, 3]))
    assert cache.length_B.tolist() == [3, 0, 6, 3]
    np.testing.assert_allclose(hidden[0, 0], _whole(graph, state, text([[8, 9, 20]]))[0, -1], atol=TOLERANCE)
    np.testing.assert_allclose(hidden[2, 0], _whole(graph, state, text([[*rows[2], 21]]))[0, -1], atol=TOLERANCE)
    for old, new in zip(before.k + before.v, cache.k + cache.v, strict=True):
        np.testing.assert_array_equal(np.asarray(old)[:, [1, 3]], np.asarray(new)[:, [1, 3]])


def test_padding_needs_no_room():
    """A slot of 8 places holds 5; 3 more tokens padded to 6 fill it to the last place and spoil none."""
    graph, state = model("grouped")
    cache = init_cache(CONFIGS["grouped"], slots=2, capacity=8)
    _, cache = _extend(graph, state, cache, text([[3, 4, 5, 6, 7], [8]]))
    padded = text([[9, 10, 11, 0, 0, 0], [12, 13, 0, 0, 0, 0]], start=[5, 1])
    segment = jnp.asarray([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    hidden, cache = _extend(graph, state, cache, dataclasses.replace(padded, segment_BxT=segment))
    assert cache.length_B.tolist() == [8, 3]
    for b, ids in enumerate(([3, 4, 5, 6, 7, 9, 10, 11], [8, 12, 13])):
        new = int(segment[b].sum())
        np.testing.assert_allclose(hidden[b, :new], _whole(graph, state, text([ids]))[0, -new:], atol=TOLERANCE)


def test_decoding_copies_no_cache():
    """The compiled loop of decoding steps needs far less room than a second cache, when the first one is donated."""
    graph, state = model("grouped")
    cache = init_cache(CONFIGS["grouped"], slots=8, capacity=4096)

    def steps(cache):
        def step(_, cache):
            return _extend(graph, state, cache, text([[1]] * 8))[1]

        return jax.lax.fori_loop(0, 4, step, cache)

    compiled = jax.jit(steps, donate_argnums=0).lower(cache).compile()
    size = sum(part.nbytes for part in (*cache.k, *cache.v))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    assert compiled.memory_analysis().temp_size_in_bytes < size / 4
