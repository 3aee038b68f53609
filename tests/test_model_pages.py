"""Keys and values in pages: the same numbers as in slots, wherever the pages lie; the kernels as the plain path."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decode_kernel import CONFIG, DEEP, numbers
from test_model_cache import _extend, _whole, cut, model, pictures, text
from torch_models import CONFIGS

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs
from tapo_jax.models import cache, decode_kernel, pages, qwen3_vl

L, N, K, P, A = 3, 9, 2, 128, 128
TABLE = jnp.array([[3, 1, 7], [5, 0, 0], [8, 6, 0], [0, 0, 0]], jnp.int32)


def in_slots(pool, table):
    """The rows of a table as slots of a cache [L, R, K, M·P, A]."""
    return jnp.stack([pages.read(pool, layer, table) for layer in range(pool.shape[0])])


@pytest.mark.parametrize("tokens", [1, 3, 4, 11])
def test_what_is_written_through_a_table_is_read_back_and_nothing_else_changes(tokens):
    """Pages of 4 places: rows that hold 0, 3, 4 and 6 tokens; the third is given only 2 of the new ones, the fourth
    none."""
    size = 4
    pool = numbers(2, 20, 2, size, 8)
    table = jnp.array([[4, 9, 1, 0], [7, 2, 8, 11], [3, 12, 13, 14], [5, 6, 0, 0]], jnp.int32)
    place, count = jnp.array([0, 3, 4, 6]), jnp.array([tokens, tokens, min(tokens, 2), 0])
    new = numbers(4, 2, tokens, 8, seed=1)
    after = pages.write(pool, new, 1, table, place, count)
    np.testing.assert_array_equal(after[0], pool[0])
    kept, own = set(range(1, 20)), np.asarray(pages.read(after, 1, table))
    for row in range(4):
        start, stop = int(place[row]), int(place[row] + count[row])
        np.testing.assert_array_equal(own[row, :, :start], pages.read(pool, 1, table)[row, :, :start])
        np.testing.assert_array_equal(own[row, :, start:stop], new[row, :, : stop - start])
        kept -= {int(page) for page in table[row, start // size : -(-stop // size)]} if stop > start else set()
    assert kept >= {5, 6, 10, 15}
    np.testing.assert_array_equal(after[1, sorted(kept)], pool[1, sorted(kept)])


@pytest.mark.parametrize("name", ["grouped", "deep_stacked"], ids=["a part for each layer", "one part, scanned"])
def test_images_in_two_extensions_and_a_shared_prompt(name):
    """The first 8 tokens lie in pages of 5 places; a second slot shares the first page and has a copy of the other."""
    graph, state = model(name)
    inputs = pictures(name)
    expected = _whole(graph, state, inputs)
    T, middle, size = inputs.token_BxT.shape[1], 8, 5
    width = -(-T // size)
    empty = cache.init_cache(CONFIGS[name], slots=2 * width + 3, capacity=size)
    order = np.random.default_rng(0).permutation(np.arange(1, 2 * width + 3))
    table = np.zeros((2, width), np.int32)
    table[0] = order[:width]
    start = cache.Cache(empty.k, empty.v, jnp.array([0, 0]), jnp.asarray(table))
    rows = jax.tree.map(lambda x: jnp.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1))), inputs)  # slot 1 gets nothing
    first, held = _extend(graph, state, start, cut(rows, 0, middle))
    assert held.length_B.tolist() == [middle, 0]
    table[1] = [table[0, 0], *order[width : 2 * width - 1]]
    copied = [tuple(x.at[:, table[1, 1]].set(x[:, table[0, 1]]) for x in part) for part in (held.k, held.v)]
    held = cache.Cache(*copied, jnp.array([middle, middle]), jnp.asarray(table))
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs)
    second, held = _extend(graph, state, held, cut(rows, middle, T))
    whole = jnp.concatenate([jnp.concatenate([first[:1], first[:1]]), second], 1)
    np.testing.assert_allclose(whole, jnp.concatenate([expected, expected]), atol=1e-5)
    assert held.length_B.tolist() == [T, T]


def test_rows_of_different_lengths_then_decoding_as_in_slots():
    graph, state = model("grouped")
    rows = [[8, 9], [], [3, 4, 5, 6, 7], [10, 11, 12]]
    slots = cache.init_cache(CONFIGS["grouped"], slots=4, capacity=16)
    pool = cache.init_cache(CONFIGS["grouped"], slots=12, capacity=4)
    table = jnp.array([[7, 0, 0, 0], [0, 0, 0, 0], [2, 9, 0, 0], [4, 11, 0, 0]], jnp.int32)
    paged = cache.Cache(pool.k, pool.v, jnp.zeros(4, jnp.int32), table)
    for given, start in ((rows, 0), ([[20], [], [21], []], [2, 0, 5, 3]), ([[], [], [22], [1]], [3, 0, 6, 3])):
        plain, slots = _extend(graph, state, slots, text(given, start))
        ours, paged = _extend(graph, state, paged, text(given, start))
        assert paged.length_B.tolist() == slots.length_B.tolist()
        for row, ids in enumerate(given):
            np.testing.assert_allclose(ours[row, : len(ids)], plain[row, : len(ids)], atol=1e-6)
    for part in (*paged.k, *paged.v):
        assert not np.asarray(part)[:, [1, 3, 5, 6, 8, 10]].any()


@pytest.mark.parametrize("name", ["grouped", "deep_stacked"], ids=["a part for each layer", "one part, scanned"])
def test_decoding_copies_no_pool(name):
    """The compiled loop of decoding steps needs room for the rows' own pages of a layer, not for another pool."""
    graph, state = model(name)
    pool = cache.init_cache(CONFIGS[name], slots=257, capacity=64)
    held = cache.Cache(pool.k, pool.v, pool.length_B[:8], jnp.arange(1, 33, dtype=jnp.int32).reshape(8, 4))

    def steps(held):
        return jax.lax.fori_loop(0, 4, lambda _, held: _extend(graph, state, held, text([[1]] * 8))[1], held)

    compiled = jax.jit(steps, donate_argnums=0).lower(held).compile()
    size = sum(part.nbytes for part in (*held.k, *held.v))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    assert compiled.memory_analysis().temp_size_in_bytes < size / 4


