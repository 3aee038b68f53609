"""Our side of `bench/rollout.py`: the rollout of training, with its sampler, on one device."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from tapo_jax import sharding
from tapo_jax.bench.rollout_work import (
    Numbers,
    Played,
    ScriptPlayers,
    Work,
    forbidden,
    look_up_runner,
    prompts,
)
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.groups import make_groups
from tapo_jax.rollout.rounds import Counts, play_groups
from tapo_jax.rollout.sampler import Sampler, make_shapes
from tapo_jax.rollout.schedule import Extension, Round, Sampling


class CountingSampler(Sampler):
    """The sampler, counting what its extending calls are given and what they compute."""

    prefilled = computed = 0

    def extend(self, weights: Any, plan: Round, extensions: Sequence[Extension]) -> None:
        self.prefilled += sum(len(extension.row.token_T) for extension in extensions)
        self.computed += sum(piece.rows * piece.length for piece in plan.pieces)
        super().extend(weights, plan, extensions)


class OurRollout:
    """Plays the work as a step of training does.

    model: the weights.
    slots: conversations at a time.
    chunk: tokens of a decoding call.
    """

    name = "tapo_jax"

    def __init__(self, model: Qwen3VL, work: Work, *, slots: int, chunk: int):
        config, mesh = model.config, sharding.one_device()
        vision = config.vision
        capacity = work.capacity + 1  # a conversation keeps room for one more token
        sizes = dict(slots=slots, capacity=capacity, chunk=chunk, image_patches=0, most_patches=0)
        shapes = dataclasses.replace(make_shapes(config, mesh, **sizes), patches=())
        self.work, self.params = work, nnx.to_pure_dict(nnx.state(model))
        self.sampler = CountingSampler(model, mesh, shapes, stop_ids=(), forbidden_V=forbidden(config))
        self.players = ScriptPlayers(
            self.sampler,
            Numbers(config.image_token),
            PixelStore(ImageProcessor(patch=vision.patch, merge=vision.merge, temporal=vision.temporal)),
            look_up_runner(work),
            Limits(max_turns=0, max_new_tokens=0, max_length=capacity),
            work=work,
        )
        self.sampler.warm_up(self.params)
        self.sampler.release()

    def play(self, *, temperature: float, seed: int) -> Played:
        sampler, counts = self.sampler, Counts()
        sampler.prefilled = sampler.computed = 0
        began, began_cpu = time.perf_counter(), time.process_time()
        groups = make_groups(prompts(self.work), self.work.group)
        seconds = play_groups(self.players, self.params, groups, Sampling(temperature, seed=seed), counts=counts)
        episodes = [episode for group in groups for episode in group.episodes]
        sampler.release()
        return Played(
            seconds=time.perf_counter() - began,
            cpu_s=time.process_time() - began_cpu,
            prefill_s=seconds["time/prefill"],
            decode_s=seconds["time/decode"],
            prefilled=sampler.prefilled,
            computed=sampler.computed,
            idle=1 - counts.drawn / (counts.steps * sampler.slots),
            written=[np.asarray(episode.token_T)[episode.mask_T].tolist() for episode in episodes],
        )

    def close(self) -> None:
        self.players.runner.close()
