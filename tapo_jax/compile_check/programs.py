"""The programs of a run with shapes in place of arrays: what `compile_check` compiles.

They are the programs that training runs, made by the same functions; nothing is allocated.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import sharding
from tapo_jax.agent import rollout_mesh, sampler_shapes
from tapo_jax.batch import ModelInputs, TrainBatch
from tapo_jax.check import check, check_rows
from tapo_jax.config import UserError, check_choice
from tapo_jax.learn import train_step
from tapo_jax.learn.state import TrainState, split_model
from tapo_jax.models import flops, lora
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.model_files import read_json
from tapo_jax.models.parameters import logical_axes
from tapo_jax.models.published import MODELS
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.models.shipped import located
from tapo_jax.programs import buckets, make_objective, make_optimizer
from tapo_jax.rollout import slots
from tapo_jax.rollout.schedule import Shapes
from tapo_jax.rollout.weights import Reshard


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of the run with abstract arguments."""

    name: str
    lower: Callable[[], Any]
    model_flops: float
    """Flops of one call on all chips."""
    beside: float = 0.0
    """Bytes of other memory in use on one chip, which are not arguments."""
    loops: int = 1
    """Iterations of a loop whose length depends on data (decoding ends early when all turns have ended)."""
    tokens: int = 0
    """Tokens that one call adds to the slots of all chips."""


@dataclasses.dataclass(frozen=True)
class Abstract:
    """A run with shapes in place of arrays; the shapes carry the shardings of the mesh."""

    config: ConfigDict
    model_config: Qwen3VLConfig
    mesh: Mesh
    graphdef: Any
    params: Any
    opt_state: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


def model_shapes(model: ConfigDict) -> Qwen3VLConfig:
    """Return the shapes of model.path, or of the published model that model.shape names."""
    if model.path:
        try:
            return Qwen3VLConfig.from_hf(read_json(located(model.path) / "config.json"))
        except ValueError as error:
            raise UserError(f"{model.path} cannot be checked ({error}): give a Qwen3-VL model.") from error
    check_choice("model.shape", model.shape, tuple(MODELS))
    return MODELS[model.shape]


