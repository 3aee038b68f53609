"""The programs of a run with shapes in place of arrays: what `compile_check` compiles.

They are the programs that training runs, made by the same functions; nothing is allocated.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import programs, sharding
from tapo_jax.batch import ModelInputs, TrainBatch
from tapo_jax.check import check, check_rows
from tapo_jax.config import check_choice
from tapo_jax.learn import train_step
from tapo_jax.learn.optimizer import make_optimizer
from tapo_jax.learn.state import TrainState, split_model
from tapo_jax.models import flops, hf
from tapo_jax.models.attention import decodes_in_place
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import most_patches
from tapo_jax.models.parameters import logical_axes
from tapo_jax.models.published import MODELS
from tapo_jax.rollout import slots
from tapo_jax.rollout.schedule import Shapes


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of the run with abstract arguments. model_flops: of one call on all chips. beside: bytes on one
    chip of what is no argument but lies there meanwhile. loops: turns of a loop whose length depends on data (decoding
    ends early when all turns have ended)."""

    name: str
    lower: Callable[[], Any]
    model_flops: float
    beside: float = 0.0
    loops: int = 1


@dataclasses.dataclass(frozen=True)
class Abstract:
    """A run made of shapes, which carry the shardings of the mesh."""

    config: ConfigDict
    model_config: Qwen3VLConfig
    mesh: Mesh
    graphdef: Any
    params: Any
    opt_state: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


