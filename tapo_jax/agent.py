"""Everything that plays episodes besides the weights: tokenizer, image processor, tools, sampler, budgets, rewards.

Built once from a config; training and evaluation play with the same one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import rewards
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.models import hf, lora
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore, most_patches
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.rounds import rollout
from tapo_jax.rollout.sampler import Sampler
from tapo_jax.tools.base import Tool, ToolRunner
from tapo_jax.types import Episode, Prompt


def load_model(directory: Path, model: ConfigDict, mesh: Mesh) -> tuple[Qwen3VL, Qwen3VLConfig]:
    """The model of a directory, laid out over the mesh, with low-rank parameters where model.lora_rank asks for them.
    Raises UserError where the files are not a model of this family."""
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
    """One player of episodes. score: its named rewards; weights: reward name -> weight."""

    sampler: Sampler
    chat: Chat
    pixels: PixelStore
    runner: ToolRunner
    limits: Limits
    score: Callable[[Episode], dict[str, float]]
    weights: Mapping[str, float]
    tool_wait_s: float
    system: str

    def play(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        temperature: float,
        top_p: float,
        seed: int,
        step: int,
        first_prompt: int = 0,
    ) -> tuple[list[Episode], dict[str, float]]:
        """`group_size` scored episodes of each of this process's prompts, prompt-major, and the rollout's metrics.

        first_prompt: the number of prompts[0] among those of all processes. In a pod every process calls this together.
        """
        episodes, metrics = rollout(
            self.sampler,
            params,
            prompts,
            chat=self.chat,
            pixels=self.pixels,
            runner=self.runner,
            group_size=group_size,
            limits=self.limits,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            step=step,
            tool_wait_s=self.tool_wait_s,
            first_prompt=first_prompt,
            system=self.system,
        )
        self.sampler.release()
        for episode in episodes:
            episode.rewards = self.score(episode)
            episode.reward = rewards.total(episode.rewards, self.weights)
        return episodes, metrics


def make_agent(config: ConfigDict, directory: Path, model: Qwen3VL, tools: Sequence[Tool], mesh: Mesh) -> Agent:
    """An agent as the config says. Raises UserError for a directory without a usable tokenizer or slots that the mesh
    does not divide."""
    chat = Chat.from_dir(directory)
    rollout_config = config.rollout
    processor = ImageProcessor.from_dir(directory)
    if rollout_config.max_pixels:
        processor = processor.limited(rollout_config.max_pixels)
    pixels = PixelStore(processor, dtype=model.dtype)
    sampler = Sampler(
        model,
        mesh=mesh,
        slots=rollout_config.slots,
        capacity=rollout_config.max_length,
        chunk=rollout_config.decode_chunk,
        image_patches=pixels.max_patches,
        most_patches=most_patches(
            rollout_config.max_image_tokens, rollout_config.max_length, model.config.vision.merge
        ),
        stop_ids=chat.stop_ids,
        forbidden_V=chat.forbidden_V(model.config.vocab),
    )
    runner = ToolRunner(
        tools, workers=config.tools.workers, timeout_s=config.tools.timeout_s, retries=config.tools.retries
    )
    limits = Limits(
        rollout_config.max_turns,
        rollout_config.max_new_tokens,
        rollout_config.max_length,
        rollout_config.max_image_tokens or None,
        rollout_config.max_think_tokens or None,
    )
    return Agent(
        sampler,
        chat,
        pixels,
        runner,
        limits,
        score=sources.score(config),
        weights=dict(config.reward),
        tool_wait_s=rollout_config.tool_wait_s,
        system=rollout_config.system,
    )
