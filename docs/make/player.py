"""Play a few questions of Atlas with the tiny model that ships with the package, and watch the sampler's slots."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tapo_jax import sharding
from tapo_jax.agent import Agent, load_model, make_agent
from tapo_jax.config import beside
from tapo_jax.data import sources
from tapo_jax.learn.state import split_model
from tapo_jax.models.shipped import model_directory
from tapo_jax.rollout import rounds
from tapo_jax.rollout.board import Board
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.types import Episode

CONFIGS = str(Path(__file__).parents[2] / "configs" / "x")


@dataclasses.dataclass(frozen=True)
class Player:
    """A config, the agent that it describes, and the agent's parameters."""

    config: Any
    agent: Agent
    params: Any

    def play(self, questions: int, group_size: int, step: int) -> list[Episode]:
        """Play the first training questions, `group_size` times each, as a training step does."""
        source = sources.prompts(self.config, "train")
        prompts = [source[index] for index in range(questions)]
        return self.agent.play(self.params, prompts, group_size, Sampling(seed=self.config.seed, step=step))[0]


def make_player(*, slots: int) -> Player:
    """Build the agent of the `:test` setting of configs/tapo_grpo.py with this many slots."""
    config = beside(CONFIGS, "tapo_grpo.py")("test")
    config.rollout.slots = slots
    mesh = sharding.make_mesh(**config.mesh)
    directory = model_directory(config.model.path)
    model, _ = load_model(directory, config.model, mesh)
    agent = make_agent(config, directory, model, sources.tools(config), mesh)
    return Player(config, agent, split_model(model)[1])


@dataclasses.dataclass(frozen=True)
class Bar:
    """The work of a slot from `start` to `stop`, in seconds. kind: "extend", "copy", "decode" or "tool"."""

    kind: str
    slot: int
    start: float
    stop: float
    episode: int


class Watched(Board):
    """The host's state of a rollout, which also records the tool calls and their times."""

    bars: list[Bar]

    def episode(self, slot: int) -> int:
        """Return the number of the episode that plays in a slot."""
        player = self._slots[slot].player
        return player.prompt * len(self.groups[player.prompt].seats) + player.conversation.sample

    def take_turns(self, draws: Sequence[Any], written: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        for draw, tokens in zip(draws, written, strict=True):
            episode = self.episode(draw.slot)
            super().take_turns([draw], [tokens])
            player = self._slots[draw.slot].player
            for future in player.futures if player is not None else ():
                began, slot = time.perf_counter(), draw.slot
                future.add_done_callback(
                    lambda _, began=began, slot=slot, episode=episode: self.bars.append(
                        Bar("tool", slot, began, time.perf_counter(), episode)
                    )
                )


def watch(player: Player, questions: int, group_size: int, step: int) -> list[Bar]:
    """Play as `Player.play` does and return what every slot did. Each call is waited for, so bars do not overlap."""
    bars: list[Bar] = []
    boards: list[Watched] = []
    sampler = player.agent.players.sampler
    extend, copy, decode = sampler.extend, sampler.copy, sampler.decode

    def make_board(*arguments: Any, **named: Any) -> Watched:
        boards.append(Watched(*arguments, **named))
        boards[-1].bars = bars
        return boards[-1]

    def note(kind: str, slots: Sequence[int], start: float) -> None:
        bars.extend(Bar(kind, slot, start, time.perf_counter(), boards[-1].episode(slot)) for slot in slots)

    def extended(params: Any, plan: Any, extensions: Sequence[Any]) -> None:
        start = time.perf_counter()
        extend(params, plan, extensions)
        sampler.wait()
        note("extend", [extension.slot for extension in extensions], start)

    def copied(plan: Any, copies: Sequence[tuple[int, int]]) -> None:
        start = time.perf_counter()
        copy(plan, copies)
        sampler.wait()
        note("copy", [target for _, target in copies], start)

    def decoded(params: Any, plan: Any, draws: Sequence[Any], sampling: Sampling) -> Any:
        start = time.perf_counter()
        chunk = decode(params, plan, draws, sampling)
        jax.block_until_ready(chunk.drawn)
        note("decode", [draw.slot for draw in draws], start)
        return chunk

    sampler.extend, sampler.copy, sampler.decode, rounds.Board = extended, copied, decoded, make_board
    try:
        player.play(questions, group_size, step)
    finally:
        sampler.extend, sampler.copy, sampler.decode, rounds.Board = extend, copy, decode, Board
    return bars