def model_shapes(model: ConfigDict) -> Qwen3VLConfig:
    """The shapes of model.path, or of the published model that model.shape names."""
    if model.path:
        return Qwen3VLConfig.from_hf(json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8")))
    check_choice("model.shape", model.shape, tuple(MODELS))
    return MODELS[model.shape]


def abstract_run(config: ConfigDict, devices: list) -> Abstract:
    """The model of a config laid out over the devices. Raises UserError for a config that could not train there."""
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
    model = hf.abstract(model_config, param_dtype=config.model.param_dtype, dtype=config.model.dtype)
    graphdef, params = split_model(model)
    axes = logical_axes(model_config)
    optimizer, schedule = make_optimizer(
        config.optimizer,
        total_steps=1,
        updates_per_step=config.train.updates_per_batch,
        train_vision=config.model.train_vision,
    )
    opt_state = jax.eval_shape(optimizer.init, params)
    params, opt_state = (placed(tree, sharding.parameters(tree, axes, mesh)) for tree in (params, opt_state))
    return Abstract(config, model_config, mesh, graphdef, params, opt_state, optimizer, schedule)


def image_patches(config: ConfigDict, model_config: Qwen3VLConfig) -> int:
    """Patches of the largest image that the image processor lets through."""
    processor = ImageProcessor.from_dir(config.model.path) if config.model.path else ImageProcessor()
    if config.rollout.max_pixels:
        processor = processor.limited(config.rollout.max_pixels)
    return processor.max_patches


def placed(tree: Any, shardings: Any) -> Any:
    """The same shapes with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_of_one(tree: Any) -> float:
    """What the arrays of a tree take on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def train_program(run: Abstract) -> Program:
    """One update on the largest batch: every row as long as rollout.max_length, with as many patches as
    it can have."""
    config, mesh = run.config, run.mesh
    scalar = _array((), jnp.int32, sharding.replicated(mesh))
    state = TrainState(scalar, run.params, run.opt_state, scalar, scalar)
    objective = train_step.make_objective(config)
    forbidden_V = np.zeros(run.model_config.vocab, bool)
    rungs = programs.rungs(config, run.model_config)
    update = train_step.make_update(
        run.graphdef, run.optimizer, run.schedule, objective, forbidden_V, state, mesh, rungs=rungs
    )
    B, T = config.data.prompts_per_step * config.rollout.group_size, config.rollout.max_length
    patches = rungs[-1][1]
    shapes = jax.eval_shape(lambda: _batch(B, T, patches, run))
    batch = placed(shapes, jax.tree.map(lambda _: sharding.rows(mesh), shapes))
    old_logp = batch.sampler_logp_BxT if objective.updates_per_batch > 1 else None
    batch = dataclasses.replace(batch, old_logp_BxT=old_logp)
    rows = B // objective.updates_per_batch
    count = flops.update(run.model_config, [T] * rows, [patches] * rows, train_vision=config.model.train_vision)
    return Program("train", lambda: update.lower(state, batch, None, scalar), count)


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
    """The sampler's slots over the mesh, in the shapes that its calls may have."""

    shards: int
    shapes: Shapes
    state: slots.SlotState


def abstract_slots(run: Abstract) -> Slots:
    config, model_config = run.config, run.model_config
    shards = sharding.batch_shards(run.mesh)
    sizes = dict(slots=config.rollout.slots // shards, capacity=config.rollout.max_length)
    with jax.set_mesh(run.mesh):
        cache = {"capacity": sizes["capacity"], "kv_heads": model_config.kv_heads, "head_dim": model_config.head_dim}
        in_place = decodes_in_place(**cache)
    shapes = Shapes.make(
        **sizes,
        chunk=config.rollout.decode_chunk,
        merge=model_config.vision.merge,
        image_patches=image_patches(config, model_config),
        most_patches=most_patches(
            config.rollout.max_image_tokens, config.rollout.max_length, model_config.vision.merge
        ),
        in_place=in_place,
    )
    with jax.set_mesh(run.mesh):
        empty = slots.init_slots.lower(model_config, shards, **sizes, dtype=jnp.dtype(config.model.dtype))
        state = placed(empty.out_info, empty.compile().output_shardings)
    return Slots(shards, shapes, state)


def decode_program(run: Abstract) -> Program:
    """A chunk of decoding steps in all slots, each as long as it can be."""
    found = abstract_slots(run)
    chunk, capacity, R, vocab = found.shapes.chunk, found.shapes.capacity, found.shapes.slots, run.model_config.vocab
    rows, everywhere = sharding.rows(run.mesh), sharding.replicated(run.mesh)

    def lower() -> Any:
        with jax.set_mesh(run.mesh):
            return slots.decode_slots.lower(
                run.graphdef,
                run.params,
                found.state,
                _array((found.shards, R, 8), jnp.int32, rows),
                _array((2,), jnp.int32, everywhere),
                _array((2,), jnp.float32, everywhere),
                _array((vocab,), bool, everywhere),
                _array((2,), jnp.int32, everywhere),
                window=capacity,
                chunk=chunk,
            )

    count = chunk * flops.decode(run.model_config, [capacity] * found.shards * R)
    return Program("decode", lower, count, beside=bytes_of_one(run.opt_state), loops=chunk)


def extend_program(run: Abstract) -> Program:
    """The extension of slots (a prompt, a tool's response) that needs most memory."""
    found = abstract_slots(run)
    piece = max(found.shapes.extend_calls(), key=lambda p: (p.rows * p.length, p.rows * p.patches, p.window))
    rows = sharding.rows(run.mesh)
    B = found.shards * piece.rows
    inputs = jax.eval_shape(lambda: _inputs(B, piece.length, piece.patches, run))
    inputs = placed(inputs, jax.tree.map(lambda _: rows, inputs))

    def lower() -> Any:
        with jax.set_mesh(run.mesh):
            request = _array((found.shards, piece.rows, 3), jnp.int32, rows)
            return slots.extend_slots.lower(run.graphdef, run.params, found.state, inputs, request, window=piece.window)

    lengths, images = [piece.length] * B, [piece.patches] * B
    text = flops.decoder(run.model_config, tokens=sum(lengths), pairs=flops.causal_pairs(lengths), logits=0)
    tower = flops.vision_tower(run.model_config.vision, patches=sum(images), pairs=flops.full_pairs(images))
    return Program("extend", lower, text + tower, beside=bytes_of_one(run.opt_state))


PROGRAMS: dict[str, Callable[[Abstract], Program]] = {
    "train": train_program,
    "extend": extend_program,
    "decode": decode_program,
}


def _array(shape: tuple[int, ...], dtype: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
