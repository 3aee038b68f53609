"""Build all that plays episodes except the weights: tokenizer, image processor, tools, sampler, budgets, rewards.

It is built once from a config; training and evaluation share it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import processes, rewards
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.models import hf, lora
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore, most_patches
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rewards.judged import Scored
from tapo_jax.rewards.pool import ScorePool
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.rounds import rollout
from tapo_jax.rollout.sampler import Sampler, make_shapes
from tapo_jax.rollout.schedule import Sampling, Shapes
from tapo_jax.tools.base import Tool, ToolRunner
from tapo_jax.tools.watch import Watch
from tapo_jax.types import Episode, Prompt


def load_model(directory: Path, model: ConfigDict, mesh: Mesh) -> tuple[Qwen3VL, Qwen3VLConfig]:
    """Load the model of a directory onto the mesh, with low-rank parameters if model.lora_rank is set.

    Raises UserError if the files are not a model of this family.
    """
    try:
        loaded, config = hf.load(directory, mesh=mesh, dtype=model.param_dtype, compute_dtype=model.dtype)
        if model.lora_rank:
            lora.add(loaded, model.lora_rank, modules=model.lora_modules, alpha=model.lora_alpha)
        return loaded, config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The model directory {directory} cannot be loaded ({error}): give a Qwen3-VL model."
        ) from error


@dataclasses.dataclass(frozen=True)
class Agent:
    """One player of episodes, with the rewards of its episodes."""

    players: Players
    """All that plays except the weights."""
    score: Callable[[Episode], dict[str, float] | Scored]
    """Returns the named rewards of an episode."""
    weights: Mapping[str, float]
    """Reward name -> weight in the total."""
    score_workers: int = 1
    """Threads that score; more than one only if `score` is thread-safe."""
    watch: Watch = dataclasses.field(default_factory=lambda: Watch({}, max_failures=1.0, window=1))
    """Of the services that the tools ask."""

    def play(
        self, params: Any, prompts: Sequence[Prompt], group_size: int, sampling: Sampling
    ) -> tuple[list[Episode], dict[str, float]]:
        """Play and score `group_size` episodes of each of this process's prompts, prompt-major.

        Returns them and the rollout's metrics. In a pod all processes must call this together.
        """
        pool = ScorePool(self.score, self.score_workers)
        try:
            episodes, metrics = rollout(self.players, params, prompts, group_size, sampling, pool.submit)
            self.players.sampler.release()
            pool.wait(episodes)
        finally:
            pool.close()
        self.watch.note(episodes)
        for episode in episodes:
            episode.reward = rewards.total(episode.rewards, self.weights)
        return episodes, metrics | {"time/reward": pool.waited_s}

    def broken_service(self) -> str:
        """Return a sentence about a service that fails too often in some process, "" if there is none.

        Every process must call this, and gets the same.
        """
        if not self.players.runner.services:
            return ""
        return next(filter(None, processes.gather(self.watch.broken())), "")


def open_tools(config: ConfigDict) -> list[Tool]:
    """Return the tools of a config after a first question to each of their services. Every process must call this.

    Raises UserError in every process if a service does not answer one of them.
    """
    tools, found = sources.tools(config), ""
    probes = [tool.probe for tool in tools if "probe" in dir(tool)]
    for probe in probes:
        try:
            probe()
        except UserError as error:
            found = found or str(error)
    if probes and (found := next(filter(None, processes.gather(found)), "")):
        raise UserError(found)
    return tools


def sampler_shapes(config: ConfigDict, model_config: Qwen3VLConfig, mesh: Mesh, image_patches: int) -> Shapes:
    """Return the shapes of the sampler's calls. image_patches: patches of the largest image."""
    r = config.rollout
    return make_shapes(
        model_config,
        mesh,
        slots=r.slots,
        capacity=r.max_length,
        chunk=r.decode_chunk,
        image_patches=image_patches,
        most_patches=most_patches(r.max_image_tokens, r.max_length, model_config.vision.merge),
    )


def make_agent(
    config: ConfigDict,
    directory: Path,
    model: Qwen3VL,
    tools: Sequence[Tool],
    mesh: Mesh,
    *,
    evaluating: bool = False,
) -> Agent:
    """Make the agent of a config. evaluating: with the judge of evaluations.

    Raises UserError for a directory without a usable tokenizer, slots that the mesh does not divide, or a judge whose
    key is not set.
    """
    chat = Chat.from_dir(directory)
    r = config.rollout
    processor = ImageProcessor.from_dir(directory)
    if r.max_pixels:
        processor = processor.limited(r.max_pixels)
    pixels = PixelStore(processor, dtype=model.dtype)
    sampler = Sampler(
        model,
        mesh,
        sampler_shapes(config, model.config, mesh, pixels.max_patches),
        stop_ids=chat.stop_ids,
        forbidden_V=chat.forbidden_V(model.config.vocab),
    )
    runner = ToolRunner(
        tools, workers=config.tools.workers, timeout_s=config.tools.timeout_s, retries=config.tools.retries
    )
    limits = Limits(r.max_turns, r.max_new_tokens, r.max_length, r.max_image_tokens or None, r.max_think_tokens or None)
    players = Players(sampler, chat, pixels, runner, limits, system=r.system, tool_wait_s=r.tool_wait_s)
    score, workers = sources.score(config, evaluating=evaluating), sources.score_workers(config, evaluating=evaluating)
    services = {tool.service: tool.address for tool in tools if {"service", "address"} <= set(dir(tool))}
    watch = Watch(services, max_failures=config.tools.max_failures, window=config.tools.failure_window)
    return Agent(players, score, dict(config.reward.weights), workers, watch)


def examiner(agent: Agent, config: ConfigDict) -> Agent:
    """Return the same agent with the judge of evaluations; the agent itself if the config has no such judge."""
    if not config.eval.judge.endpoint:
        return agent
    score, workers = sources.score(config, evaluating=True), sources.score_workers(config, evaluating=True)
    return dataclasses.replace(agent, score=score, score_workers=workers)
