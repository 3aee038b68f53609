"""Host state of one rollout: which episode plays in which slot, what every slot needs next, what has finished."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapo_jax.models.inputs import Row, make_row
from tapo_jax.rollout.episode import Conversation, Opening
from tapo_jax.rollout.groups import Group
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.schedule import Draw, Extension, Needs
from tapo_jax.types import Episode, Prompt


@dataclasses.dataclass
class Player:
    """A conversation in its slot."""

    conversation: Conversation
    prompt: int
    """Index into `Board.groups`."""
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

    @property
    def starts(self) -> bool:
        """Return whether its prompt, and nothing more, still waits to be added to the cache."""
        return (
            self.row is not None and not self.sent and not self.conversation.turns and not self.conversation.turn_tokens
        )


@dataclasses.dataclass
class Slot:
    """A slot of this process: its player, and the prompt (`held`) whose tokens its cache begins with."""

    player: Player | None = None
    held: int | None = None


class Board:
    """Host state of one rollout: who plays in which slot. What is played is in the groups.

    players: the sampler, tools and limits of the run.
    groups: what this process plays. Conversations that are under way go on, and come before what has not begun.
    step: the step of training whose weights play.
    on_episode: called with the index of the group, and the episode, when it ends.
    starts: (group, sample) of what has not begun, in the order in which it begins; None: all of it, in order. Samples
        of one group that follow each other share the computation of its prompt.
    places: what `get_places` returned, if the caches are as they were then; else every conversation is read anew.

    The groups hold whatever is played: at the end of any round they are all that is needed to play on.
    """

    def __init__(
        self,
        players: Players,
        groups: Sequence[Group],
        step: int = 0,
        on_episode: Callable[[int, Episode], None] | None = None,
        starts: Sequence[tuple[int, int]] | None = None,
        places: Sequence[dict[str, Any]] | None = None,
    ):
        self._on_episode = on_episode
        self._with, self.groups, self._step = players, groups, step
        self._recomputed = 0
        self._opened: tuple[int, Opening, Row | None, int] | None = None  # the newest prompt that was opened
        self._slots = [Slot() for _ in range(players.sampler.slots)]
        self._set_places(places or ())
        placed = {(s.player.prompt, s.player.conversation.sample) for s in self._slots if s.player}
        seats = [(g, sample) for g, group in enumerate(groups) for sample in range(len(group.seats))]
        begun = [(g, sample) for g, sample in seats if isinstance(groups[g].seats[sample], Conversation)]
        waiting = [(g, sample) for g, sample in seats if groups[g].seats[sample] is None]
        fresh = waiting if starts is None else starts
        self._queue = collections.deque([*(seat for seat in begun if seat not in placed), *fresh])
        self.finished = sum(len(group.episodes) for group in groups)
        """Episodes that have ended."""
        self.episodes = self.finished + len(placed) + len(self._queue)
        """Episodes that have ended, play or wait."""

    def get_places(self) -> list[dict[str, Any]]:
        """Return who is in which slot and what its cache holds, as JSON-able values, between two rounds."""
        places = []
        for slot in self._slots:
            place: dict[str, Any] = {"held": None if slot.held is None else self.groups[slot.held].number}
            if player := slot.player:
                place |= {"group": self.groups[player.prompt].number, "sample": player.conversation.sample}
                place |= {"sent": player.sent, "sent_images": player.sent_images, "position": player.position}
            places.append(place)
        return places

    def _set_places(self, places: Sequence[dict[str, Any]]) -> None:
        """Seat the players as `get_places` found them."""
        index = {group.number: g for g, group in enumerate(self.groups)}
        for slot, place in zip(self._slots, places, strict=bool(places)):
            slot.held = index.get(place["held"])  # a group that has been trained on since is in no slot's future
            if "group" in place:
                prompt = index[place["group"]]
                player = slot.player = Player(self.groups[prompt].seats[place["sample"]], prompt)
                player.sent, player.sent_images = place["sent"], place["sent_images"]
                player.position = place["position"]
                self._wait_or_queue(player)

    def _finish(self, prompt: int, conversation: Conversation) -> None:
        """Keep an episode that has ended and report it to `on_episode`."""
        episode = self.groups[prompt].seats[conversation.sample] = conversation.episode()
        self.finished += 1
        if self._on_episode is not None:
            self._on_episode(prompt, episode)

    def take_recomputed(self) -> int:
        """Return the tokens of conversations of earlier steps that have got a slot since the last call."""
        taken, self._recomputed = self._recomputed, 0
        return taken

    def take_evicted(self) -> tuple[int, int]:
        """Return how many conversations had to leave their slot since the last call, and their tokens in its cache."""
        return 0, 0

    @property
    def playing(self) -> bool:
        return any(slot.player for slot in self._slots)

    # Slots.

    def fill_slots(self) -> None:
        """Give every free slot the next episode, as long as the images in play leave room for more."""
        for number, slot in enumerate(self._slots):
            while slot.player is None and self._queue and self._has_room(number):
                prompt, sample = self._queue.popleft()
                seat = self.groups[prompt].seats[sample]
                if isinstance(seat, Conversation):
                    slot.player, slot.held = self._go_on(prompt, seat), None
                else:
                    slot.player = self._start(prompt, sample)

    def _has_room(self, number: int) -> bool:
        """Return whether the next episode of the queue may start in a slot."""
        most = self._with.most_image_bytes
        if most == float("inf"):
            return True
        playing = [slot.player.conversation for slot in self._slots if slot.player]
        held = {id(image): image.pixels.nbytes for conversation in playing for image in conversation.images}
        return not held or sum(held.values()) < most

    def _go_on(self, prompt: int, conversation: Conversation) -> Player:
        """Return the player of a conversation that is under way and in no cache."""
        player = Player(conversation, prompt)
        self._recomputed += len(conversation.token) if conversation.policy != self._step else 0
        conversation.policy = self._step
        self._wait_or_queue(player)
        return player

    def _wait_or_queue(self, player: Player) -> None:
        """Let a player wait for the calls of its last message, or queue its tokens that are not in the cache."""
        conversation, group = player.conversation, self.groups[player.prompt]
        if conversation.waits:
            player.futures = group.calls.get(conversation.sample) or self._submit(group, conversation)
        elif player.sent < len(conversation.token):
            self._queue_tokens(player)

    def _submit(self, group: Group, conversation: Conversation) -> tuple[concurrent.futures.Future, ...]:
        """Submit the calls of the message that has just ended."""
        prompt, images = conversation.opening.prompt, conversation.images
        futures = tuple(self._with.runner.submit_turn(conversation.pending, images, prompt, conversation.id))
        group.calls[conversation.sample] = futures
        return futures

    def _start(self, prompt: int, sample: int) -> Player | None:
        """Return the player of an episode, or None if the episode is over at once."""
        group = self.groups[prompt]
        opening, row, row_end = self._opening(prompt)
        conversation = self._with.converse(opening, sample, self._step)
        group.seats[sample] = conversation
        group.begun = self._step if group.begun is None else group.begun
        if conversation.finish is not None:
            self._finish(prompt, conversation)
            return None
        return Player(conversation, prompt, row=row, row_end=row_end)

    def _opening(self, prompt: int) -> tuple[Opening, Row | None, int]:
        """Return what `_open` returns, which is kept for the next samples of the same question."""
        if self._opened is None or self._opened[0] != prompt:
            self._opened = prompt, *self._open(self.groups[prompt].prompt)
        return self._opened[1:]

    def _open(self, prompt: Prompt) -> tuple[Opening, Row | None, int]:
        """Return a prompt as the policy sees it, its row and the position after the row; no row if it is too long."""
        opening = self._with.open(prompt)
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

    def give_pages(self, needs: Needs) -> Needs:
        """Return the needs of a round that will be played, with the pages of its slots if there are pages."""
        return needs

    def _additions(self) -> tuple[list[Extension], list[tuple[int, ...]]]:
        """Return the tokens to add, and the prompts to copy from a slot of the same shard that holds them."""
        extensions: list[Extension] = []
        copies: list[tuple[int, ...]] = []
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
            prompt=self.groups[player.prompt].key,
            sample=conversation.sample,
            turn=len(conversation.turns),
        )

    def _shard(self, slot: int) -> int:
        return slot // self._with.sampler.slots_per_shard

    def mark_sent(self, needs: Needs) -> None:
        """Note that the tokens of extensions and copies are in the cache."""
        targets = [target for _, target, *_ in needs.copies]
        for number in dict.fromkeys([extension.slot for extension in needs.extensions] + targets):
            slot = self._slots[number]
            player = slot.player
            if not player.sent:  # the cache of a conversation that goes on begins with no prompt that can be copied
                slot.held = player.prompt if player.starts else None
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
                self.groups[player.prompt].calls.pop(player.conversation.sample, None)
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
                if conversation.end_turns():
                    player.futures = self._submit(self.groups[player.prompt], conversation)
                else:
                    self._after_turn(slot)
            elif paused:
                self._after_turn(slot)  # the turn continues after a thought that was closed by force

    def close(self) -> None:
        """End the episodes that still play, after an error: their tools are closed."""
        for slot in self._slots:
            if slot.player is not None:
                self._with.runner.end(slot.player.conversation.id)

    def _after_turn(self, slot: Slot) -> None:
        """Keep an episode that is over; otherwise queue its new tokens for the next round."""
        player = slot.player
        conversation = player.conversation
        if conversation.finish is not None:
            self._with.runner.end(conversation.id)
            self._finish(player.prompt, conversation)
            slot.player = None
        else:
            self._queue_tokens(player)

    def _queue_tokens(self, player: Player) -> None:
        """Queue the tokens of a conversation that are not in the cache."""
        conversation = player.conversation
        token_T = np.array(conversation.token[player.sent :], np.int32)
        images = conversation.images[player.sent_images :]
        sampler, pixels = self._with.sampler, self._with.pixels
        player.row, player.row_end = make_row(token_T, images, sampler.config, pixels, player.position)
