"""Host state of one rollout: which episode plays in which slot, what every slot needs next, what has finished."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tapo_jax.models.inputs import Row, make_row
from tapo_jax.rollout.episode import Conversation, Opening, open_prompt
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.schedule import Draw, Extension, Needs
from tapo_jax.tools.sessions import new_episode
from tapo_jax.types import Episode, Prompt


@dataclasses.dataclass
class Player:
    """A conversation in its slot."""

    conversation: Conversation
    episode: int
    """Index into `Board.episodes`."""
    prompt: int
    """Index into this process's prompts."""
    sent: int = 0
    """Number of its tokens that are in the cache."""
    sent_images: int = 0
    """Number of its images that are in the cache."""
    position: int = 0
    """Position of the next token."""
    row: Row | None = None
    """Tokens that wait to be added to the cache."""
    row_end: int = 0
    """Position after the last token of `row`."""
    futures: tuple[concurrent.futures.Future, ...] = ()
    """The tool calls that it waits for: those of its last message."""
    id: str = dataclasses.field(default_factory=new_episode)
    """The episode, as stateful tools know it."""

    @property
    def starts(self) -> bool:
        """Return whether its prompt still waits to be added to the cache."""
        return self.row is not None and not self.sent


@dataclasses.dataclass
class Slot:
    """A slot of this process: its player, and the prompt (`held`) whose tokens its cache begins with."""

    player: Player | None = None
    held: int | None = None


