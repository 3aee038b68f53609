"""Play episodes: sampler × conversations × tools -> episodes. Only here do device arrays meet tool threads.

In a round every slot with new tokens is extended and a decoding chunk starts. While it runs, the tools called in the
previous round finish on their threads. Then tool results are appended, turns that ended are parsed and their calls
submitted, and a slot whose episode has finished takes the next one. With `tool_wait_s` infinite nothing depends on
timing: the round waits for every result and handles all of them in slot order, so a rollout repeats bit for bit. In a
pod every process plays its own prompts and makes the same calls in lockstep (`Sampler.plan`).
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tapo_jax.config import UserError
from tapo_jax.rollout.board import Board
from tapo_jax.rollout.groups import Group, make_groups
from tapo_jax.rollout.paged_board import PagedBoard
from tapo_jax.rollout.players import Players, Wish
from tapo_jax.rollout.progress import Moment
from tapo_jax.rollout.sampler import Chunk
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.rollout.summary import summary
from tapo_jax.types import Episode, Prompt

POLL_S = 0.002
GRACE_S = 2.0  # for tools that still run when a stop is wished
LISTEN_S = 0.1  # between two looks for a wish to stop, while tools run


class Stopped(Exception):
    """A rollout has ended before its episodes have, because a process wished it to stop; the groups hold them."""


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
    params: the trained parameters; the sampler's weights are made of them, and dropped at the end.
    prompts: the prompts of this process.
    group_size: G, episodes for each prompt.
    sampling: temperature, top-p and the parts of the random keys.
    on_episode: called with every episode when it ends, while others still play; it must not block.

    Returns the episodes in prompt-major order (p·G + g) and metrics: means over this process's episodes, and seconds
    as time/*. Raises UserError if an episode may become longer than a slot, and Stopped in every process at the
    beginning of the round in which one of them wishes to stop.
    """
    groups = make_groups(prompts, group_size, sampling.first_prompt)
    began = time.perf_counter()
    seconds = play_groups(players, params, groups, sampling, on_episode=on_episode)
    episodes = [episode for group in groups for episode in group.episodes]
    runner, played_s = players.runner, time.perf_counter() - began
    return episodes, seconds | summary(episodes, tuple(runner.tools), played_s, runner.services)


def stream(
    players: Players,
    params: Any,
    prompts: Sequence[Prompt],
    starts: Sequence[tuple[int, int]],
    sampling: Sampling,
    on_episode: Callable[[int, Episode], None],
) -> dict[str, float]:
    """Play episodes and keep none: each one is passed on when it ends. Arguments as in `rollout`, and

    starts: (index of the prompt, sample) of each episode, in the order in which they start; samples of one prompt that
        follow each other share its images and the computation of its prompt.
    on_episode: called with the index in `starts` and the episode.

    Returns seconds as time/*. Raises what `rollout` raises.
    """
    keys = sampling.prompt_keys or range(sampling.first_prompt, sampling.first_prompt + len(prompts))
    groups = [Group(prompt, [], number=key, key=key) for prompt, key in zip(prompts, keys, strict=True)]
    for prompt, sample in starts:
        seats = groups[prompt].seats
        seats += [None] * (sample + 1 - len(seats))
    index = {start: number for number, start in enumerate(starts)}

    def passed(group: int, episode: Episode) -> None:
        groups[group].seats[episode.sample] = None
        on_episode(index[group, episode.sample], episode)

    return _play(players, params, _board(players)(players, groups, sampling.step, passed, starts), sampling)


@dataclasses.dataclass(frozen=True)
class Until:
    """When a rollout ends although it has not finished all of its groups. The same kind in every process."""

    complete: int
    """Number of this process's groups that are complete then."""
    oldest: int
    """The newest step whose groups have to be complete too: those that began in it or before."""

    def reached(self, groups: Sequence[Group]) -> bool:
        unfinished = [group for group in groups if not group.complete]
        late = any(group.begun is not None and group.begun <= self.oldest for group in unfinished)
        return len(groups) - len(unfinished) >= self.complete and not late


@dataclasses.dataclass
class Counts:
    """What a rollout has done so far, over this process's slots."""

    steps: int = 0
    """Decoding steps, in each of which every slot could have drawn a token."""
    drawn: int = 0
    """Tokens that were drawn in them."""
    recomputed: int = 0
    """Tokens of carried conversations whose keys and values were computed anew."""
    evicted: int = 0
    """How often a conversation had to leave its slot because the pages had run out."""
    evicted_tokens: int = 0
    """Tokens of theirs that were in the cache, whose keys and values are computed anew."""
    places: list[dict[str, Any]] | None = None
    """Where everybody was when a stop or a save was wished (`Board.get_places`); None when nobody plays."""


