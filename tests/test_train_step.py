"""The update on a model of a few thousand parameters: pieces, counting, skipping, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tapo_jax import sharding
from tapo_jax.batch import ModelInputs, TrainBatch
from tapo_jax.learn import losses, micro_batches, train_step
from tapo_jax.learn.state import init_state, split_model
from tapo_jax.learn.train_step import Policy
from tapo_jax.models import parameters, qwen3_vl
from tapo_jax.models.config import Qwen3VLConfig, VisionConfig

VISION = VisionConfig(
    depth=1, hidden=16, mlp=16, heads=2, patch=4, merge=2, temporal=1, channels=3, out=16, positions=16, deepstack=(0,)
)
CONFIG = Qwen3VLConfig(
    vocab=32,
    hidden=16,
    mlp=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    mrope_section=(2, 1, 1),
    norm_epsilon=1e-6,
    attention_bias=False,
    tied=True,
    max_positions=128,
    image_token=30,
    video_token=29,
    vision_start=28,
    vision_end=27,
    vision=VISION,
)
FORBIDDEN_V = np.arange(32) >= 27
GSPO = losses.Settings("gspo")
Objective = functools.partial(train_step.Objective, train_vision=True)
B, T = 8, 12


def make_batch(seed: int = 0, images: bool = False) -> TrainBatch:
    """Rows of different lengths; prompt tokens first, then written ones; made-up old and sampler log-probabilities."""
    rng = np.random.default_rng(seed)
    length_B = rng.integers(6, T + 1, B)
    place_T = np.arange(T)
    segment_BxT = (place_T < length_B[:, None]).astype(np.int32)
    inputs = ModelInputs(
        token_BxT=rng.integers(0, 27, (B, T)).astype(np.int32) * segment_BxT,
        segment_BxT=segment_BxT,
        position_BxTx3=np.broadcast_to(place_T[None, :, None], (B, T, 3)).astype(np.int32).copy(),
    )
    if images:  # one image of 2 × 2 patches, which is one token, at place 1
        inputs.token_BxT[:, 1] = CONFIG.image_token
        feature_BxT = np.full((B, T), -1, np.int32)
        feature_BxT[:, 1] = 0
        inputs = dataclasses.replace(
            inputs,
            feature_BxT=feature_BxT,
            pixels_BxNxF=rng.normal(size=(B, 4, VISION.patch_features)).astype(np.float32),
            patch_image_BxN=np.ones((B, 4), np.int32),
            patch_rowcol_BxNx2=np.broadcast_to(np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32), (B, 4, 2)).copy(),
            patch_corner_BxNx4=np.zeros((B, 4, 4), np.int32),
            patch_weight_BxNx4=np.full((B, 4, 4), 0.25, np.float32),
        )
    mask_BxT = (segment_BxT > 0) & (place_T >= rng.integers(2, 6, B)[:, None])
    logp_BxT = np.where(mask_BxT, -3.3 + 0.1 * rng.normal(size=(B, T)), 0).astype(np.float32)
    return TrainBatch(
        inputs=inputs,
        mask_BxT=mask_BxT,
        step_BxT=np.full((B, T), -1, np.int32),
        sampler_logp_BxT=logp_BxT + np.where(mask_BxT, 0.01, 0).astype(np.float32),
        old_logp_BxT=logp_BxT,
        advantage_BxT=np.where(mask_BxT, rng.normal(size=(B, 1)), 0).astype(np.float32),
    )


def setup(objective: train_step.Objective, *, mesh_shape=(1, 1, 1), optimizer=None, seed: int = 0, buckets=None):
    """-> (state, update, mesh, place): `place` puts a host batch on the mesh."""
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = sharding.make_mesh(*mesh_shape, devices=devices)
    graphdef, params = split_model(qwen3_vl.Qwen3VL(CONFIG, rngs=nnx.Rngs(seed)))
    schedule = lambda count: 0.1 * count  # noqa: E731
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    state = init_state(params, parameters.logical_axes(CONFIG), optimizer, mesh)
    update = train_step.make_update(
        Policy(graphdef, FORBIDDEN_V, mesh), optimizer, schedule, objective, state, buckets=buckets
    )
    return state, update, mesh, lambda batch: sharding.put_rows(batch, mesh, B)


def index(mesh, value: int) -> jax.Array:
    return sharding.put_replicated(np.int32(value), mesh)


def run(objective: train_step.Objective, batch: TrainBatch, *, ref_logp_BxT=None, **options):
    state, update, mesh, place = setup(objective, **options)
    before = jax.device_get(state.params)
    ref = None if ref_logp_BxT is None else place(ref_logp_BxT)
    last = objective.updates_per_batch - 1
    state, metrics = update(state, place(batch), ref, index(mesh, last))
    return before, jax.device_get(state), jax.device_get(metrics)


@functools.cache
def plain_run(objective: train_step.Objective, *, images: bool = False, mesh_shape=(1, 1, 1), buckets=None):
    """-> (params before, state after, metrics) of one update on the last mini-batch."""
    return run(objective, make_batch(images=images), mesh_shape=mesh_shape, buckets=buckets)


def test_strided_part_is_strided_and_a_partition():
    rows = {"a": jnp.arange(12).reshape(6, 2)}
    got = [micro_batches.strided_part(rows, 3, m)["a"][:, 0].tolist() for m in range(3)]
    assert got == [[0, 6], [2, 8], [4, 10]]  # rows m and m + 3, whose first numbers are 2m and 2m + 6


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_micro_batches_do_not_change_the_update(aggregation):
    """The rows have different token counts, so a mean of micro-batch means would differ."""
    objective = Objective(updates_per_batch=2, loss=losses.Settings(aggregation=aggregation))
    _, one, metrics_one = plain_run(objective)
    _, two, metrics_four = plain_run(dataclasses.replace(objective, micro_batches=2))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for name in ("loss/total", "loss/policy", "loss/entropy", "loss/ratio_max", "loss/tokens", "loss/approx_kl"):
        np.testing.assert_allclose(metrics_one[name], metrics_four[name], rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1)])
def test_narrow_micro_batches_do_not_change_the_update(shape):
    """Rows of 6 to 12 tokens, shortest first, in micro-batches of 8, 10 or 12 places."""
    objective = Objective(updates_per_batch=1, loss=GSPO)
    _, one, metrics_one = plain_run(objective, images=True)
    buckets = ((8, 4), (10, 4), (12, 4))
    _, two, metrics_two = plain_run(objective, images=True, buckets=buckets, mesh_shape=shape)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    for name in ("loss/total", "loss/policy", "loss/entropy", "loss/ratio_max", "loss/tokens"):
        np.testing.assert_allclose(metrics_one[name], metrics_two[name], rtol=2e-5, atol=1e-7, err_msg=name)


def test_micro_batches_are_as_narrow_as_their_longest_row():
    buckets = ((7, 2), (10, 4), (12, 4))
    batch = make_batch(images=True)
    width = jax.jit(lambda rows: micro_batches.in_smallest_bucket(seen_width, buckets, rows.inputs, rows))

    def seen_width(rows: TrainBatch):
        assert rows.mask_BxT.shape[1] == rows.inputs.position_BxTx3.shape[1] == rows.inputs.feature_BxT.shape[1]
        assert rows.inputs.pixels_BxNxF.shape[:2] == rows.inputs.patch_weight_BxNx4.shape[:2]
        return jnp.array([rows.mask_BxT.shape[1], rows.inputs.pixels_BxNxF.shape[1]])

    def of_size(tokens: int, patches: int) -> TrainBatch:
        segment_BxT = (np.arange(T) < tokens).astype(np.int32) * np.ones((B, 1), np.int32)
        image_BxN = (np.arange(4) < patches).astype(np.int32) * np.ones((B, 1), np.int32)
        inputs = dataclasses.replace(batch.inputs, segment_BxT=segment_BxT, patch_image_BxN=image_BxN)
        return dataclasses.replace(batch, inputs=inputs)

    sizes = [(0, 0), (7, 2), (7, 3), (8, 1), (10, 4), (11, 0), (12, 4)]
    got = [tuple(width(of_size(*size)).tolist()) for size in sizes]
    assert got == [(7, 2), (7, 2), (10, 4), (10, 4), (10, 4), (12, 4), (12, 4)]


def test_every_device_sorts_its_own_rows_and_sends_none():
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    length_B = np.array([5, 3, 9, 3, 2, 8, 1, 4])
    batch = make_batch()
    segment_BxT = (np.arange(T) < length_B[:, None]).astype(np.int32)
    inputs = dataclasses.replace(batch.inputs, segment_BxT=segment_BxT)

    @functools.partial(jax.jit, out_shardings=sharding.rows(mesh))
    def second(inputs):
        order_Sxn = micro_batches.by_length(inputs, mesh, ((8, 4), (12, 4)))
        return micro_batches.micro_batch((inputs, jnp.arange(B)), order_Sxn, 2, 1)

    placed = sharding.put_rows(inputs, mesh, B)
    assert second(placed)[1].tolist() == [0, 2, 7, 5]  # of rows 0-3 and of rows 4-7 the two longest
    program = second.lower(placed).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))


def test_a_mini_batch_is_cut_into_more_parts_only_where_that_saves_padding():
    parts = lambda rows, least: micro_batches.micro_batch_count(np.zeros((2, rows), int), least)  # noqa: E731
    assert micro_batches.micro_batch_count(None, 2) == 2
    assert [parts(32, 1), parts(32, 4), parts(12, 1), parts(12, 2), parts(1, 1), parts(7, 1)] == [8, 8, 6, 6, 1, 7]
    assert [parts(32, 16), parts(48, 3), parts(22, 1)] == [16, 6, 2]


def test_buckets_pair_the_largest_sizes():
    assert micro_batches.pair_buckets((448, 640), (576,)) == ((448, 576), (640, 576))
    assert micro_batches.pair_buckets((640,), (256, 576)) == ((640, 256), (640, 576))
    assert micro_batches.pair_buckets((8, 16), (8, 16, 32)) == ((8, 8), (8, 16), (16, 32))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_every_mesh_gives_the_update_of_one_device(shape):
    objective = Objective(updates_per_batch=1, loss=GSPO)
    _, one, metrics_one = plain_run(objective, images=True)
    _, many, metrics_many = plain_run(objective, images=True, mesh_shape=shape)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    np.testing.assert_allclose(metrics_one["loss/total"], metrics_many["loss/total"], rtol=1e-5, atol=1e-7)


def test_a_golden_update():
    """A mini-batch of the fixed model and batch. If this fails, the update computes something else than it did: where
    that is meant, print `metrics` and put the new numbers here; where it is not, the last change is wrong."""
    _, _, metrics = plain_run(Objective(updates_per_batch=1, loss=GSPO), images=True)
    golden = {
        "loss/total": 0.484449,
        "loss/entropy": 3.292078,
        "loss/sampler_logp_difference": 0.0966719,
        "optimizer/grad_norm": 1.991713,
    }
    assert {name: float(metrics[name]) for name in golden} == pytest.approx(golden, rel=1e-4)


def test_one_update_a_batch_is_the_policy_gradient():
    """old = sg[logp], so r = 1 and GRPO's gradient is that of -Σ w·A·logp / tokens; SGD with rate 1 subtracts it."""
    batch = make_batch()
    before, after, _ = run(Objective(updates_per_batch=1, importance_cap=None), batch)
    graphdef, params = split_model(qwen3_vl.Qwen3VL(CONFIG, rngs=nnx.Rngs(0)))

    def surrogate(params):
        inputs = jax.tree.map(jnp.asarray, batch.inputs)
        logp_BxT, _ = train_step.row_logp(Policy(graphdef, FORBIDDEN_V, sharding.one_device()), params, inputs)
        return -jnp.sum(jnp.where(batch.mask_BxT, batch.advantage_BxT * logp_BxT, 0)) / batch.mask_BxT.sum()

    gradient = jax.device_get(jax.grad(surrogate)(params))
    for start, end, slope in zip(*map(jax.tree.leaves, (before, after.params, gradient)), strict=True):
        np.testing.assert_allclose(end - start, -slope, atol=2e-6)


