"""The host's state of one rollout: which episode plays in which slot, what every slot needs next, what has finished."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence

import numpy as np

from tapo_jax.models.inputs import PixelStore, Row, make_row
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Conversation, Limits, Opening, open_prompt
from tapo_jax.rollout.sampler import Sampler
from tapo_jax.rollout.schedule import Draw, Extension
from tapo_jax.tools.base import ToolRunner
from tapo_jax.types import Episode, Prompt


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


class Board:
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
            paused = (
                ended or len(token_n) == drawn.allowance
            )  # the sampler has not fed the last token: with what follows
            cached = len(token_n) - int(paused)
            player.sent += cached
            player.position += cached
            if ended:
                call = conversation.end_turn()
                if call is not None:
                    player.future = self._runner.submit(call, conversation.images)
                else:
                    self._after_turn(drawn.slot, player)
            elif paused:
                self._after_turn(drawn.slot, player)  # the turn goes on behind a thought that was looked at

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