def play_groups(
    players: Players,
    params: Any,
    groups: Sequence[Group],
    sampling: Sampling,
    *,
    until: Until | None = None,
    counts: Counts | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    save: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Play the groups on, in place, until they are complete, or until `until` is reached in every process.

    until: None plays all to their end.
    counts: is added to.
    save: called between two rounds, in every process, when one of them wishes to save what is in flight.

    The other arguments, and what is raised, are as for `rollout`. Returns seconds as time/*.
    """
    passed, counts = None if on_episode is None else lambda _, episode: on_episode(episode), counts or Counts()
    board = _board(players)(players, groups, sampling.step, passed, places=counts.places)
    return _play(players, params, board, sampling, until=until, counts=counts, save=save)


def _board(players: Players) -> type[Board]:
    return PagedBoard if players.sampler.shapes.page else Board


def _play(
    players: Players,
    params: Any,
    board: Board,
    sampling: Sampling,
    *,
    until: Until | None = None,
    counts: Counts | None = None,
    save: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Play what is on the board, as `play_groups` says; after an error the tools of its episodes are closed."""
    sampler, limits = players.sampler, players.limits
    if limits.max_length > sampler.shapes.capacity:
        raise UserError(
            f"rollout.max_length is {limits.max_length}: a slot of the sampler holds {sampler.shapes.capacity} tokens."
        )
    counts = counts or Counts()
    seconds = {"time/prefill": 0.0, "time/decode": 0.0, "time/tool_wait": 0.0}
    began = time.perf_counter()
    weights = jax.block_until_ready(sampler.reshard(params))
    seconds["time/reshard"] = time.perf_counter() - began
    exact = True  # whether the caches hold what the conversations say
    watch = _watch(players, board, counts)
    try:
        while True:
            board.fill_slots()
            counts.recomputed += board.take_recomputed()
            evicted, lost = board.take_evicted()
            counts.evicted, counts.evicted_tokens = counts.evicted + evicted, counts.evicted_tokens + lost
            needs = board.needs()
            more = board.playing and not (until is not None and until.reached(board.groups))
            watch()
            plan = sampler.plan(needs, more=more, wish=players.wish())
            if not plan.more:
                break
            if plan.wish != Wish.NOTHING:
                counts.places = board.get_places() if exact else None
            if plan.wish == Wish.STOP:
                raise Stopped
            if plan.wish == Wish.SAVE and save is not None:
                save()
            needs = board.give_pages(needs)
            began = time.perf_counter()
            sampler.extend(weights, plan, needs.extensions)
            sampler.copy(plan, needs.copies)
            sampler.wait()
            board.mark_sent(needs)
            seconds["time/prefill"] += (decoding := time.perf_counter()) - began
            chunk = sampler.decode(weights, plan, needs.draws, sampling) if plan.decode_rows else None
            board.collect_tools(_while_decoding(board.futures(), chunk))
            written = chunk.fetch() if chunk else []
            seconds["time/decode"] += (decoded := time.perf_counter()) - decoding
            idle = not needs.draws and not needs.extensions
            watch(in_tools=True)
            waited = _wait(board.futures(), players.tool_wait_s, idle=idle, stopping=players.stopping)
            seconds["time/tool_wait"] += time.perf_counter() - decoded
            if not waited:
                exact = False  # the caches are ahead of the conversations
                continue  # the next plan ends the rollout; what this round has drawn is drawn again
            board.collect_tools(True)
            board.take_turns(needs.draws, written)
            counts.steps += max((len(token_n) for token_n, _ in written), default=0)
            counts.drawn += sum(len(token_n) for token_n, _ in written)
    except Stopped:  # the conversations go on with the next start
        raise
    except BaseException:
        board.close()
        raise
    counts.places = None
    return seconds


def _watch(players: Players, board: Board, counts: Counts) -> Callable[..., None]:
    """Return a function that tells `players.watch` where the rollout is that begins now."""
    began, before = time.perf_counter(), dataclasses.replace(counts)

    def watch(*, in_tools: bool = False) -> None:
        if not in_tools or board.futures():
            played = {"drawn": counts.drawn - before.drawn, "steps": counts.steps - before.steps}
            episodes = {"finished": board.finished, "episodes": board.episodes, "slots": players.sampler.slots}
            players.watch(Moment(time.perf_counter() - began, **episodes, **played, in_tools=in_tools))

    return watch


def _while_decoding(futures: set[concurrent.futures.Future], chunk: Chunk | None) -> bool:
    """Wait until all futures are done or the chunk is ready. Return whether all futures are done."""
    while futures and chunk is not None and not chunk.is_ready():
        _, futures = concurrent.futures.wait(futures, timeout=POLL_S)
    return all(future.done() for future in futures)


def _wait(
    futures: set[concurrent.futures.Future], tool_wait_s: float, *, idle: bool, stopping: Callable[[], bool]
) -> bool:
    """Wait for the tools up to `tool_wait_s`; if `idle`, at least until the first is done.

    Returns whether finished results may be taken: False if the rollout has to stop and a tool still runs.
    """
    until, left = time.perf_counter() + tool_wait_s, futures
    while left:
        rest = max(until - time.perf_counter(), 0.0)
        first = idle and left == futures
        if not rest and not first:
            break
        when = concurrent.futures.FIRST_COMPLETED if not rest else concurrent.futures.ALL_COMPLETED
        _, left = concurrent.futures.wait(left, timeout=min(rest or LISTEN_S, LISTEN_S), return_when=when)
        if left and stopping():
            return not concurrent.futures.wait(left, timeout=GRACE_S).not_done
    return True
