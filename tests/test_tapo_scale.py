"""Chunks, meshes and controls: the same answer however the batch is cut, and controls that only change what they
should."""

import re

import jax
import numpy as np
import pytest
import random_tapo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tapo_jax import tapo

P, G, K = 32, 4, 3


def batch(seed=5):
    steps = tapo.encode_steps(random_tapo.groups(seed, P, G, K), steps=K, features=64)
    success = np.random.default_rng(seed).random((P, G)) < 0.4
    step = np.random.default_rng(seed).integers(-1, K, (P * G, 11)).astype(np.int32)
    return steps, success, np.where(success, 0.9, -0.6).astype(np.float32), step


def pipeline(steps, success, advantage, step, key=None, **options):
    result = tapo.transfer(steps, success, advantage, tapo.Settings(**options), key=key)
    token = tapo.token_advantages(advantage, result.advantage_PxS, step)
    return result, token, tapo.diagnostics(result, steps.trajectory_PxS, steps.valid_PxS, success, advantage)


def transfer(arrays, key=None, **options):
    function = jax.jit(lambda *x: tapo.transfer(*x, tapo.Settings(**options), key=key))
    return jax.tree.map(np.asarray, function(*arrays[:3]))


@pytest.mark.parametrize("options", [{}, dict(cluster="leader"), dict(chunks=2), dict(control="shuffled")], ids=str)
def test_sharded_over_prompts_without_gathering(options):
    """Eight devices, four prompts each. The program may add up single numbers (diagnostics, "has anything changed"); no
    collective may carry an array, and each device keeps its own prompts' results."""
    devices = jax.devices()
    assert len(devices) >= 8
    mesh = Mesh(np.array(devices[:8]), ("data",))
    by_prompt = NamedSharding(mesh, PartitionSpec("data"))
    if "control" in options:
        options = {**options, "key": jax.random.key(3)}
    arrays = batch()
    expected = jax.jit(lambda *x: pipeline(*x, **options))(*arrays)
    sharded = jax.device_put(arrays, by_prompt)
    function = jax.jit(lambda *x: pipeline(*x, **options), in_shardings=by_prompt)
    compiled = function.lower(*sharded).compile()
    collectives = re.findall(
        r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)", compiled.as_text()
    )
    for shape, kind in collectives:
        # The random keys (P numbers of 8 bytes) may travel; nothing with S in its shape may.
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\[([\d,]*)\]", shape)]
        assert max(sizes) <= 2 * P and (kind == "all-reduce" or "control" in options), (shape, kind)
    result = function(*sharded)
    assert result[0].advantage_PxS.sharding.is_equivalent_to(by_prompt, 2)
    assert result[1].sharding.is_equivalent_to(by_prompt, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result, expected)


@pytest.mark.parametrize("chunks", [2, 8, 32])
def test_chunks_change_nothing(chunks):
    arrays = batch()
    whole = jax.jit(pipeline)(*arrays)
    parts = jax.jit(lambda *x: pipeline(*x, chunks=chunks))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), parts, whole)


def test_large_chunked_batch_does_not_hold_all_pairs():
    """[P, S, S] float32 is 64 MiB here; eight chunks keep the compiled program's temporaries well below it."""
    steps = tapo.encode_steps(random_tapo.groups(1, 256, 8, 1), steps=32, regions=1, texts=1, numbers=1)
    success, advantage = np.zeros((256, 8), bool), np.zeros((256, 8), np.float32)

    def temporaries(chunks):
        function = jax.jit(lambda *x: tapo.transfer(*x, tapo.Settings(chunks=chunks)))
        return function.lower(steps, success, advantage).compile().memory_analysis().temp_size_in_bytes

    pairs = 256 * 256 * 256 * 4
    assert temporaries(8) < pairs < temporaries(1)


def test_shuffled_control_moves_corrections_within_a_group():
    arrays = batch()
    plain = transfer(arrays)
    mixed = transfer(arrays, control="shuffled", key=jax.random.key(1))
    # every group hands out the same similarities, to other failing steps
    np.testing.assert_allclose(np.sort(plain.sim_PxS, axis=1), np.sort(mixed.sim_PxS, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(plain.corrected_PxS.sum(axis=1), mixed.corrected_PxS.sum(axis=1))
    np.testing.assert_array_equal(plain.clusters_P, mixed.clusters_P)
    assert (plain.corrected_PxS != mixed.corrected_PxS).sum() > 10
    again = transfer(arrays, control="shuffled", key=jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, mixed)


def test_zero_tools_control():
    arrays = batch()
    steps, success, advantage, _ = arrays
    result = transfer(arrays, control="zero_tools")
    failing = steps.valid_PxS & ~np.take_along_axis(success, steps.trajectory_PxS, axis=1)
    own = np.take_along_axis(advantage, steps.trajectory_PxS, axis=1)
    np.testing.assert_array_equal(result.advantage_PxS, np.where(failing, 0, own))
    np.testing.assert_array_equal(result.corrected_PxS, failing)


def test_exact_match_control():
    arrays = batch()
    exact, default = (transfer(arrays, theta=theta) for theta in (1.0, 0.7))
    assert (exact.sim_PxS[exact.corrected_PxS] == 1).all()
    assert 0 < exact.corrected_PxS.sum() < default.corrected_PxS.sum()