# The kernels, step by step on this machine.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_writes_one_place_of_a_page(dtype):
    """The last place of a page, the first and an inner one; the fourth slot is not active and writes to page 0."""
    pool, new = numbers(L, N, K, P, A, dtype=dtype), numbers(4, K, A, dtype=dtype, seed=1)
    place, active = jnp.array([2 * P - 1, 0, P + 17, 5]), jnp.array([1, 1, 1, 0])
    ours = decode_kernel.write(pool, new, 1, place, active, TABLE, interpret=True)
    plain = pages.write(pool, new[:, :, None], 1, TABLE, place, active)
    np.testing.assert_array_equal(ours[:, 1:], plain[:, 1:])
    assert np.any(np.asarray(ours != pool))


@pytest.mark.parametrize("size", [128, 384, 512])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_kernel_attends_over_pages(groups, size):
    """Lengths of 0, one place, inside a page, at its end, and all places. Pages of no row hold huge numbers, which
    nobody sees."""
    table = jnp.array([[3, 1, 7], [5, 0, 0], [8, 6, 0], [4, 2, 9], [0, 0, 0]], jnp.int32)
    k, v, q = numbers(2, 10, K, size, A), numbers(2, 10, K, size, A, seed=1), numbers(5, K * groups, A, seed=2)
    k, v = k.at[:, 0].set(1e9), v.at[:, 0].set(1e9)
    length = jnp.array([2 * size + 50, 1, 2 * size, 3 * size, 0])
    ours = decode_kernel.attend(q, k, v, 1, length, table, interpret=True)
    plain = decode_kernel.attend(q, in_slots(k, table), in_slots(v, table), 1, length, interpret=True)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert not np.any(ours[4]) and np.all(np.any(np.asarray(ours[:4]) != 0, axis=-1))


