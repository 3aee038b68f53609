"""Sampler × conversations × tools -> episodes. The only place where device arrays meet tool threads.

A round: every slot with new tokens is extended; a decoding chunk starts; while it runs, the tools called in the round
before finish on their threads; then tool results are appended, turns that ended are parsed and their calls submitted,
and a slot whose episode has finished takes the next one. With `tool_wait_s` infinite nothing in this depends on time:
every result of a round is waited for and all are handled in slot order, so a rollout repeats bit for bit. In a pod
every process plays its own prompts and makes the same calls in lockstep (`Sampler.plan`).
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapo_jax.chat import Chat
from tapo_jax.config import UserError
from tapo_jax.episode import Conversation, Limits, Opening, open_prompt
from tapo_jax.inputs import PixelStore, Row, make_row
from tapo_jax.sampler import Chunk, Sampler
from tapo_jax.schedule import Draw, Extension
from tapo_jax.tools.base import ToolRunner
from tapo_jax.types import Episode, Prompt

POLL_S = 0.002
FINISHES = ("answer", "length", "turns", "malformed")
ERRORS = ("unparsable", "unknown_tool", "bad_arguments", "bad_image", "bad_box", "timeout", "exception")


@dataclasses.dataclass
class Player:
    """A conversation in its slot. `sent` tokens and `sent_images` images of it are in the cache; the next token is at
    `position`. row: tokens that wait to be extended; their last one is followed by `row_end`."""

    conversation: Conversation
    episode: int
    prompt: int
    sent: int = 0
    sent_images: int = 0
    position: int = 0
    row: Row | None = None
    row_end: int = 0
    future: concurrent.futures.Future | None = None


def rollout(
    sampler: Sampler,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    chat: Chat,
    pixels: PixelStore,
    runner: ToolRunner,
    group_size: int,
    limits: Limits,
    temperature: float,
    top_p: float,
    seed: int,
    step: int,
    tool_wait_s: float = float("inf"),
    first_prompt: int = 0,
    system: str = "",
) -> tuple[list[Episode], dict[str, float]]:
    """Plays `group_size` episodes of each of this process's prompts. Rewards are left to the caller.

    params: the weights, as `nnx.merge` takes them. first_prompt: number of prompts[0] among the prompts of all
    processes: the random keys come from (seed, step, prompt, sample, turn). tool_wait_s: how long a round waits for
    tools after its decoding; finite values trade repeatability for never waiting on one slow tool.
    Returns episodes in prompt-major order (p·G + g) and metrics: means over this process's episodes, and seconds as
    time/*. Raises UserError where an episode may become longer than a slot.
    """
    if limits.max_length > sampler.shapes.capacity:
        raise UserError(
            f"rollout.max_length is {limits.max_length}: a slot of the sampler holds {sampler.shapes.capacity} tokens."
        )
    game = _Game(sampler, prompts, chat, pixels, runner, group_size, limits, first_prompt, system)
    seconds = {"time/prefill": 0.0, "time/decode": 0.0, "time/tool_wait": 0.0}
    start = time.perf_counter()
    while True:
        game.fill_slots()
        extensions, copies, draws = game.needs()
        plan = sampler.plan(extensions, copies, draws, more=game.playing)
        if not plan.more:
            break
        began = time.perf_counter()
        sampler.extend(params, plan, extensions)
        sampler.copy(plan, copies)
        sampler.wait()
        game.mark_sent(extensions, copies)
        seconds["time/prefill"] += (decoding := time.perf_counter()) - began
        chunk = None
        if plan.decode_rows:
            chunk = sampler.decode(params, plan, draws, temperature=temperature, top_p=top_p, seed=seed, step=step)
        game.collect_tools(_while_decoding(game.futures(), chunk))
        written = chunk.fetch() if chunk else []
        seconds["time/decode"] += (decoded := time.perf_counter()) - decoding
        game.collect_tools(_wait(game.futures(), tool_wait_s, idle=not draws and not extensions))
        seconds["time/tool_wait"] += time.perf_counter() - decoded
        game.take_turns(draws, written)
    episodes = [episode for episode in game.episodes if episode is not None]
    return episodes, {**seconds, **summary(episodes, tuple(runner.tools), time.perf_counter() - start)}


def _while_decoding(futures: set[concurrent.futures.Future], chunk: Chunk | None) -> bool:
    """Waits until all futures are done or the chunk is; True: all futures are done."""
    while futures and chunk is not None and not chunk.is_ready():
        _, futures = concurrent.futures.wait(futures, timeout=POLL_S)
    return all(future.done() for future in futures)


def _wait(futures: set[concurrent.futures.Future], tool_wait_s: float, *, idle: bool) -> bool:
    """Waits for the tools; where there is nothing else to do at least for the first of them. True: what is done may be
    taken."""
    timeout = None if tool_wait_s == float("inf") else tool_wait_s
    _, left = concurrent.futures.wait(futures, timeout=timeout)
    if idle and futures and left == futures:
        concurrent.futures.wait(left, return_when=concurrent.futures.FIRST_COMPLETED)
    return True


class _Game:
    """The host's state of one rollout: who plays in which slot, and the episodes that have finished."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        chat: Chat,
        pixels: PixelStore,
        runner: ToolRunner,
        group_size: int,
        limits: Limits,
        first_prompt: int,
        system: str,
    ):
        self._sampler, self._prompts, self._chat, self._pixels, self._runner = sampler, prompts, chat, pixels, runner
        self._group_size, self._limits, self._first_prompt, self._system = group_size, limits, first_prompt, system
        self.episodes: list[Episode | None] = [None] * (len(prompts) * group_size)
        self._next = 0
        self._opening: tuple[Opening, Row | None, int] | None = (
            None  # of the prompt that episodes are being started for
        )
        self._players: list[Player | None] = [None] * sampler.slots
        self._held: list[int | None] = [None] * sampler.slots  # the prompt whose tokens each slot's cache begins with

    @property
    def playing(self) -> bool:
        return any(self._players)

    # Slots.

    def fill_slots(self) -> None:
        """Every free slot takes the next episode."""
        for slot, player in enumerate(self._players):
            while player is None and self._next < len(self.episodes):
                player = self._start(self._next)
                self._next += 1
            self._players[slot] = player

    def _start(self, index: int) -> Player | None:
        """The player of an episode, or None where the episode is over at once."""
        prompt, sample = divmod(index, self._group_size)
        if sample == 0:
            self._opening = self._open(self._prompts[prompt])
        opening, row, row_end = self._opening
        conversation = Conversation(
            opening, sample, limits=self._limits, chat=self._chat, image_tokens=self._pixels.tokens
        )
        if conversation.finish is not None:
            self.episodes[index] = conversation.episode()
            return None
        return Player(conversation, index, prompt, row=row, row_end=row_end)

    def _open(self, prompt: Prompt) -> tuple[Opening, Row | None, int]:
        opening = open_prompt(
            prompt,
            chat=self._chat,
            image_tokens=self._pixels.tokens,
            tools=self._runner.schemas,
            system=self._system,
        )
        if len(opening.token_T) >= self._limits.max_length:
            return opening, None, 0
        return opening, *make_row(opening.token_T, opening.images, self._sampler.config, self._pixels)

    def needs(self) -> tuple[list[Extension], list[tuple[int, int]], list[Draw]]:
        """What the slots need in this round: tokens to add, prompts to copy from a slot that has them, turns to
        write."""
        extensions, copies, draws = [], [], []
        starting = {slot for slot, player in enumerate(self._players) if player and player.row and not player.sent}
        source = {
            (self._shard(slot), prompt): slot
            for slot, prompt in enumerate(self._held)
            if prompt is not None and (slot not in starting or self._players[slot].prompt == prompt)
        }
        for slot, player in enumerate(self._players):
            if player is None or player.future is not None:
                continue
            if player.row is not None:
                here = (self._shard(slot), player.prompt)
                if slot in starting and here in source:
                    copies.append((source[here], slot))
                else:
                    extensions.append(Extension(slot, player.sent, player.row, fresh=slot in starting))
                    if slot in starting:
                        source[here] = slot
            conversation = player.conversation
            draws.append(
                Draw(
                    slot=slot,
                    length=player.sent + (len(player.row.token_T) if player.row else 0),
                    position=player.row_end if player.row else player.position,
                    allowance=conversation.allowance,
                    drawn=conversation.turn_tokens,
                    prompt=self._first_prompt + player.prompt,
                    sample=conversation.sample,
                    turn=len(conversation.turns),
                )
            )
        return extensions, copies, draws

    def _shard(self, slot: int) -> int:
        return slot // self._sampler.slots_per_shard

    def mark_sent(self, extensions: Sequence[Extension], copies: Sequence[tuple[int, int]]) -> None:
        for slot in [extension.slot for extension in extensions] + [target for _, target in copies]:
            player = self._players[slot]
            if not player.sent:
                self._held[slot] = player.prompt
            player.sent += len(player.row.token_T)
            player.sent_images = len(player.conversation.images)
            player.position, player.row = player.row_end, None

    # Turns and tools.

    def futures(self) -> set[concurrent.futures.Future]:
        return {player.future for player in self._players if player and player.future}

    def collect_tools(self, may_take: bool) -> None:
        """Appends the results that are there, in slot order."""
        for slot, player in enumerate(self._players):
            if may_take and player and player.future and player.future.done():
                call, result = player.future.result()
                player.future = None
                player.conversation.add_result(call, result)
                self._after_turn(slot, player)

    def take_turns(self, draws: Sequence[Draw], written: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Appends what was drawn; closes the turns that ended and submits their calls."""
        for drawn, (token_n, logp_n) in zip(draws, written, strict=True):
            player = self._players[drawn.slot]
            conversation = player.conversation
            conversation.add_sampled(token_n, logp_n)
            ended = conversation.allowance == 0 or int(token_n[-1]) in self._sampler.stop_ids
            cached = len(token_n) - int(ended)  # the last token of a turn is fed with what follows it
            player.sent += cached
            player.position += cached
            if ended:
                call = conversation.end_turn()
                if call is not None:
                    player.future = self._runner.submit(call, conversation.images)
                else:
                    self._after_turn(drawn.slot, player)

    def _after_turn(self, slot: int, player: Player) -> None:
        """The episode is over, or its new tokens wait for the next round."""
        conversation = player.conversation
        if conversation.finish is not None:
            self.episodes[player.episode] = conversation.episode()
            self._players[slot] = None
            return
        token_T = np.array(conversation.token[player.sent :], np.int32)
        images = conversation.images[player.sent_images :]
        player.row, player.row_end = make_row(token_T, images, self._sampler.config, self._pixels, player.position)


# What happened, in numbers.


def summary(episodes: Sequence[Episode], tools: Sequence[str], seconds: float) -> dict[str, float]:
    """Means over the episodes; the same names whatever happened. A call of an unknown tool counts among the errors
    only."""
    turns = [turn for episode in episodes for turn in episode.turns]
    calls = [turn for turn in turns if turn.result is not None]
    count = max(len(episodes), 1)
    written = sum(int(episode.mask_T.sum()) for episode in episodes)
    metrics = {
        "rollout/turns": len(turns) / count,
        "rollout/length": sum(len(episode.token_T) for episode in episodes) / count,
        "rollout/written": written / count,
        "rollout/images": sum(len(episode.images) for episode in episodes) / count,
        "tools/calls": sum(turn.call is not None and turn.call.name in tools for turn in calls) / count,
        "tools/errors": sum(turn.result.error is not None for turn in calls) / count,
        "time/tools": sum(turn.result.seconds for turn in calls),
        "perf/tokens_per_s": written / seconds,
    }
    for finish in FINISHES:
        metrics[f"rollout/finish_{finish}"] = sum(episode.finish == finish for episode in episodes) / count
    for name in tools:
        metrics[f"tools/calls/{name}"] = sum(turn.call is not None and turn.call.name == name for turn in calls) / count
    for kind in ERRORS:
        metrics[f"tools/errors/{kind}"] = sum(turn.result.error == kind for turn in calls) / count
    other = sum(turn.result.error not in (None, *ERRORS) for turn in calls)
    metrics["tools/errors/other"] = other / count
    return metrics