def abstract_run(config: ConfigDict, devices: list) -> Abstract:
    """Lay the model of a config out over the devices. Raises UserError for a config that could not train there."""
    check(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    check_rows(
        prompts=config.data.prompts_per_step,
        group_size=config.rollout.group_size,
        shards=sharding.batch_shards(mesh),
        processes=1,
        updates=config.train.updates_per_batch,
        micro_batches=config.train.micro_batches,
    )
    model_config = model_shapes(config.model)
    graphdef, params = split_model(abstract_model(model_config, config.model))
    axes = logical_axes(model_config)
    optimizer, schedule = make_optimizer(config, total_steps=1)
    opt_state = jax.eval_shape(optimizer.init, params)
    params, opt_state = (placed(tree, sharding.parameters(tree, axes, mesh)) for tree in (params, opt_state))
    return Abstract(config, model_config, mesh, graphdef, params, opt_state, optimizer, schedule)


def abstract_model(model_config: Qwen3VLConfig, model: ConfigDict) -> Qwen3VL:
    """Make the model of shapes, with low-rank parameters if the config has them."""

    def make() -> Qwen3VL:
        dtypes = {"param_dtype": jnp.dtype(model.param_dtype), "dtype": jnp.dtype(model.dtype)}
        made = Qwen3VL(model_config, rngs=nnx.Rngs(0), **dtypes)
        if model.lora_rank:
            lora.add(made, model.lora_rank, modules=model.lora_modules, alpha=model.lora_alpha)
        return made

    return nnx.eval_shape(make)


def image_patches(config: ConfigDict, model_config: Qwen3VLConfig) -> int:
    """Return the number of patches of the largest image that the image processor allows."""
    processor = ImageProcessor.from_dir(located(config.model.path)) if config.model.path else ImageProcessor()
    if config.rollout.max_pixels:
        processor = processor.limited(config.rollout.max_pixels)
    return processor.max_patches


def placed(tree: Any, shardings: Any) -> Any:
    """Return the same shapes with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_of_one(tree: Any) -> float:
    """Return the bytes that the arrays of a tree take on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def has_reference(config: ConfigDict) -> bool:
    """Return whether the reference weights of a KL term stay on the chips."""
    return config.algorithm.kl_coef != 0


def reference_bytes(run: Abstract) -> float:
    """Return the bytes that the reference weights take on one chip."""
    return bytes_of_one(run.params) if has_reference(run.config) else 0.0


def policy_of(run: Abstract) -> train_step.Policy:
    return train_step.Policy(run.graphdef, np.zeros(run.model_config.vocab, bool), run.mesh)


def largest_batch(run: Abstract) -> TrainBatch:
    """Return the batch whose rows are all as long as rollout.max_length, with as many patches as they can have."""
    config, mesh = run.config, run.mesh
    B, T = config.data.prompts_per_step * config.rollout.group_size, config.rollout.max_length
    shapes = jax.eval_shape(lambda: _batch(B, T, buckets(config, run.model_config)[-1][1], run))
    batch = placed(shapes, jax.tree.map(lambda _: sharding.rows(mesh), shapes))
    old_logp = batch.sampler_logp_BxT if config.train.updates_per_batch > 1 else None
    return dataclasses.replace(batch, old_logp_BxT=old_logp)


def train_program(run: Abstract) -> Program:
    """Return the program of one update on the largest batch."""
    config = run.config
    scalar = _array((), jnp.int32, sharding.replicated(run.mesh))
    state = TrainState(scalar, run.params, run.opt_state, scalar, scalar)
    sizes = buckets(config, run.model_config)
    update = train_step.make_update(
        policy_of(run), run.optimizer, run.schedule, make_objective(config), state, buckets=sizes
    )
    batch = largest_batch(run)
    reference = batch.sampler_logp_BxT if has_reference(config) else None
    rows = batch.mask_BxT.shape[0] // config.train.updates_per_batch
    kinds = {"train_vision": config.model.train_vision, "lora": config.model.lora_rank > 0}
    count = flops.update(run.model_config, [config.rollout.max_length] * rows, [sizes[-1][1]] * rows, **kinds)
    lower = lambda: update.lower(state, batch, reference, scalar)  # noqa: E731
    return Program("train", lower, count, beside=reference_bytes(run))


def log_probs_program(run: Abstract) -> Program:
    """Return the program of the reference model's log-probabilities of the largest batch."""
    config = run.config
    sizes = buckets(config, run.model_config)
    log_probs = train_step.make_log_probs(policy_of(run), make_objective(config), buckets=sizes)
    batch = largest_batch(run)
    rows = batch.mask_BxT.shape[0]
    count = flops.forward(run.model_config, [config.rollout.max_length] * rows, [sizes[-1][1]] * rows)
    beside = bytes_of_one(run.params) + bytes_of_one(run.opt_state)  # the trained weights; the arguments are others
    return Program("log_probs", lambda: log_probs.lower(run.params, batch.inputs), count, beside=beside)


def _batch(B: int, T: int, patches: int, run: Abstract) -> TrainBatch:
    return TrainBatch(
        inputs=_inputs(B, T, patches, run),
        mask_BxT=jnp.zeros((B, T), bool),
        step_BxT=jnp.zeros((B, T), jnp.int32),
        sampler_logp_BxT=jnp.zeros((B, T)),
        advantage_BxT=jnp.zeros((B, T)),
    )


def _inputs(B: int, T: int, N: int, run: Abstract) -> ModelInputs:
    i32, features = jnp.int32, run.model_config.vision.patch_features
    text = ModelInputs(jnp.zeros((B, T), i32), jnp.zeros((B, T), i32), jnp.zeros((B, T, 3), i32))
    if N == 0:
        return text
    return dataclasses.replace(
        text,
        feature_BxT=jnp.zeros((B, T), i32),
        pixels_BxNxF=jnp.zeros((B, N, features), run.config.model.dtype),
        patch_image_BxN=jnp.zeros((B, N), i32),
        patch_rowcol_BxNx2=jnp.zeros((B, N, 2), i32),
        patch_corner_BxNx4=jnp.zeros((B, N, 4), i32),
        patch_weight_BxNx4=jnp.zeros((B, N, 4)),
    )


@dataclasses.dataclass(frozen=True)
class Slots:
    """The sampler's slots over the rollout's mesh, in the shapes that its calls may have."""

    mesh: Mesh
    rows: Any
    """The layout in which processes put the rows of a call."""
    shards: int
    shapes: Shapes
    state: slots.SlotState
    reshard: Reshard
    beside: float
    """Bytes in use on one chip besides the weights and the slots: the parameters that the weights are copies of, the
    optimizer's state and the reference's weights."""

    def table(self, rows: int, window: int) -> jax.ShapeDtypeStruct | None:
        """Return the table of the pages of a call's rows; None without pages."""
        if not self.shapes.page:
            return None
        return _array((self.shards, rows, self.shapes.width(window)), jnp.int32, self.rows)


def abstract_slots(run: Abstract) -> Slots:
    config, model_config = run.config, run.model_config
    mesh = rollout_mesh(config, model_config, run.mesh)
    rows = sharding.rows_mesh(mesh)
    shards = sharding.batch_shards(rows)
    shapes = sampler_shapes(config, model_config, mesh, image_patches(config, model_config))
    together = sharding.batch_shards(mesh)
    sizes = shapes.slot_sizes(shards // together)
    with jax.set_mesh(mesh):
        empty = slots.init_slots.lower(model_config, together, **sizes, dtype=jnp.dtype(config.model.dtype))
        state = placed(empty.out_info, empty.compile().output_shardings)
    reshard = Reshard(abstract_model(model_config, config.model), mesh)
    beside = bytes_of_one(reshard.beside(run.params)) + bytes_of_one(run.opt_state) + reference_bytes(run)
    return Slots(mesh, sharding.rows(rows), shards, shapes, state, reshard, beside)


def reshard_program(run: Abstract) -> Program | None:
    """Return the program that makes the sampler's weights of the parameters; None if they are the same arrays."""
    reshard = abstract_slots(run).reshard
    if not reshard.beside(run.params):
        return None
    return Program(
        "reshard", lambda: reshard.lower(run.params), 0.0, beside=bytes_of_one(run.opt_state) + reference_bytes(run)
    )


def decode_program(run: Abstract) -> Program:
    """Return the program of a chunk of decoding steps in all slots, each at its max length."""
    found = abstract_slots(run)
    chunk, capacity, R, vocab = found.shapes.chunk, found.shapes.capacity, found.shapes.slots, run.model_config.vocab
    everywhere = sharding.replicated(found.mesh)

    integer, number = _array((), jnp.int32, everywhere), _array((), jnp.float32, everywhere)
    forbidden_V, stop_E = _array((vocab,), bool, everywhere), _array((2,), jnp.int32, everywhere)
    rule = slots.DrawRule(integer, integer, number, number, forbidden_V, stop_E)

    def lower() -> Any:
        with jax.set_mesh(found.mesh):
            return slots.decode_slots.lower(
                found.reshard.graphdef,
                found.reshard.weights(),
                found.state,
                slots.DrawRequest.abstract(found.shards, R, found.rows),
                rule,
                found.table(R, capacity),
                window=capacity,
                chunk=chunk,
            )

    count = chunk * flops.decode(run.model_config, [capacity] * found.shards * R)
    tokens = chunk * found.shards * R
    return Program("decode", lower, count, beside=found.beside, loops=chunk, tokens=tokens)


def extend_program(run: Abstract) -> Program:
    """Return the program of the extension of slots (a prompt, a tool's response) that needs most memory."""
    found = abstract_slots(run)
    piece = max(found.shapes.extend_calls(), key=lambda p: (p.rows * p.length, p.rows * p.patches, p.window))
    B = found.shards * piece.rows
    inputs = jax.eval_shape(lambda: _inputs(B, piece.length, piece.patches, run))
    inputs = placed(inputs, jax.tree.map(lambda _: found.rows, inputs))

    def lower() -> Any:
        with jax.set_mesh(found.mesh):
            request = _array((found.shards, piece.rows, 3), jnp.int32, found.rows)
            model = found.reshard.graphdef, found.reshard.weights()
            table = found.table(piece.rows, piece.window)
            return slots.extend_slots.lower(*model, found.state, inputs, request, table, window=piece.window)

    lengths, images = [piece.length] * B, [piece.patches] * B
    text = flops.decoder(run.model_config, tokens=sum(lengths), pairs=flops.causal_pairs(lengths), logits=0)
    tower = flops.vision_tower(run.model_config.vision, patches=sum(images), pairs=flops.full_pairs(images))
    return Program("extend", lower, text + tower, beside=found.beside, tokens=sum(lengths))


PROGRAMS: dict[str, Callable[[Abstract], Program | None]] = {
    "train": train_program,
    "log_probs": log_probs_program,
    "reshard": reshard_program,
    "extend": extend_program,
    "decode": decode_program,
}


def _array(shape: tuple[int, ...], dtype: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