class Board:
    """Host state of one rollout: who plays in which slot, and the episodes that have finished.

    players: the sampler, tools and limits of the run.
    prompts: the prompts of this process.
    group_size: episodes for each prompt.
    first_prompt: index of prompts[0] among the prompts of all processes.
    on_episode: called with every episode when it ends.
    """

    def __init__(
        self,
        players: Players,
        prompts: Sequence[Prompt],
        group_size: int,
        first_prompt: int,
        on_episode: Callable[[Episode], None] | None = None,
    ):
        self._on_episode = on_episode
        self._with, self._prompts, self._group_size, self._first_prompt = players, prompts, group_size, first_prompt
        self.episodes: list[Episode | None] = [None] * (len(prompts) * group_size)
        self._next = 0
        self._opened: tuple[int, Opening, Row | None, int] | None = None  # the newest prompt that was opened
        self._slots = [Slot() for _ in range(players.sampler.slots)]

    def _finish(self, index: int, conversation: Conversation) -> None:
        """Keep an episode that has ended and report it to `on_episode`."""
        episode = self.episodes[index] = conversation.episode()
        if self._on_episode is not None:
            self._on_episode(episode)

    @property
    def playing(self) -> bool:
        return any(slot.player for slot in self._slots)

    # Slots.

    def fill_slots(self) -> None:
        """Give every free slot the next episode."""
        for slot in self._slots:
            while slot.player is None and self._next < len(self.episodes):
                slot.player = self._start(self._next)
                self._next += 1

    def _start(self, index: int) -> Player | None:
        """Return the player of an episode, or None if the episode is over at once."""
        prompt, sample = divmod(index, self._group_size)
        if self._opened is None or self._opened[0] != prompt:
            self._opened = prompt, *self._open(self._prompts[prompt])
        _, opening, row, row_end = self._opened
        conversation = Conversation(
            opening, sample, limits=self._with.limits, chat=self._with.chat, image_tokens=self._with.pixels.tokens
        )
        if conversation.finish is not None:
            self._finish(index, conversation)
            return None
        return Player(conversation, index, prompt, row=row, row_end=row_end)

    def _open(self, prompt: Prompt) -> tuple[Opening, Row | None, int]:
        """Return a prompt as the policy sees it, its row and the position after the row; no row if it is too long."""
        opening = open_prompt(
            prompt,
            chat=self._with.chat,
            image_tokens=self._with.pixels.tokens,
            tools=self._with.runner.schemas,
            system=self._with.system,
        )
        if len(opening.token_T) >= self._with.limits.max_length:
            return opening, None, 0
        return opening, *make_row(opening.token_T, opening.images, self._with.sampler.config, self._with.pixels)

    def needs(self) -> Needs:
        """Return what the slots need in this round."""
        extensions, copies = self._additions()
        draws = [
            self._draw(number, slot.player)
            for number, slot in enumerate(self._slots)
            if slot.player is not None and not slot.player.futures
        ]
        return Needs(extensions, copies, draws)

    def _additions(self) -> tuple[list[Extension], list[tuple[int, int]]]:
        """Return the tokens to add, and the prompts to copy from a slot of the same shard that holds them."""
        extensions, copies = [], []
        starting = {number for number, slot in enumerate(self._slots) if slot.player and slot.player.starts}
        source = {
            (self._shard(number), slot.held): number
            for number, slot in enumerate(self._slots)
            if slot.held is not None and (number not in starting or slot.player.prompt == slot.held)
        }
        for number, slot in enumerate(self._slots):
            player = slot.player
            if player is None or player.futures or player.row is None:
                continue
            here = (self._shard(number), player.prompt)
            if number in starting and here in source:
                copies.append((source[here], number))
                continue
            extensions.append(Extension(number, player.sent, player.row, fresh=number in starting))
            if number in starting:
                source[here] = number
        return extensions, copies

    def _draw(self, number: int, player: Player) -> Draw:
        conversation = player.conversation
        return Draw(
            slot=number,
            length=player.sent + (len(player.row.token_T) if player.row else 0),
            position=player.row_end if player.row else player.position,
            allowance=conversation.allowance,
            drawn=conversation.turn_tokens,
            prompt=self._first_prompt + player.prompt,
            sample=conversation.sample,
            turn=len(conversation.turns),
        )

    def _shard(self, slot: int) -> int:
        return slot // self._with.sampler.slots_per_shard

    def mark_sent(self, needs: Needs) -> None:
        """Note that the tokens of extensions and copies are in the cache."""
        for number in [extension.slot for extension in needs.extensions] + [target for _, target in needs.copies]:
            slot = self._slots[number]
            player = slot.player
            if not player.sent:
                slot.held = player.prompt
            player.sent += len(player.row.token_T)
            player.sent_images = len(player.conversation.images)
            player.position, player.row = player.row_end, None

    # Turns and tools.

    def futures(self) -> set[concurrent.futures.Future]:
        """Return the calls to wait for; of a message with several, those that still run."""
        waiting: set[concurrent.futures.Future] = set()
        for slot in self._slots:
            if slot.player and slot.player.futures:
                running = {future for future in slot.player.futures if not future.done()}
                waiting |= running or set(slot.player.futures)
        return waiting

    def collect_tools(self, may_take: bool) -> None:
        """Append the results that have arrived, in slot order; none unless `may_take`."""
        for slot in self._slots:
            player = slot.player
            if may_take and player and player.futures and all(future.done() for future in player.futures):
                results = [future.result() for future in player.futures]
                player.futures = ()
                player.conversation.add_results(results)
                self._after_turn(slot)

    def take_turns(self, draws: Sequence[Draw], written: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Append what was drawn; close the turns that ended and submit their calls."""
        for drawn, (token_n, logp_n) in zip(draws, written, strict=True):
            slot = self._slots[drawn.slot]
            player = slot.player
            conversation = player.conversation
            conversation.add_sampled(token_n, logp_n)
            ended = conversation.allowance == 0 or int(token_n[-1]) in self._with.sampler.stop_ids
            # A turn that used its whole allowance pauses: its last token is fed with the tokens that follow it.
            paused = ended or len(token_n) == drawn.allowance
            cached = len(token_n) - int(paused)
            player.sent += cached
            player.position += cached
            if ended:
                if calls := conversation.end_turns():
                    prompt = conversation.opening.prompt
                    player.futures = tuple(self._with.runner.submit_turn(calls, conversation.images, prompt, player.id))
                else:
                    self._after_turn(slot)
            elif paused:
                self._after_turn(slot)  # the turn continues after a thought that was closed by force

    def close(self) -> None:
        """End the episodes that still play, after an error: their tools are closed."""
        for slot in self._slots:
            if slot.player is not None:
                self._with.runner.end(slot.player.id)

    def _after_turn(self, slot: Slot) -> None:
        """Keep an episode that is over; otherwise queue its new tokens for the next round."""
        player = slot.player
        conversation = player.conversation
        if conversation.finish is not None:
            self._finish(player.episode, conversation)
            self._with.runner.end(player.id)
            slot.player = None
            return
        token_T = np.array(conversation.token[player.sent :], np.int32)
        images = conversation.images[player.sent_images :]
        sampler, pixels = self._with.sampler, self._with.pixels
        player.row, player.row_end = make_row(token_T, images, sampler.config, pixels, player.position)
