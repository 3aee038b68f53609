import json

import jax
import numpy as np
import pytest
import random_tapo
import reference_tapo

from tapo_jax import tapo
from tapo_jax.bench import __main__ as bench
from tapo_jax.bench import tapo as bench_tapo
from tapo_jax.bench import tapo_loops


def test_loop_of_the_benchmark_equals_the_reference():
    """What the kernel is timed against computes the same thing as the kernel and as the tests' own loops."""
    P, G, K = 24, 4, 3
    steps = tapo.encode_steps(random_tapo.groups(2, P, G, K), steps=K, features=64)
    success = np.random.default_rng(0).random((P, G)) < 0.5
    advantage = np.where(success, 0.9, -0.6).astype(np.float32)
    kernel = np.asarray(jax.jit(tapo.transfer)(steps, success, advantage).advantage_PxS)
    agree = 0
    for p, slots in enumerate(tapo_loops.as_lists(steps)):
        own = advantage[p].astype(float).tolist()
        result = tapo_loops.transfer(slots, success[p].tolist(), own, 0.7, 0.25, 0.8)
        sim = [[tapo_loops.similarity(a, b) for b in slots] for a in slots]
        expected = reference_tapo.group_transfer(
            sim,
            steps.trajectory_PxS[p].tolist(),
            steps.valid_PxS[p].tolist(),
            success[p].tolist(),
            own,
            theta=0.7,
            alpha_min=0.25,
            beta=0.8,
        )
        np.testing.assert_allclose(result, expected["advantage"], rtol=1e-12)
        agree += np.allclose(result, kernel[p], atol=1e-6)
    assert agree >= P - 1  # a float32 and a float64 similarity may fall on two sides of 0.7


@pytest.mark.parametrize(
    "arguments",
    [
        ["tapo", "--sizes", "small", "--mixes", "search", "--tokens", "8"],
        ["losses", "--rows", "4", "--tokens", "16"],
        ["search", "--passages", "200", "--dimensions", "8"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_prints_a_table_and_writes_json(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench_tapo.SIZES, "small", (2, 2, 2, 2))
    out = tmp_path / "out.json"
    bench.main([*arguments, "--repeats", "1", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["benchmark"] == arguments[0] and written["rows"]
    assert {row.get("equal", True) for row in written["rows"]} <= {True, ""}  # both searches found the same
    printed = capsys.readouterr().out
    assert all(name in printed for name in written["rows"][0])
