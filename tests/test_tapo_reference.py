"""Credit transfer against plain Python loops on thousands of random groups, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_tapo
import reference_tapo
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_jax import tapo

BASE = dict(theta=0.7, alpha_min=0.25, beta=0.8)
VARIANTS = [
    {},
    dict(cluster="leader"),
    dict(aggregate="max"),
    dict(aggregate="min", cluster="leader", cluster_theta=0.85),
    dict(cluster_theta=0.4),
    dict(support=False, clip=False),
    dict(theta=1.0),
    dict(theta=0.5, alpha_min=0.0, beta=2.5),
    dict(theta=0.5, alpha_min=0.6, beta=0.4, clip=False),
]


@pytest.mark.parametrize("quantum", [None, 0.125])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equal_to_plain_loops(options, quantum):
    """9 variants × 2 × 240 groups. In float64 every decision must be the same one; quantum 1/8 makes ties common."""
    options = {**BASE, **options}
    for seed, (G, K) in enumerate([(4, 3), (8, 2), (1, 4), (5, 1)]):
        batch = random_tapo.arrays(100 * seed + bool(quantum), 60, G, K, quantum)
        with jax.enable_x64(True):
            settings = tapo.Settings(**options)
            result = jax.jit(functools.partial(tapo.transfer_from_similarity, settings=settings))(*batch)
            assert result.advantage_PxS.dtype == np.float64
            result = jax.tree.map(np.asarray, result)
        for p in range(60):
            expected = reference_tapo.group_transfer(*(x[p].tolist() for x in batch), **options)
            assert result.clusters_P[p] == expected["clusters"]
            for name in ("corrected", "correctable", "cluster", "witness"):
                assert getattr(result, f"{name}_PxS")[p].tolist() == expected[name], (p, name)
            for name in ("advantage", "sim", "support"):
                np.testing.assert_allclose(getattr(result, f"{name}_PxS")[p], expected[name], rtol=1e-13, atol=1e-14)


def test_float32_agrees_with_float64():
    batch = random_tapo.arrays(7, 400, 8, 4)
    function = jax.jit(functools.partial(tapo.transfer_from_similarity, settings=tapo.Settings(**BASE)))
    single = function(*(x.astype(np.float32) if x.dtype == np.float64 else x for x in batch))
    with jax.enable_x64(True):
        double = jax.tree.map(np.asarray, function(*batch))
    assert single.advantage_PxS.dtype == np.float32
    np.testing.assert_allclose(single.advantage_PxS, double.advantage_PxS, atol=2e-6)
    assert np.asarray(single.corrected_PxS).sum() > 500  # the comparison is about something


@pytest.mark.parametrize("options", [{}, dict(cluster="leader", aggregate="max")], ids=str)
def test_batch_scope_equals_one_large_group_of_the_loops(options):
    P, G, K = 4, 3, 3
    steps = tapo.encode_steps(random_tapo.groups(3, P, G, K), steps=K)
    success = np.random.default_rng(0).random((P, G)) < 0.4
    advantage = np.where(success, 0.9, -0.6).astype(np.float32)
    pooled = jax.tree.map(lambda x: x.reshape(1, P * G * K, *x.shape[2:]), steps)
    # Rounded: the float32 0.7 becomes the float64 0.7 that theta is.
    sim = np.asarray(jax.jit(tapo.pairwise_similarity)(pooled))[0].astype(float).round(6)
    valid, won, own = (x.reshape(-1).tolist() for x in (steps.valid_PxS, success, advantage.astype(float)))
    expected = reference_tapo.group_transfer(
        sim.tolist(),
        [i // K for i in range(P * G * K)],
        valid,
        won,
        own,
        question=[i // G for i in range(P * G)],
        **BASE,
        **options,
    )
    result = jax.jit(lambda s: tapo.transfer(s, success, advantage, tapo.Settings(scope="batch", **options)))(steps)
    for name in ("corrected", "correctable", "cluster", "witness"):
        assert np.asarray(getattr(result, f"{name}_PxS")).reshape(-1).tolist() == expected[name], name
    np.testing.assert_allclose(np.asarray(result.advantage_PxS).reshape(-1), expected["advantage"], atol=1e-6)
    assert int(result.clusters_P.sum()) == expected["clusters"]
    within = jax.jit(tapo.transfer)(steps, success, advantage)
    assert (result.sim_PxS >= within.sim_PxS).all() and (result.sim_PxS > within.sim_PxS).any()


def test_token_advantages_equal_plain_loops():
    rng = np.random.default_rng(0)
    P, G, K, T = 20, 4, 3, 17
    advantage, step_advantage = rng.normal(size=(P, G)), rng.normal(size=(P, G * K))
    step = rng.integers(-1, K, (P * G, T)).astype(np.int32)
    result = tapo.token_advantages(advantage.astype(np.float32), step_advantage.astype(np.float32), step)
    expected = [
        row
        for p in range(P)
        for row in reference_tapo.token_rows(advantage[p], step_advantage[p], K, step.reshape(P, G, T)[p].tolist())
    ]
    np.testing.assert_allclose(result, expected, rtol=1e-6)


# Properties. Fixed shapes, so that the compiled function is made once; the seed and the options vary.
G, K = 4, 3
SEED = st.integers(0, 2**32 - 1)
OPTION = st.fixed_dictionaries(
    dict(
        theta=st.sampled_from([0.5, 0.7, 0.9]),
        alpha_min=st.sampled_from([0.0, 0.25, 0.6]),
        beta=st.sampled_from([0.3, 0.8, 3.0]),
        aggregate=st.sampled_from(["mean", "max", "min"]),
        cluster=st.sampled_from(["components", "leader"]),
    )
)


@functools.cache
def compiled(cluster, aggregate, clip):
    def run(batch, theta, alpha_min, beta):
        numbers = dict(theta=theta, alpha_min=alpha_min, beta=beta)  # traced: Settings may hold traced numbers
        choices = dict(cluster=cluster, aggregate=aggregate, clip=clip)
        return tapo.transfer_from_similarity(*batch, tapo.Settings(**numbers, **choices))

    return jax.jit(run)


def run(batch, option, clip=True):
    batch = tuple(x.astype(np.float32) if x.dtype == np.float64 else x for x in batch)
    function = compiled(option["cluster"], option["aggregate"], clip)
    return jax.tree.map(np.asarray, function(batch, option["theta"], option["alpha_min"], option["beta"]))


def own(batch):
    return np.take_along_axis(batch[4], batch[1], axis=1).astype(np.float32)


@settings(max_examples=80, deadline=None)
@given(SEED, OPTION)
def test_clip_never_praises_and_nothing_is_lowered(seed, option):
    batch = random_tapo.arrays(seed, 4, G, K)
    clipped, free = run(batch, option), run(batch, option, clip=False)
    failing = ~np.take_along_axis(batch[3], batch[1], axis=1)
    assert (clipped.advantage_PxS >= own(batch)).all() and (free.advantage_PxS >= own(batch)).all()
    assert (clipped.advantage_PxS[failing & (own(batch) <= 0)] <= 0).all()
    changed = clipped.advantage_PxS != own(batch)
    assert (clipped.corrected_PxS | ~changed).all() and (failing | ~changed).all() and (batch[2] | ~changed).all()
    assert (clipped.correctable_PxS | ~clipped.corrected_PxS).all()


@settings(max_examples=40, deadline=None)
@given(SEED, OPTION)
def test_beta_zero_and_theta_above_one_are_the_identity(seed, option):
    batch = random_tapo.arrays(seed, 4, G, K)
    np.testing.assert_array_equal(run(batch, {**option, "beta": 0.0}).advantage_PxS, own(batch))
    above = run(batch, {**option, "theta": 1.0001})
    np.testing.assert_array_equal(above.advantage_PxS, own(batch))
    assert not above.corrected_PxS.any() and not above.correctable_PxS.any()


@settings(max_examples=60, deadline=None)
@given(SEED, OPTION, st.permutations(range(G)), st.permutations(range(K)))
def test_order_of_rollouts_and_steps_does_not_matter(seed, option, rollouts, steps):
    sim, trajectory, valid, success, advantage = random_tapo.arrays(seed, 4, G, K)
    option = {**option, "cluster": "components"}
    plain = run((sim, trajectory, valid, success, advantage), option)
    slots = np.array([g * K + k for g in rollouts for k in steps])
    moved = sim[:, slots][:, :, slots], trajectory, valid[:, slots], success[:, rollouts], advantage[:, rollouts]
    result = run(moved, option)
    np.testing.assert_allclose(result.advantage_PxS, plain.advantage_PxS[:, slots], atol=1e-6)
    np.testing.assert_array_equal(result.corrected_PxS, plain.corrected_PxS[:, slots])
    np.testing.assert_array_equal(result.clusters_P, plain.clusters_P)


@settings(max_examples=60, deadline=None)
@given(SEED, OPTION)
def test_padding_changes_nothing(seed, option):
    sim, trajectory, valid, success, advantage = random_tapo.arrays(seed, 4, G, K)
    plain = run((sim, trajectory, valid, success, advantage), option)
    # Two more slots a rollout, full of rubbish but not valid, and a rollout number that does not exist.
    slots = np.array([g * (K + 2) + k for g in range(G) for k in range(K)])
    S = G * (K + 2)
    wide = np.ones((4, S, S))
    wide[np.ix_(range(4), slots, slots)] = sim
    wide_trajectory, wide_valid = np.full((4, S), G + 3, np.int32), np.zeros((4, S), bool)
    wide_trajectory[:, slots], wide_valid[:, slots] = trajectory, valid
    wide_valid[:, K] = True  # valid, but of no rollout
    result = run((wide, wide_trajectory, wide_valid, success, advantage), option)
    np.testing.assert_array_equal(result.advantage_PxS[:, slots], plain.advantage_PxS)
    np.testing.assert_array_equal(result.corrected_PxS[:, slots], plain.corrected_PxS)
    outside = np.setdiff1d(np.arange(S), slots)
    assert (result.advantage_PxS[:, outside] == 0).all() and not result.correctable_PxS[:, outside].any()
    assert (result.cluster_PxS[:, outside] == -1).all()


@settings(max_examples=60, deadline=None)
@given(SEED, OPTION)
def test_a_repeated_witness_adds_no_evidence(seed, option):
    sim, trajectory, valid, success, advantage = random_tapo.arrays(seed, 4, G, K)
    option = {**option, "cluster": "components"}
    # Slot 1 becomes a copy of slot 0, in the same rollout; before, slot 1 is empty.
    valid[:, 0], valid[:, 1] = True, False
    plain = run((sim, trajectory, valid, success, advantage), option)
    sim, valid = sim.copy(), valid.copy()
    valid[:, 1] = True
    sim[:, 1, :] = sim[:, 0, :]
    sim[:, :, 1] = sim[:, :, 0]
    result = run((sim, trajectory, valid, success, advantage), option)
    others = np.arange(2, G * K)
    np.testing.assert_allclose(result.advantage_PxS[:, others], plain.advantage_PxS[:, others], atol=1e-6)
    np.testing.assert_array_equal(result.support_PxS[:, others], plain.support_PxS[:, others])


@settings(max_examples=30, deadline=None)
@given(SEED, OPTION, st.booleans())
def test_no_success_and_all_success_are_the_identity(seed, option, everybody):
    sim, trajectory, valid, success, advantage = random_tapo.arrays(seed, 4, G, K)
    batch = sim, trajectory, valid, np.full_like(success, everybody), advantage
    result = run(batch, option)
    np.testing.assert_array_equal(result.advantage_PxS, own(batch))
    assert not result.correctable_PxS.any()


def test_vmap_over_another_axis_and_one_step():
    batches = [random_tapo.arrays(seed, 6, 4, 1) for seed in range(3)]
    stacked = tuple(jnp.asarray(np.stack(x)) for x in zip(*batches, strict=True))
    for cluster in ("components", "leader"):
        function = functools.partial(tapo.transfer_from_similarity, settings=tapo.Settings(**BASE, cluster=cluster))
        mapped, function = jax.jit(jax.vmap(function))(*stacked), jax.jit(function)
        for i in range(3):
            single = function(*(x[i] for x in stacked))
            jax.tree.map(np.testing.assert_array_equal, single, jax.tree.map(lambda x: x[i], mapped))  # noqa: B023
