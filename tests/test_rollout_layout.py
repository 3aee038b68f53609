"""A rollout in a layout of its own, on eight emulated devices: the tokens of the plain forward pass, without gathering
a weight."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_world as world
from flax import nnx

from configs import tapo_grpo
from tapo_jax import agent, metrics, sharding
from tapo_jax.compile_check import hlo_text
from tapo_jax.config import UserError
from tapo_jax.learn import batches
from tapo_jax.learn.logprobs import token_logp
from tapo_jax.models import parameters, qwen3_vl, shipped
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout import slots
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.rounds import rollout
from tapo_jax.rollout.sampler import Sampler
from tapo_jax.rollout.schedule import Sampling, Shapes

CAPACITY, SLOTS = 192, 16
CHAT = world.chat(40)  # a turn ends after about 6 tokens
# Four key/value heads, so that four devices can share them; sizes that tell a weight from an activation.
CONFIG = dataclasses.replace(
    world.config(), layers=1, kv_heads=4, hidden=64, vision=dataclasses.replace(world.VISION, out=64)
)


@functools.cache
def model() -> Qwen3VL:
    """Random weights, larger than an initialisation, so that logits differ."""
    made = Qwen3VL(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    larger = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), nnx.state(made))
    nnx.update(made, larger)
    return made


@functools.cache
def training() -> jax.sharding.Mesh:
    return sharding.make_mesh(data=1, fsdp=8)


@functools.cache
def trained() -> dict:
    """The parameters in the layout of training."""
    params = nnx.to_pure_dict(nnx.state(model()))
    return jax.device_put(params, sharding.parameters(params, parameters.logical_axes(CONFIG), training()))


def make_sampler(mesh: jax.sharding.Mesh) -> Sampler:
    per_shard = SLOTS // sharding.batch_shards(sharding.rows_mesh(mesh))
    shapes = Shapes(
        extend_rows=(1,), decode_rows=(per_shard,), lengths=(CAPACITY,), patches=(128,), windows=(CAPACITY,), chunk=5,
        merge=2,
    )  # fmt: skip
    return Sampler(model(), mesh, shapes, stop_ids=CHAT.stop_ids, forbidden_V=CHAT.forbidden_V(CONFIG.vocab))


def play(sampler: Sampler, temperature: float, count: int = 8, group_size: int = 1):
    limits = Limits(5, 24, CAPACITY, None, None)
    players = Players(sampler, CHAT, world.pixels(), world.runner(), limits)
    return rollout(players, trained(), world.prompts(count), group_size, Sampling(temperature=temperature, seed=3))[0]


@pytest.fixture(autouse=True)
def random_text_means_something(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)


@jax.jit
def plain_forward(params, model_inputs):
    """Every token's greedy successor and log-probability, without a cache, on one device."""
    merged = nnx.merge(nnx.graphdef(model()), params)
    forbidden_V = jnp.array(CHAT.forbidden_V(CONFIG.vocab))
    hidden_BxTxD = qwen3_vl.hidden_states(merged, model_inputs)
    logits_BxTxV = qwen3_vl.logits(merged, hidden_BxTxD)
    logp_BxT, _ = token_logp(merged, hidden_BxTxD, model_inputs.token_BxT, temperature=1.0, forbidden_V=forbidden_V)
    return jnp.argmax(jnp.where(forbidden_V, -jnp.inf, logits_BxTxV), axis=-1), logp_BxT


