"""Play episodes: sampler × conversations × tools -> episodes. Only here do device arrays meet tool threads.

In a round every slot with new tokens is extended and a decoding chunk starts. While it runs, the tools called in the
previous round finish on their threads. Then tool results are appended, turns that ended are parsed and their calls
submitted, and a slot whose episode has finished takes the next one. With `tool_wait_s` infinite nothing depends on
timing: the round waits for every result and handles all of them in slot order, so a rollout repeats bit for bit. In a
pod every process plays its own prompts and makes the same calls in lockstep (`Sampler.plan`).
"""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.rollout.board import Board
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.sampler import Chunk
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.rollout.summary import service_summary, summary
from tapo_jax.types import Episode, Prompt

POLL_S = 0.002


def rollout(
    players: Players,
    params: Any,
    prompts: Sequence[Prompt],
    group_size: int,
    sampling: Sampling,
    on_episode: Callable[[Episode], None] | None = None,
) -> tuple[list[Episode], dict[str, float]]:
    """Play `group_size` episodes of each of this process's prompts. Rewards are left to the caller.

    players: the sampler, tools and limits of the run.
    params: the weights, as `nnx.merge` takes them.
    prompts: the prompts of this process.
    group_size: G, episodes for each prompt.
    sampling: temperature, top-p and the parts of the random keys.
    on_episode: called with every episode when it ends, while others still play; it must not block.

    Returns the episodes in prompt-major order (p·G + g) and metrics: means over this process's episodes, and seconds
    as time/*. Raises UserError if an episode may become longer than a slot.
    """
    sampler, limits = players.sampler, players.limits
    if limits.max_length > sampler.shapes.capacity:
        raise UserError(
            f"rollout.max_length is {limits.max_length}: a slot of the sampler holds {sampler.shapes.capacity} tokens."
        )
    board = Board(players, prompts, group_size, sampling.first_prompt, on_episode)
    seconds = {"time/prefill": 0.0, "time/decode": 0.0, "time/tool_wait": 0.0}
    start = time.perf_counter()
    while True:
        board.fill_slots()
        needs = board.needs()
        plan = sampler.plan(needs, more=board.playing)
        if not plan.more:
            break
        began = time.perf_counter()
        sampler.extend(params, plan, needs.extensions)
        sampler.copy(plan, needs.copies)
        sampler.wait()
        board.mark_sent(needs)
        seconds["time/prefill"] += (decoding := time.perf_counter()) - began
        chunk = sampler.decode(params, plan, needs.draws, sampling) if plan.decode_rows else None
        board.collect_tools(_while_decoding(board.futures(), chunk))
        written = chunk.fetch() if chunk else []
        seconds["time/decode"] += (decoded := time.perf_counter()) - decoding
        idle = not needs.draws and not needs.extensions
        board.collect_tools(_wait(board.futures(), players.tool_wait_s, idle=idle))
        seconds["time/tool_wait"] += time.perf_counter() - decoded
        board.take_turns(needs.draws, written)
    episodes = [episode for episode in board.episodes if episode is not None]
    numbers = summary(episodes, tuple(players.runner.tools), time.perf_counter() - start)
    return episodes, seconds | numbers | service_summary(episodes, players.runner.services)


def _while_decoding(futures: set[concurrent.futures.Future], chunk: Chunk | None) -> bool:
    """Wait until all futures are done or the chunk is ready. Return whether all futures are done."""
    while futures and chunk is not None and not chunk.is_ready():
        _, futures = concurrent.futures.wait(futures, timeout=POLL_S)
    return all(future.done() for future in futures)


def _wait(futures: set[concurrent.futures.Future], tool_wait_s: float, *, idle: bool) -> bool:
    """Wait for the tools up to `tool_wait_s`; if `idle`, at least until the first is done.

    Returns True: finished results may be taken."""
    timeout = None if tool_wait_s == float("inf") else tool_wait_s
    _, left = concurrent.futures.wait(futures, timeout=timeout)
    if idle and futures and left == futures:
        concurrent.futures.wait(left, return_when=concurrent.futures.FIRST_COMPLETED)
    return True