@pytest.mark.parametrize("config", [CONFIG, DEEP], ids=["a part for each layer", "one part, scanned"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=["one device", "slots and heads split"])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_decoding_step_of_the_model_is_that_of_slots(config, mesh, kernel, monkeypatch):
    """Slots of length 0, 1 and 130 of 256 get a token, the fourth gets none. On two devices each has its own pages."""
    graph, state = nnx.split(qwen3_vl.Qwen3VL(config, rngs=nnx.Rngs(0)))
    shards, length = mesh[0], jnp.array([0, 1, 130, 7])
    inside = np.array([[1, 0], [3, 0], [2, 4], [1, 0]] if shards == 2 else [[6, 0], [1, 0], [4, 2], [3, 0]], np.int32)
    whole = inside + (np.arange(4)[:, None] // 2 * 6 if shards == 2 else 0)
    empty = cache.init_cache(config, 12, 128)
    pools = [[numbers(*part.shape, seed=i) for i, part in enumerate(parts)] for parts in (empty.k, empty.v)]
    segment = jnp.array([[1], [1], [1], [0]])
    inputs = ModelInputs(jnp.array([[20], [21], [22], [0]]), segment, jnp.tile(length[:, None, None], (1, 1, 3)))
    step = lambda state, held: qwen3_vl.extend(nnx.merge(graph, state), held, inputs)  # noqa: E731
    slots = cache.Cache(*(tuple(in_slots(part, whole) for part in parts) for parts in pools), length)
    plain, plain_cache = jax.jit(step)(state, slots)
    if kernel:
        monkeypatch.setattr(qwen3_vl, "decodes_in_place", lambda **sizes: decode_kernel.suits(**sizes))
        for name in ("write", "attend"):
            called = functools.partial(getattr(decode_kernel, name), interpret=True)
            monkeypatch.setattr(decode_kernel, name, called)
    mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
    held = cache.Cache(*(tuple(parts) for parts in pools), length, jnp.asarray(inside))
    state, held = jax.device_put((state, held), sharding.replicated(mesh))
    with sharding.on(mesh):
        ours, ours_cache = jax.jit(lambda *a: step(*a))(state, held)
    np.testing.assert_allclose(ours[:3], plain[:3], atol=2e-5)
    assert ours_cache.length_B.tolist() == [1, 2, 131, 7]
    for one, other in zip(ours_cache.k + ours_cache.v, plain_cache.k + plain_cache.v, strict=True):
        for row, count in enumerate([1, 2, 131, 7]):
            np.testing.assert_allclose(in_slots(one, whole)[:, row, :, :count], other[:, row, :, :count], atol=1e-5)


def test_what_the_kernels_over_pages_cost():
    """As without pages: two slots of five pages, 2 key heads with 8 queries each, pages of 128 places."""
    dims = [(2,), (2,), (10,), (2, 2, 8, 128), (3, 9, 2, 128, 128), (3, 9, 2, 128, 128)]
    assert decode_kernel.kernel_flops("jit(f)/page_attend", dims) == 2 * 2 * (2 * 2 * 8 * 640 * 128)
    assert decode_kernel.kernel_numbers("jit(f)/page_attend", dims, 0.5) == 2 * 2 * 2 * (8 + 320) * 128
    write = [(2,), (2,), (2,), (2,), (2, 2, 1, 128), (3, 9, 2, 128, 128)]
    assert decode_kernel.kernel_numbers("jit(f)/page_write", write) == 2 * (2 * 2 * 16 * 128)
    assert decode_kernel.kernel_flops("jit(f)/page_write", write) == 0