def assert_plain(episodes) -> None:
    """The plain forward pass over every episode chooses its tokens, and gives them their log-probabilities."""
    assert sum(len(episode.images) - len(episode.prompt.images) for episode in episodes) >= 2  # in mid-conversation
    batch = batches.pack(episodes, CONFIG, world.pixels(), length=CAPACITY, patches=256, steps=5)
    best_BxT, logp_BxT = plain_forward(nnx.to_pure_dict(nnx.state(model())), batch.inputs)
    written = batch.mask_BxT[:, 1:]
    assert written.sum() > 60
    assert np.array_equal(np.asarray(best_BxT)[:, :-1][written], batch.inputs.token_BxT[:, 1:][written])
    found = np.where(batch.mask_BxT, logp_BxT, 0)
    np.testing.assert_allclose(found, batch.sampler_logp_BxT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_greedy_tokens_and_log_probabilities_are_those_of_the_plain_forward_pass(tensor):
    mesh = sharding.rollout_mesh(training(), tensor=tensor)
    assert dict(mesh.shape) == {"data": 8 // tensor, "fsdp": 1, "tensor": tensor}
    assert_plain(play(make_sampler(mesh), temperature=0.0))


def test_nothing_is_compiled_after_the_warm_up():
    sampler = make_sampler(sharding.rollout_mesh(training(), tensor=2))
    sampler.warm_up(trained())
    compiled = metrics.compile_count()
    play(sampler, temperature=0.0)
    assert metrics.compile_count() == compiled


def test_rows_may_be_put_in_smaller_pieces_than_the_slots_are_split_into(monkeypatch):
    """As in a pod whose processes hold parts of a tensor group: here every device is given rows of its own."""
    mesh = sharding.rollout_mesh(training(), tensor=4)
    monkeypatch.setattr(sharding, "rows_mesh", lambda mesh: sharding.rollout_mesh(mesh, tensor=1))
    sampler = make_sampler(mesh)
    assert sampler.slots_per_shard == 2
    assert_plain(play(sampler, temperature=0.0, group_size=2))  # the second of a group is a copy of the first's prompt


@pytest.mark.parametrize(
    ("of_a_process", "tensor", "pieces"),
    [(4, 4, (2, 4)), (8, 4, (2, 4)), (2, 2, (4, 2)), (2, 4, (4, 2)), (1, 4, (8, 1)), (4, 8, (2, 4)), (4, 1, (8, 1))],
)
def test_each_process_has_rows_of_its_own(of_a_process, tensor, pieces, monkeypatch):
    """Eight devices, so many in order belong to a process: (pieces of the rows, devices that share one)."""
    mesh = sharding.rollout_mesh(training(), tensor=tensor)
    monkeypatch.setattr(sharding, "_process", lambda device: device.id // of_a_process)
    found = sharding.rows_mesh(mesh)
    assert (found.shape["data"], found.shape["tensor"]) == pieces
    assert list(found.devices.flat) == list(mesh.devices.flat)


def test_the_devices_of_a_process_lie_together(monkeypatch):
    """Devices whose processes alternate, as they may along the links of a pod."""
    monkeypatch.setattr(sharding, "_process", lambda device: device.id % 2)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    assert [device.id for device in mesh.devices.flat] == [0, 2, 4, 6, 1, 3, 5, 7]
    assert [device.id for device in sharding.make_mesh(data=2, fsdp=4).devices.flat] == list(range(8))


def weights_layout(tensor: int) -> dict:
    sampler = make_sampler(sharding.rollout_mesh(training(), tensor=tensor))
    weights = nnx.traversals.flatten_mapping(sampler.reshard(trained()))
    return {path: (x.sharding.shard_shape(x.shape), x.shape) for path, x in weights.items()}


def test_weights_are_split_over_tensor_and_whole_over_data():
    found = weights_layout(4)
    L, D, A, V, M = CONFIG.layers, CONFIG.hidden, CONFIG.head_dim, CONFIG.vocab, CONFIG.mlp
    assert found["decoder", "q"][0] == found["decoder", "k"][0] == (L, D, 1, A)
    assert found["decoder", "o"][0] == (L, 1, A, D)
    assert found["decoder", "gate"][0] == (L, D, M // 4) and found["decoder", "down"][0] == (L, M // 4, D)
    assert found["embedding",][0] == found["lm_head",][0] == (V // 4, D)
    assert all(piece == whole for piece, whole in weights_layout(1).values())


def test_the_cache_lies_as_rows_over_data_and_heads_over_tensor():
    sampler = make_sampler(sharding.rollout_mesh(training(), tensor=4))
    with jax.set_mesh(sampler.mesh):
        k = sampler._slots().k[0]
    Z, L, C, K, S, A = k.shape
    assert (Z, C, K) == (2, 8, 4)
    assert k.sharding.shard_shape(k.shape) == (1, L, C, 1, S, A)


def largest_gathered(sampler: Sampler) -> int:
    """The most numbers that an all-gather of the compiled decoding program gives one device."""
    shards, mesh = sampler._shards, sampler.mesh
    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
    one = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)  # noqa: E731
    rule = slots.DrawRule(
        one(jnp.int32), one(jnp.int32), one(jnp.float32), one(jnp.float32), one(bool, CONFIG.vocab), one(jnp.int32, 2)
    )
    with jax.set_mesh(mesh):
        request, table = slots.DrawRequest.abstract(shards, sampler.shapes.slots, rows), None
        if sampler.shapes.page:
            sizes = (shards, sampler.shapes.slots, sampler.shapes.width(CAPACITY))
            table = jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=rows)
        lowered = slots.decode_slots.lower(
            sampler.reshard.graphdef,
            sampler.reshard.weights(),
            sampler._slots(),
            request,
            rule,
            table,
            window=CAPACITY,
            chunk=5,
        )
        text = lowered.compile().as_text()
    gathers = [
        shape.size
        for computation in hlo_text.read(text).computations.values()
        for instruction in computation.instructions
        if instruction.opcode.startswith("all-gather")
        for shape in instruction.shapes
    ]
    return max(gathers, default=0)


def kernel_sizes() -> list[int]:
    """The numbers of the kernels of one decoder layer and of the tables."""
    arrays = nnx.traversals.flatten_mapping(model().arrays())
    layer = [math.prod(x.shape[1:]) for path, x in arrays.items() if path[0] == "decoder" and x.ndim > 2]
    return [*layer, arrays["embedding",].size, arrays["lm_head",].size]


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_decoding_gathers_no_weight(tensor):
    sampler = make_sampler(sharding.rollout_mesh(training(), tensor=tensor))
    assert largest_gathered(sampler) < min(kernel_sizes())


def test_decoding_in_the_layout_of_training_gathers_weights():
    """What the test before would see: without a layout of its own every step gathers all kernels."""
    assert largest_gathered(make_sampler(training())) >= min(kernel_sizes())


def test_a_config_chooses_the_layout(tmp_path):
    config = tapo_grpo.get_config("test")
    mesh = sharding.make_mesh(data=1, fsdp=8)
    loaded, model_config = agent.load_model(shipped.DIRECTORY, config.model, mesh)
    assert agent.make_agent(config, shipped.DIRECTORY, loaded, [], mesh).players.sampler.mesh is mesh
    config.rollout.mesh.tensor = 2
    made = agent.make_agent(config, shipped.DIRECTORY, loaded, [], mesh).players.sampler
    assert dict(made.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert list(made.mesh.devices.flat) == list(mesh.devices.flat)
    assert model_config.kv_heads % 8
    for sizes, sentence in (
        ({"tensor": 8}, rf"rollout.mesh.tensor is 8 and the model has {model_config.kv_heads} key/value heads"),
        ({"data": 3, "tensor": 2}, r"rollout.mesh data=3 × tensor=2 does not fit 8 devices"),
    ):
        config.rollout.mesh.update(data=-1, tensor=0)
        config.rollout.mesh.update(sizes)
        with pytest.raises(UserError, match=sentence):
            agent.make_agent(config, shipped.DIRECTORY, loaded, [], mesh)