def test_kl_pulls_towards_the_reference():
    """Without advantages only the KL term is left: k2 = (logp - ref)² / 2, with the sign of logp - ref."""
    batch = dataclasses.replace(make_batch(), advantage_BxT=np.zeros((B, T), np.float32))
    objective = Objective(updates_per_batch=1, kl_coef=0.5, kl_estimator="k2")
    ref_BxT = np.full((B, T), -2.0, np.float32)
    _, _, metrics = run(objective, batch, ref_logp_BxT=ref_BxT)
    assert metrics["loss/kl"] > 0
    np.testing.assert_allclose(metrics["loss/total"], 0.5 * metrics["loss/kl"], rtol=1e-6)
    assert metrics["optimizer/grad_norm"] > 0
    _, still, _ = run(dataclasses.replace(objective, kl_coef=0.0), batch)
    before, _, _ = run(objective, batch, ref_logp_BxT=ref_BxT)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(still.params), strict=True):
        np.testing.assert_array_equal(a, b)  # no advantage, no KL: no gradient at all


def test_a_bad_number_skips_the_update_and_is_counted():
    optimizer = optax.adam(0.1)
    state, update, mesh, place = setup(Objective(updates_per_batch=1), optimizer=optimizer)
    bad = make_batch()
    bad.advantage_BxT[np.nonzero(bad.mask_BxT)[0][0], np.nonzero(bad.mask_BxT)[1][0]] = np.nan
    before = jax.device_get((state.params, state.opt_state))
    for tries in (1, 2):
        state, metrics = update(state, place(bad), None, index(mesh, 0))
        assert int(metrics["optimizer/skipped_in_a_row"]) == tries
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(jax.device_get((state.params, state.opt_state))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(metrics["loss/total"])  # the metrics show what happened
    state, metrics = update(state, place(make_batch()), None, index(mesh, 0))
    assert (int(metrics["optimizer/skipped"]), int(metrics["optimizer/skipped_in_a_row"])) == (2, 0)
    assert int(state.update) == 3
    assert float(metrics["optimizer/lr"]) == 0.0  # schedule(0): the two skipped updates are not counted
    assert not np.array_equal(before[0]["embedding"], jax.device_get(state.params["embedding"]))


def test_log_probs_come_back_in_the_order_of_the_rows():
    batch = make_batch(images=True)
    objective = Objective(updates_per_batch=2, micro_batches=2, temperature=0.7)
    state, _, mesh, place = setup(objective, mesh_shape=(2, 1, 1))
    graphdef, params = split_model(qwen3_vl.Qwen3VL(CONFIG, rngs=nnx.Rngs(0)))
    log_probs = train_step.make_log_probs(Policy(graphdef, FORBIDDEN_V, mesh), objective)
    got_BxT = jax.device_get(log_probs(state.params, place(batch).inputs))
    inputs = jax.tree.map(jnp.asarray, batch.inputs)
    want_BxT, _ = train_step.row_logp(
        Policy(graphdef, FORBIDDEN_V, sharding.one_device()), params, inputs, temperature=0.7
    )
    np.testing.assert_allclose(got_BxT, want_BxT, atol=1e-5)
    buckets = ((8, 4), (12, 4))
    later = train_step.make_log_probs(
        Policy(graphdef, FORBIDDEN_V, mesh), objective, buckets=buckets, later_updates=True
    )
    got_BxT = jax.device_get(later(state.params, place(batch).inputs))
    got_BxT, want_BxT = (np.where(batch.mask_BxT, logp_BxT, 0) for logp_BxT in (got_BxT, want_BxT))
    np.testing.assert_allclose(got_BxT[1::2], want_BxT[1::2], atol=1e-5)  # rows 1, 3, … are the second update's
    assert not got_BxT[0::2].any()


def test_only_the_first_update_of_a_batch_takes_its_own_log_probs_as_the_old_ones():
    objective = Objective(updates_per_batch=2)
    state, update, mesh, place = setup(objective)
    batch = make_batch()
    state, first = update(state, place(batch), None, index(mesh, 0))
    after_first = jax.device_get(state.params)
    _, second = update(state, place(batch), None, index(mesh, 1))
    assert float(first["loss/ratio_max"]) == 1.0
    assert float(second["loss/ratio_max"]) > 1.0
    state, update, mesh, _ = setup(dataclasses.replace(objective, updates_per_batch=1))
    rows = jax.tree.map(lambda array: array[0::2], batch)
    state, alone = update(state, sharding.put_rows(rows, mesh, B // 2), None, index(mesh, 0))
    for a, b in zip(jax.tree.leaves(after_first), jax.tree.leaves(jax.device_get(state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(first["loss/total"], alone["loss/total"], rtol=1e-6)


def test_the_vision_tower_can_be_frozen():
    before, after, _ = plain_run(train_step.Objective(updates_per_batch=1), images=True)
    for a, b in zip(jax.tree.leaves(before["vision"]), jax.tree.leaves(after.params["vision"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(before["decoder"]["q"], after.params["decoder"]["q"])
    _, trained, _ = plain_run(Objective(updates_per_batch=1, loss=GSPO), images=True)
    assert not np.array_equal(before["vision"]["patch"], trained.params["vision"]["patch"])


def test_an_update_is_compiled_once_and_makes_no_implicit_transfer():
    state, update, mesh, place = setup(Objective(updates_per_batch=2), mesh_shape=(2, 2, 2))
    batch, indices = place(make_batch()), [index(mesh, 0), index(mesh, 1)]
    with jax.transfer_guard("disallow"):
        for number in indices * 2:
            state, _ = update(state, batch, None, number)
    assert update._cache_size() == 1
    assert int(state.update) == 4


def test_metrics_are_combined_over_micro_batches():
    """Tokens 1 and 3: the mean of 2 and 6 is (1·2 + 3·6) / 4 = 5; a NaN is not lost in a maximum."""
    metrics_M = {
        "loss/tokens": jnp.array([1, 3]), "loss/x": jnp.array([2.0, 6.0]), "loss/ratio_max": jnp.array([jnp.nan, 1.0]),
        "loss/policy_sum": jnp.array([0.25, 0.5]),
    }  # fmt: skip
    got = train_step.combine(metrics_M)
    assert (float(got["loss/x"]), int(got["loss/tokens"]), float(got["loss/policy"])) == (5.0, 4, 0.75)
    assert np.isnan(got["loss/ratio_max"])
