"""Adaptive thresholds, witness memory, text from embeddings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapo_jax import tapo
from tapo_jax.tapo import adaptive as tapo_adaptive
from tapo_jax.tapo import embedding
from tapo_jax.tapo import memory as tapo_memory
from tapo_jax.types import Identity, Number, Region, Text

pairwise = jax.jit(tapo.pairwise_similarity, static_argnames="text")
transfer = jax.jit(tapo.transfer)
update = jax.jit(tapo_adaptive.update, static_argnames="settings")
thresholds = jax.jit(tapo_adaptive.thresholds)


def batch(rng, P=8, G=4, K=2):
    """Two tools; zooms of a group lie anywhere near its corner, searches of a group are one of two."""

    def call():
        if rng.random() < 0.5:
            x, y = rng.uniform(0, 0.3, 2)
            return ("zoom", (Region(1, (x, y, x + 0.5, y + 0.5)),))
        return ("search", (Text(rng.choice(["eiffel tower height", "louvre glass pyramid"])),))

    groups = [[[call() for _ in range(K)] for _ in range(G)] for _ in range(P)]
    return tapo.encode_steps(groups, steps=K, regions=1, texts=1, numbers=0), rng.random((P, G)) < 0.7


def test_adaptive_threshold_becomes_the_quantile():
    """After many batches P(sim ≤ theta) of the zooms is the quantile asked for; the searches' similarities are 1 half
    of the
    time, so that their 0.8-quantile is 1."""
    rng = np.random.default_rng(0)
    batches = [batch(rng) for _ in range(16)]
    state = tapo_adaptive.init(tapo_adaptive.Settings(("zoom", "search", "never")), 0.7)

    @functools.partial(jax.jit, static_argnames="rate")
    def learn(state, steps, success, rate):
        settings = tapo_adaptive.Settings((), quantile=0.8, rate=rate)
        return tapo_adaptive.update(state, steps, tapo.pairwise_similarity(steps), success, settings)

    for rate in [0.05] * 30 + [0.005] * 100:
        steps, success = batches[int(rng.integers(16))]
        state = learn(state, steps, success, rate)
    pairs, below = 0, 0
    for steps, success in batches:
        sim, name = np.asarray(pairwise(steps)), tapo.name_hash("zoom")
        witness = np.take_along_axis(success, steps.trajectory_PxS, axis=1) & (steps.tool_PxS == name)
        other = steps.trajectory_PxS[:, :, None] != steps.trajectory_PxS[:, None, :]
        pair = witness[:, :, None] & witness[:, None, :] & other
        pairs, below = pairs + pair.sum(), below + (pair & (sim <= float(state.theta_N[0]))).sum()
    assert abs(below / pairs - 0.8) < 0.03
    assert float(state.theta_N[1]) > 0.95
    assert float(state.theta_N[2]) == np.float32(0.7) and float(state.pairs_N[2]) == 0


def test_adaptive_update_by_hand():
    # Three successes; zooms with IoU 1/3 (0 and 1), and 1 (0 and 2), so 1/3 (1 and 2): two of three pairs are ≤ 0.7.
    near, far = ("zoom", (Region(1, (0.0, 0.0, 0.4, 0.4)),)), ("zoom", (Region(1, (0.2, 0.0, 0.6, 0.4)),))
    steps = tapo.encode_steps([[[near, near], [far], [near], [far]]], steps=2)
    success = np.array([[True, True, True, False]])
    settings = tapo_adaptive.Settings(("zoom",), quantile=0.8, rate=0.1)
    state = tapo_adaptive.init(settings, 0.7)
    new = update(state, steps, pairwise(steps), success, settings)
    # The first rollout's two equal zooms are two witnesses: pairs (0,1)×2, (0,2)×2, (1,2): five, of them three at 1/3;
    # a pair within one rollout does not count.
    assert float(new.pairs_N[0]) == 5
    np.testing.assert_allclose(new.theta_N[0], 0.7 + 0.1 * (0.8 - 3 / 5), rtol=1e-6)
    nobody = update(state, steps, pairwise(steps), np.zeros((1, 4), bool), settings)
    assert float(nobody.theta_N[0]) == np.float32(0.7)
    with pytest.raises(ValueError, match="quantile"):
        tapo_adaptive.Settings(("zoom",), quantile=1.0)


def test_adaptive_thresholds_act_per_tool():
    near, far = ("zoom", (Region(1, (0.0, 0.0, 0.4, 0.4)),)), ("zoom", (Region(1, (0.2, 0.0, 0.6, 0.4)),))
    a, b = (("search", (Text(text),)) for text in ("eiffel tower height", "eiffel tower heights"))
    steps = tapo.encode_steps([[[near, a], [far, b]]], steps=2)
    success, advantage = np.array([[True, False]]), np.float32([[1, -1]])
    state = tapo_adaptive.init(tapo_adaptive.Settings(("zoom", "search")), 0.7)
    state = tapo_adaptive.AdaptiveTheta(state.tool_N, jnp.array([0.3, 0.99]), state.pairs_N)
    theta = thresholds(state, steps, 0.7)
    np.testing.assert_allclose(theta, [[0.3, 0.99, 0.3, 0.99]], rtol=1e-6)
    fixed = transfer(steps, success, advantage)
    adaptive = transfer(steps, success, advantage, theta_PxS=theta)
    assert fixed.corrected_PxS.tolist() == [[False, False, False, True]]
    assert adaptive.corrected_PxS.tolist() == [[False, False, True, False]]
    unknown = thresholds(tapo_adaptive.init(tapo_adaptive.Settings(("calculator",)), 0.5), steps, 0.7)
    np.testing.assert_allclose(unknown, np.full((1, 4), 0.7), rtol=1e-6)


ZOOM = ("zoom", (Region(-5, (0.1, 0.2, 0.3, 0.4)), Identity("x"), Number(1.5, 0.0, 4.0), Text("tower")))
SEARCH = ("search", (Text("height"),))


def test_memory_corrects_a_group_that_fails_throughout():
    groups = [[[ZOOM, SEARCH], [None, SEARCH]]]
    won, advantage = np.array([[True, False]]), np.float32([[0.9, -0.9]])
    memory = tapo_memory.remember({}, 10, ["q"], groups, won, advantage, tapo_memory.Settings(5, 2))
    assert [entry["step"] for entry in memory["q"]] == [10] and json.loads(json.dumps(memory)) == memory
    # Two steps later nobody answers. The remembered success weighs 0.5² and its advantage counts 0.5²·0.9; it is the
    # only success, so sup = 1.
    now = [[[SEARCH], [ZOOM]]]
    extended, success, advantage, weight = tapo_memory.recall(memory, 12, ["q"], now, tapo_memory.Settings(5, 2, 0.5))
    assert extended[0][2] == [ZOOM, SEARCH] and extended[0][3] == []
    assert success.tolist() == [[True, False]] and weight.tolist() == [[0.25, 0.0]]
    steps = tapo.encode_steps(extended, steps=2)
    own = np.float32([[-0.2, -0.4]])
    result = transfer(
        steps,
        np.concatenate([np.zeros((1, 2), bool), success], axis=1),
        np.concatenate([own, advantage], axis=1),
        weight_PxG=jnp.concatenate([jnp.ones((1, 2)), weight], axis=1),
    )
    cut = tapo_memory.drop_remembered(result, 4)
    np.testing.assert_allclose(cut.advantage_PxS, [[-0.2 + 0.8 * 0.225, -0.2, -0.4 + 0.8 * 0.225, -0.4]], rtol=1e-5)
    assert cut.witness_PxS.tolist() == [[5, -1, 4, -1]]  # slots 4 and 5: the remembered rollout's


def test_memory_forgets_and_never_looks_ahead():
    groups, won = [[[SEARCH]]], np.array([[True]])
    memory = {}
    for step in range(6):
        settings = tapo_memory.Settings(3, 2)
        memory = tapo_memory.remember(memory, step, ["q"], groups, won, np.float32([[step]]), settings)
    assert [entry["step"] for entry in memory["q"]] == [4, 5]  # size 2: the newest
    for step, expected in [(5, [4]), (6, [4, 5]), (8, [5]), (9, [])]:
        _, success, advantage, _ = tapo_memory.recall(memory, step, ["q"], groups, tapo_memory.Settings(3, 2, 0.9))
        assert advantage[0, success[0]].tolist() == expected, step
    # another question's step ages this one's; a failure leaves nothing, a success without a call itself
    groups, won = [[[SEARCH]], [[None]]], np.array([[False], [True]])
    memory = tapo_memory.remember(memory, 7, ["r", "s"], groups, won, np.ones((2, 1)), tapo_memory.Settings(3, 2))
    assert list(memory) == ["q", "s"] and [entry["step"] for entry in memory["q"]] == [5]
    assert memory["s"] == [{"step": 7, "advantage": 1.0, "calls": []}]


def test_memory_shapes_do_not_depend_on_what_is_remembered():
    extended, *arrays = tapo_memory.recall({}, 3, ["q"], [[[SEARCH]]], tapo_memory.Settings(3, 4, 0.9))
    assert len(extended[0]) == 5 and all(x.shape == (1, 4) and not x.any() for x in arrays)


def test_embedding_similarity_by_hand():
    # Rows (2, 1), (0, 1), (1, 3), (1, -1): their mean is (1, 1), centred (1, 0), (-1, 0), (0, 2), (0, -2).
    table = np.float32([[2, 1], [0, 1], [1, 3], [1, -1]])
    vector = embedding.mean_of_table(table)
    np.testing.assert_allclose(vector([0, 2]), [0.5, 1.0])
    assert vector([]).tolist() == [0, 0]
    embed = embedding.text_embedding(lambda text: [int(x) for x in text.split()], vector)
    queries = ["0", "0 2", "1", "3", "2 2", ""]
    groups = [[[("search", (Text(query),)) for query in queries]]]
    steps = tapo.encode_steps(groups, steps=6, features=2, embed=embed)
    sim = np.asarray(pairwise(steps, text="cosine"))[0]
    # (1, 0)·(.5, 1) / |(.5, 1)|; at right angles, opposite or empty: 0
    np.testing.assert_allclose(sim[0], [1, 1 / np.sqrt(5), 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(sim[1, 4], 2 / np.sqrt(5), atol=1e-6)
    assert (np.diag(sim) == 1).all()
