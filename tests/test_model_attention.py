"""Attention backends agree where they run here: XLA's blocks, splash step by step, cuDNN's call in its XLA form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapo_jax import sharding
from tapo_jax.models import attention as lib
from tapo_jax.models import splash
from tapo_jax.models.splash import splash_attention


def case(B=2, T=192, H=4, K=2, A=16, seed=0, segments=True):
    """Packed rows: two episodes and padding of 0 behind them; the second row is one episode."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, A)), jnp.float32) for heads in (H, K, K))
    segment = np.ones((B, T), np.int32)
    if segments:
        segment[0, T // 3 :], segment[0, T - T // 8 :] = 2, 0
    return q, k, v, jnp.asarray(segment)


def reference(q, k, v, segment, causal):
    """Every pair of places, softmax in float64 over those allowed."""
    q, k, v, segment = (np.asarray(x, np.float64) for x in (q, k, v, segment))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    score = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    allowed = (segment[:, :, None] == segment[:, None, :])[:, None]
    if causal:
        allowed = allowed & np.tril(np.ones(score.shape[-2:], bool))
    weight = np.where(allowed, np.exp(score - score.max(-1, keepdims=True)), 0)
    return np.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdims=True), v)


BACKENDS = {
    "xla": lib.xla_attention,
    "splash": functools.partial(splash_attention, interpret=True),
    "cudnn": functools.partial(lib.cudnn_attention, implementation="xla"),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_definition(backend, causal):
    """T = 192: three blocks of queries in the XLA form, and no multiple of the kernel's 128."""
    q, k, v, segment = case()
    out = BACKENDS[backend](q, k, v, segment, segment, causal=causal)
    np.testing.assert_allclose(out, reference(q, k, v, segment, causal), atol=2e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_gradients_agree(causal):
    """The backward passes written by hand, XLA's and the kernel's, against jax differentiating jax.nn's attention."""
    q, k, v, segment = case(T=128)
    w = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    ours = {}
    for name, function in BACKENDS.items():
        run = lambda *a, f=function: jnp.sum(w * f(*a, segment, segment, causal=causal))  # noqa: E731
        ours[name] = jax.jit(jax.grad(run, argnums=(0, 1, 2)))(q, k, v)
    for name in ("xla", "splash"):
        for mine, plain in zip(ours[name], ours["cudnn"], strict=True):
            np.testing.assert_allclose(mine, plain, atol=5e-5, err_msg=name)


def test_a_packed_row_equals_its_episodes_alone():
    q, k, v, segment = case(B=1)
    whole = lib.attention(q, k, v, segment, segment, causal=True)
    for number in (1, 2):
        own = np.flatnonzero(np.asarray(segment[0]) == number)
        part = slice(own[0], own[-1] + 1)
        ones = jnp.ones((1, len(own)), jnp.int32)
        alone = lib.attention(q[:, part], k[:, part], v[:, part], ones, ones, causal=True)
        np.testing.assert_allclose(whole[:, part], alone, atol=1e-5)


@pytest.mark.parametrize("T", [1, 3, 300])
def test_cached(T):
    """Rows of different lengths; 300 new tokens go in blocks of 256. What lies behind a row's places is not seen."""
    B, H, K, A, S = 3, 4, 2, 8, 340
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((B, T, H, A)), jnp.float32)
    k, v = (rng.standard_normal((B, K, S, A)).astype(np.float32) for _ in range(2))
    length = np.array([0, 5, 40])
    out = lib.cached_attention(q, jnp.asarray(k), jnp.asarray(v), jnp.asarray(length))
    for b in range(B):
        end = length[b] + T
        padded = np.zeros((1, end, H, A), np.float32)
        padded[0, length[b] :] = q[b]
        rows = [np.moveaxis(x[b : b + 1, :, :end], 1, 2) for x in (k, v)]
        expected = reference(padded, *rows, np.ones((1, end)), True)[0, length[b] :]
        np.testing.assert_allclose(out[b], expected, atol=2e-5)
    spoiled = [np.where(np.arange(S)[None, None, :, None] >= length[:, None, None, None] + T, 1e9, x) for x in (k, v)]
    again = lib.cached_attention(q, *(jnp.asarray(x, jnp.float32) for x in spoiled), jnp.asarray(length))
    np.testing.assert_array_equal(again, out)


def test_blocks_of_queries_bound_the_scores():
    """16,384 places, 32 heads: 256 queries of one row are 2^27 scores; 4 rows go in blocks of 64, unless 4 devices
    share them. Never fewer than 32."""
    assert [lib.query_block(rows, 32, 16384) for rows in (1, 4, 64)] == [256, 64, 32]
    assert lib.query_block(64, 4, 340) == 256
    with sharding.on(sharding.make_mesh(4, 1, 2)):
        assert lib.query_block(4, 64, 16384) == 256


def test_choice_of_backend():
    """By the platform of the mesh that is traced for, so that a program for TPUs can be compiled here."""
    assert lib.platform() == "cpu"
    assert lib.choose_backend("cpu", jnp.bfloat16, 128) == "xla"
    assert lib.choose_backend("tpu", jnp.float32, 128) == "splash"
    assert lib.choose_backend("gpu", jnp.bfloat16, 128) == lib.choose_backend("cuda", jnp.float16, 64) == "cudnn"
    # What cuDNN's kernel does not take.
    assert lib.choose_backend("cuda", jnp.float32, 128) == "xla"
    assert lib.choose_backend("cuda", jnp.bfloat16, 36) == "xla"
    q, k, v, segment = case(T=8)
    with pytest.raises(KeyError, match="fast"):
        lib.attention(q, k, v, segment, segment, causal=True, backend="fast")


def test_bfloat16_stays_close_and_keeps_its_dtype():
    q, k, v, segment = case(T=96)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = lib.attention(*narrow, segment, segment, causal=True)
    assert out.dtype == jnp.bfloat16
    expected = reference(*(np.asarray(x, np.float32) for x in narrow), segment, True)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)  # 8 bits of mantissa


@pytest.mark.parametrize("rows, batch", [(1, ()), (3, (3,))])
def test_flops_of_the_compiled_kernels(rows, batch):
    """Operands as the TPU compiler writes them, of 8 heads, 4 key heads, 1,024 places of 128 numbers in blocks of 512:
    of 2 × 2 blocks the causal kernel visits 3. Forward 2 products of a block, backward 3 and 4; 2 flops each."""
    q, k, tables, segments = (*batch, 8, 1024, 128), (*batch, 4, 1024, 128), [(1, 2, 2)] * 2, [(*batch, 1024, 128)]
    one = 2 * rows * 8 * 1024 * 1024 * 128
    for name, products in (("fwd", 2), ("dq", 3), ("dkv", 4)):
        for scope, share in ((splash.CAUSAL, 0.75), (splash.FULL, 1.0)):
            dims = [*tables, q, k, k, *segments, (*batch, 8, 1024)]
            assert splash.kernel_flops(f"jit(f)/{scope}/splash_mha_{name}_x", dims) == products * share * one
    assert splash.kernel_flops("jit(f)/cache_attend", []) == 0
