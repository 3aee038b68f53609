"""The sampler's weights: what is made of the parameters once a rollout, and that it is gone afterwards."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_world as world
from flax import nnx

from tapo_jax import sharding
from tapo_jax.models import lora
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.generate import generate
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.rounds import rollout
from tapo_jax.rollout.sampler import Sampler, make_shapes
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.rollout.weights import UNCAST, Reshard


def bfloat16_model() -> Qwen3VL:
    """Float32 parameters, computed with in bfloat16."""
    made = Qwen3VL(world.config(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    nnx.update(made, nnx.state(world.model()))
    return made


def adapted(dtype=jnp.float32) -> Qwen3VL:
    """Low-rank updates of the decoder and the tower that change the function, at a scale of 2."""
    made = Qwen3VL(world.config(), rngs=nnx.Rngs(0), dtype=dtype)
    nnx.update(made, nnx.state(world.model()))
    lora.add(made, 3, modules=(*lora.DECODER, *lora.VISION), alpha=6.0)
    rng = np.random.default_rng(0)
    filled = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), nnx.state(made, lora.is_lora))
    nnx.update(made, filled)
    return made


def parameters(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


def flat(tree) -> dict:
    return nnx.traversals.flatten_mapping(tree)


def test_parameters_that_are_as_they_should_be_are_not_copied():
    params = world.params()
    weights = Reshard(world.model(), sharding.one_device())(params)
    assert flat(weights).keys() == flat(params).keys()
    assert all(weight is params for weight, params in zip(*map(jax.tree.leaves, (weights, params)), strict=True))


def test_weights_have_the_dtype_of_the_computation():
    params = world.params()
    weights = flat(Reshard(bfloat16_model(), sharding.one_device())(params))
    for path, x in flat(params).items():
        expected = x if path in UNCAST else x.astype(jnp.bfloat16)
        assert weights[path].dtype == expected.dtype and np.array_equal(weights[path], expected), path


def test_the_cast_changes_no_token_and_no_log_probability():
    """The same programs on parameters that are cast before, and on those that each call casts for itself."""
    prompts = [[5, 6, 7], [9, 1, 2, 3]]
    model = bfloat16_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reshard, "__call__", lambda self, params: params)
        each_call = generate(model, world.config(), prompts, max_new_tokens=24)
    assert generate(model, world.config(), prompts, max_new_tokens=24) == each_call


def test_low_rank_updates_are_merged():
    model, params = adapted(), parameters(adapted())
    reshard = Reshard(model, sharding.one_device())
    weights, expected = flat(reshard(params)), flat(lora.merged(model).arrays())
    assert weights.keys() == expected.keys() and not any(map(lora.is_lora, weights))
    for path, weight in weights.items():
        np.testing.assert_allclose(weight, expected[path], rtol=0, atol=1e-6)
    changed = [path for path in weights if not np.array_equal(weights[path], flat(params)[path])]
    assert len(changed) == len(lora.DECODER) + len(lora.VISION)


def test_merged_or_not_the_tokens_are_the_same():
    """Against generating with the merged model; without the updates the tokens are others."""
    prompts = [[5, 6, 7], [9, 1, 2, 3]]
    greedy = {"max_new_tokens": 24, "temperature": 0.0}
    found = generate(adapted(), world.config(), prompts, **greedy)
    assert found == generate(lora.merged(adapted()), world.config(), prompts, **greedy)
    assert found != generate(world.model(), world.config(), prompts, **greedy)


class Watched(Sampler):
    """Remembers the arrays of its weights without keeping them."""

    def extend(self, weights, plan, extensions):
        self.references = [weakref.ref(x) for x in jax.tree.leaves(weights)]
        assert all(reference() is not None for reference in self.references)
        super().extend(weights, plan, extensions)


def test_the_weights_are_gone_when_the_rollout_has_ended(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)
    chat, mesh = world.chat(12), sharding.one_device()
    limits = {"slots": 4, "capacity": 192, "chunk": 5, "image_patches": 36, "most_patches": 128}
    shapes = make_shapes(world.config(), mesh, **limits)
    forbidden_V = chat.forbidden_V(272)
    sampler = Watched(bfloat16_model(), mesh, shapes, stop_ids=chat.stop_ids, forbidden_V=forbidden_V)
    players = Players(sampler, chat, world.pixels(), world.runner(), Limits(4, 30, 192, None, None))
    params = world.params()
    before = len(jax.live_arrays())
    episodes, metrics = rollout(players, params, world.prompts(2), 2, Sampling(seed=1))
    assert len(episodes) == 4 and metrics["time/reshard"] > 0
    sampler.release()
    cast = [reference for reference in sampler.references if reference() is not None]
    held = {id(x) for x in jax.tree.leaves(params)}
    assert all(id(reference()) in held for reference in cast)  # what was not cast: the table of positions
    assert len(cast) == len(UNCAST) and len(jax.live_arrays()) <= before
