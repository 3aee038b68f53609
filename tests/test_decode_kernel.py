"""The two kernels of decoding on TPU, step by step on this machine, against XLA's path of the same work."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs
from tapo_jax.bench import model
from tapo_jax.compile_check import hlo_costs
from tapo_jax.models import attention, cache, decode_kernel, qwen3_vl
from tapo_jax.models.config import Qwen3VLConfig

L, B, K, S, A = 3, 4, 2, 640, 128  # 640 places: five blocks of 128


def numbers(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_equals_the_scatter(dtype):
    """First, inner and last place; the fourth slot is full and not active, and stays as it is."""
    whole, new = numbers(L, B, K, S, A, dtype=dtype), numbers(B, K, A, dtype=dtype, seed=1)
    place, active = jnp.array([0, 17, S - 1, S]), jnp.array([1, 1, 1, 0])
    ours = decode_kernel.write(whole, new, 1, place, active, interpret=True)
    target = jnp.where(active > 0, jnp.arange(B), B)
    np.testing.assert_array_equal(ours, cache.write(whole, new[:, :, None], 1, target, place))


@pytest.mark.parametrize("groups", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_attend_equals_cached_attention(groups, dtype, tolerance):
    """Lengths of one place, inside a block, at its end, and all places; groups of 1 head to more than a tile."""
    k, v, q = (numbers(*shape, dtype=dtype) for shape in ((L, B, K, S, A), (L, B, K, S, A), (B, K * groups, A)))
    length = jnp.array([1, 130, 256, S])
    ours = decode_kernel.attend(q, k, v, 2, length, interpret=True)
    plain = attention.cached_attention(q[:, None], k[2], v[2], length - 1)[:, 0]
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), atol=tolerance)


def test_an_empty_slot_gives_nothing_and_what_lies_behind_is_not_seen():
    k, v, q = numbers(L, B, K, S, A), numbers(L, B, K, S, A, seed=1), numbers(B, 2 * K, A, seed=2)
    length = jnp.array([0, 3, 200, 500])
    ours = decode_kernel.attend(q, k, v, 0, length, interpret=True)
    assert not np.any(ours[0]) and np.all(np.any(np.asarray(ours[1:]) != 0, axis=-1))
    behind = (jnp.arange(S)[None] >= length[:, None])[None, :, None, :, None]
    again = decode_kernel.attend(q, jnp.where(behind, 1e9, k), jnp.where(behind, 1e9, v), 0, length, interpret=True)
    np.testing.assert_array_equal(ours, again)


CONFIG = Qwen3VLConfig(**{**vars(model.ATLAS), "head_dim": A, "mrope_section": (24, 20, 20), "layers": 2})
DEEP = Qwen3VLConfig(**{**vars(CONFIG), "layers": cache.UNROLLED_LAYERS + 1})


@pytest.mark.parametrize("config", [CONFIG, DEEP], ids=["a part for each layer", "one part, scanned"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=["one device", "slots and heads split"])
def test_a_decoding_step_of_the_model_is_the_same(config, mesh, monkeypatch):
    """Slots of length 0, 1 and 130 of 256 get a token, the fourth gets none."""
    graph, state = nnx.split(qwen3_vl.Qwen3VL(config, rngs=nnx.Rngs(0)))
    held = cache.init_cache(config, 4, 256)
    filled = [numbers(*part.shape, seed=i) for i, part in enumerate((*held.k, *held.v))]
    held = cache.Cache(tuple(filled[: len(held.k)]), tuple(filled[len(held.k) :]), jnp.array([0, 1, 130, 7]))
    segment = jnp.array([[1], [1], [1], [0]])
    inputs = ModelInputs(jnp.array([[20], [21], [22], [0]]), segment, jnp.tile(held.length_B[:, None, None], (1, 1, 3)))
    step = lambda state, held: qwen3_vl.extend(nnx.merge(graph, state), held, inputs)  # noqa: E731
    plain, plain_cache = jax.jit(step)(state, held)
    monkeypatch.setattr(qwen3_vl, "decodes_in_place", lambda **sizes: decode_kernel.suits(**sizes))
    for name in ("write", "attend"):
        kernel = functools.partial(getattr(decode_kernel, name), interpret=True)
        monkeypatch.setattr(decode_kernel, name, kernel)
    mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
    state, held = jax.device_put((state, held), sharding.replicated(mesh))
    with sharding.on(mesh):
        ours, ours_cache = jax.jit(lambda *a: step(*a))(state, held)
    np.testing.assert_allclose(ours[:3], plain[:3], atol=2e-5)
    for one, other in zip(jax.tree.leaves(ours_cache), jax.tree.leaves(plain_cache), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_only_programs_for_tpus_decode_in_place():
    sizes = {"kv_heads": 2, "capacity": 256, "head_dim": 128}
    assert not attention.decodes_in_place(**sizes)
    assert decode_kernel.suits(**sizes)
    assert not decode_kernel.suits(**sizes | {"head_dim": 64})
    assert not decode_kernel.suits(**sizes | {"capacity": 200})
    with sharding.on(sharding.make_mesh(2, 1, 4)):
        assert not decode_kernel.suits(**sizes)  # 2 heads over 4 devices


def test_what_the_kernels_cost():
    """Of two slots, 2 key heads with 8 queries each, 640 places of 128 numbers: scores and sums, 2 flops each; every
    key and value read once."""
    dims = [(2,), (2,), (2, 2, 8, 128), (3, 2, 2, 640, 128), (3, 2, 2, 640, 128)]
    assert decode_kernel.kernel_flops("jit(f)/cache_attend", dims) == 2 * 2 * (2 * 2 * 8 * 640 * 128)
    assert decode_kernel.kernel_numbers("jit(f)/cache_attend", dims) == 2 * 2 * 2 * (8 + 640) * 128
    write = [(2,), (2,), (2,), (2, 2, 1, 128), (3, 2, 2, 640, 128)]
    assert decode_kernel.kernel_numbers("jit(f)/cache_write", write) == 2 * (2 * 2 * 16 * 128)
    assert decode_kernel.kernel_flops("jit(f)/cache_write", write) == 0
    assert decode_kernel.kernel_numbers("jit(f)/splash_mha_fwd", dims) is None


def test_a_kernel_that_says_what_it_moves_is_taken_at_its_word():
    text = (
        "HloModule m\n\nENTRY %main () -> bf16[64,128] {\n  %k = bf16[64,128]{1,0} parameter(0)\n"
        '  ROOT %y = bf16[64,128]{1,0} custom-call(%k), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/cache_write"}\n}\n'
    )
    speeds = {"flops_per_s": 1.0, "bytes_per_s": 1e30}
    assert hlo_costs.costs(text, **speeds, kernel_numbers=lambda name, dims: 100).traffic == 200
    assert hlo_costs.costs(text, **speeds, kernel_numbers=lambda name, dims: None).traffic == 2 * 64 * 128 * 2
