"""Schedules and chains against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_train_step import CONFIG

from tapo_jax.config import UserError
from tapo_jax.learn import optimizer
from tapo_jax.models import parameters


def settings(**fields) -> ConfigDict:
    base = dict(
        lr=0.5,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        grad_clip=0.0,
        vision_lr_multiplier=1.0,
    )
    return ConfigDict(base | fields)


def params(value: float = 1.0) -> dict:
    return {
        "decoder": {"q": jnp.full((2, 2), value), "input_norm": jnp.full((1, 2), value)},
        "vision": {"patch": jnp.full((2, 2), value), "patch_bias": jnp.full((2,), value)},
    }


def one_update(config: ConfigDict, gradient: dict, **options) -> dict:
    chain, _ = optimizer.make_optimizer(config, total_steps=10, **options)
    updates, _ = chain.update(gradient, chain.init(params()), params())
    return updates


def test_schedules():
    """lr 8: the ramp over 4 updates is 2, 4, 6, 8; then 8; half a cosine over the other 6 is (8 / 2)(1 + cos(π t / 6)):
    8 at t = 0, 4 at t = 3, 0 at t = 6; the line is 8 (1 - t / 6)."""
    for kind, after in (("constant", [8, 8, 8]), ("cosine", [8, 4, 0]), ("linear", [8, 4, 0])):
        schedule = optimizer.make_schedule(8.0, kind, 4, 10)
        np.testing.assert_allclose([schedule(n) for n in (0, 1, 2, 3)], [2, 4, 6, 8], rtol=1e-6)
        np.testing.assert_allclose([schedule(n) for n in (4, 7, 10)], after, atol=1e-6)
    assert optimizer.make_schedule(8.0, "constant", 0, 10)(0) == 8


def test_warmup_and_total_count_steps_of_the_loop_not_updates():
    """2 warm-up steps of 2 updates each: the ramp is 1/4, 2/4, 3/4, 1."""
    _, schedule = optimizer.make_optimizer(settings(lr=1.0, warmup_steps=2), total_steps=10, updates_per_step=2)
    np.testing.assert_allclose([schedule(n) for n in range(5)], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="optimizer.schedule is 'step'"):
        optimizer.make_schedule(1.0, "step", 0, 10)


def test_the_first_adam_update_is_the_rate_in_the_direction_of_the_sign():
    """Adam's first update is g / (|g| + eps), so -lr · sign(g); the vision tower has a rate of its own."""
    updates = one_update(settings(vision_lr_multiplier=0.1), params(value=-3.0))
    np.testing.assert_allclose(updates["decoder"]["q"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["vision"]["patch"], 0.05, rtol=1e-5)


def test_weight_decay_is_for_matrices():
    """Gradient 0: what is left is -lr · decay · weight = -0.5 · 0.2 · 1 for matrices, 0 for norms and biases."""
    updates = one_update(settings(weight_decay=0.2), params(value=0.0))
    np.testing.assert_allclose(updates["decoder"]["q"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["vision"]["patch"], -0.1, rtol=1e-6)
    assert not updates["decoder"]["input_norm"].any() and not updates["vision"]["patch_bias"].any()


def test_every_parameter_of_the_model_is_decayed_or_not_as_it_should_be():
    names = ["/".join(path) for path in parameters.specs(CONFIG)]
    left_out = {name for name in names if not optimizer.is_decayed(name)}
    assert left_out == {name for name in names if "norm" in name.split("/")[-1] or name.endswith("_bias")}
    assert {"embedding", "decoder/q", "vision/position", "vision/merger/fc1"} <= set(names) - left_out
    assert {name for name in names if optimizer.is_vision(name)} == {
        name for name in names if name.startswith("vision/")
    }


def test_clipping_is_by_the_norm_of_all_trained_parameters():
    """Adam hides the size of a first gradient, but not of the second: after g, 10·g the two chains differ if clipping
    works."""
    for clip, same in ((1e-3, True), (0.0, False)):
        chain, _ = optimizer.make_optimizer(settings(grad_clip=clip), total_steps=10)
        state = chain.init(params())
        _, state = chain.update(params(1.0), state, params())
        second, _ = chain.update(params(10.0), state, params())
        # Both gradients are clipped to one norm: g equal both times, so Adam's ratio stays 1 and the update -lr.
        assert np.allclose(second["decoder"]["q"], -0.5, rtol=1e-3) == same


def test_with_low_rank_parameters_nothing_else_is_trained():
    names = ["embedding", "decoder/q", "decoder/q_lora_a", "vision/blocks/qkv_lora_b", "vision/patch"]
    trained = [name for name in names if optimizer.is_trained(name, train_vision=True, lora=True)]
    assert trained == ["decoder/q_lora_a", "vision/blocks/qkv_lora_b"]
    assert [name for name in names if not optimizer.is_trained(name, train_vision=False, lora=False)] == names[3:]


def test_a_frozen_tower_gets_no_update_no_decay_and_no_moments():
    config = settings(weight_decay=0.2, grad_clip=1.0)
    chain, _ = optimizer.make_optimizer(config, total_steps=10, train_vision=False)
    state = chain.init(params())
    gradient = params(1.0) | {"vision": params(1e9)["vision"]}
    updates, _ = chain.update(gradient, state, params())
    assert not updates["vision"]["patch"].any() and not updates["vision"]["patch_bias"].any()
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert sum(sizes) == 2 * (4 + 2) + 2  # two moments of the decoder's 6 numbers and two counters


@pytest.mark.parametrize("clip", [-1.0, float("nan"), float("inf")])
def test_a_clip_that_would_turn_descent_into_ascent_is_refused(clip):
    with pytest.raises(UserError, match="grad_clip is"):
        optimizer.make_optimizer(settings(grad_clip=clip), total_steps=10)
    with pytest.raises(UserError, match="warmup_steps is -5"):
        optimizer.make_optimizer(settings(warmup_steps=-5), total_steps=10)
