"""A board whose slots have pages: who gets some, who waits until there are enough, and who gives its back.

A conversation starts when there are pages for what it begins with and one more for everybody else. When the pages run
out all the same, kept prompts that nobody needs now are forgotten, and then the youngest conversation leaves its slot:
it goes on when there is room again, with its keys and values computed anew, as one that is carried between two steps.
The oldest of a shard never leaves, and the pages hold it whatever it becomes, so a rollout always comes to its end. Age
is the order (group, sample), which depends on no time; in the queue nobody overtakes.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tapo_jax.rollout.board import Board, Player
from tapo_jax.rollout.episode import Conversation
from tapo_jax.rollout.groups import Group
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.schedule import Draw, Extension, Needs
from tapo_jax.rollout.tables import Tables, Writing
from tapo_jax.types import Episode


class PagedBoard(Board):
    """A `Board` for a sampler with pages. A slot holds a prompt as long as its pages are kept (`Tables`)."""

    def __init__(
        self,
        players: Players,
        groups: Sequence[Group],
        step: int = 0,
        on_episode: Callable[[int, Episode], None] | None = None,
        starts: Sequence[tuple[int, int]] | None = None,
        places: Sequence[dict[str, Any]] | None = None,
    ):
        self._tables = Tables(players.sampler.shapes, players.sampler.slots)
        self._evicted = (0, 0)
        super().__init__(players, groups, step, on_episode, starts, places)
        fresh = (group for group, sample in self._queue if groups[group].seats[sample] is None)
        self._waiting = collections.Counter(fresh)  # samples of each group that have not begun

    def get_places(self) -> list[dict[str, Any]]:
        """Return what `Board.get_places` does, and the pages. Call it before `give_pages`, or after the round."""
        places = super().get_places()
        for number, (slot, place) in enumerate(zip(self._slots, places, strict=True)):
            kept = () if slot.held is None else self._tables.kept(self._shard(number), slot.held)
            place |= {"pages": self._tables.of(number), "kept": kept}
        return places

    def _set_places(self, places: Sequence[dict[str, Any]]) -> None:
        super()._set_places(places)
        held = [
            (number, slot.held, place) for number, (slot, place) in enumerate(zip(self._slots, places, strict=False))
        ]
        self._tables.restore(
            {number: place["pages"] for number, _, place in held},
            {(self._shard(number), prompt): place["kept"] for number, prompt, place in held if prompt is not None},
        )

    def take_evicted(self) -> tuple[int, int]:
        taken, self._evicted = self._evicted, (0, 0)
        return taken

    # Who plays.

    def fill_slots(self) -> None:
        """Take back the pages of episodes that have ended, make room for the others, and fill free slots.

        Doing it again changes nothing, so that a stopped rollout goes on with the same slots."""
        for number, slot in enumerate(self._slots):
            if slot.player is None:
                self._tables.release(number)
        for shard in range(len(self._slots) // self._with.sampler.slots_per_shard):
            self._forget_prompts(shard)
            self._make_room(shard)
        waiting = -1
        while waiting != len(self._queue):  # a slot that had no room for one conversation may have some for the next
            waiting = len(self._queue)
            super().fill_slots()

    def _has_room(self, number: int) -> bool:
        """Return whether the images and the pages leave room for the next of the queue. Alone, it has room."""
        shard = self._shard(number)
        if not super()._has_room(number):
            return False
        new = self._newcomer(number)
        if new is None:
            return True
        seated = self._seated(shard)
        others = [writing for writing in self._writings(*self._wanted()) if self._shard(writing.slot) == shard]
        others += [self._when_back(at) for at in seated if at not in {writing.slot for writing in others}]
        if not self._tables.admits(shard, others, new):
            self._forget_prompts(shard, but=new.prompt if new.shares else -1, all_others=True)
        return not seated or self._tables.admits(shard, others, new)

    def _start(self, prompt: int, sample: int) -> Player | None:
        self._waiting[prompt] -= 1
        return super()._start(prompt, sample)

    def _seated(self, shard: int) -> list[int]:
        """Return the slots of a shard that have players, the youngest last."""
        here = (n for n, slot in enumerate(self._slots) if slot.player and self._shard(n) == shard)
        return sorted(here, key=lambda n: (self._slots[n].player.prompt, self._slots[n].player.conversation.sample))

    def _newcomer(self, number: int) -> Writing | None:
        """Return what the next of the queue would write in a slot; None if it is over at once."""
        prompt, sample = self._queue[0]
        seat, limits = self.groups[prompt].seats[sample], self._with.limits
        if isinstance(seat, Conversation):
            known, starts = len(seat.token), not seat.turns and not seat.turn_tokens
        else:
            known, starts = len(self._opening(prompt)[0].token_T), True
        if known >= limits.max_length:
            return None
        stop = min(known + self._with.sampler.shapes.chunk, limits.max_length)
        shares = starts and self._is_kept(self._shard(number), prompt, computed=not isinstance(seat, Conversation))
        return Writing(number, prompt, 0, known, stop, shares=shares, keeps=starts and not shares)

    def _is_kept(self, shard: int, prompt: int, *, computed: bool) -> bool:
        """Return whether a prompt is kept in a shard. computed: or will be, since a sample of it has been seated."""
        players = [self._slots[number].player for number in self._seated(shard)] if computed else []
        starting = any(player.starts and player.prompt == prompt for player in players)
        return starting or bool(self._tables.kept(shard, prompt))

    def _make_room(self, shard: int) -> None:
        """Let the youngest leave until the others have pages for what they write in this round."""
        while not self._fits(shard):
            if self._forget_prompts(shard, all_others=True):
                continue
            youngest = self._seated(shard)[-1]
            slot = self._slots[youngest]
            player, slot.player = slot.player, None
            self._tables.release(youngest)
            seat = (player.prompt, player.conversation.sample)
            at = 0
            while at < len(self._queue) and self._queue[at] < seat and self._has_begun(self._queue[at]):
                at += 1
            self._queue.insert(at, seat)
            if player.sent:
                self._evicted = (self._evicted[0] + 1, self._evicted[1] + player.sent)

    def _has_begun(self, seat: tuple[int, int]) -> bool:
        return isinstance(self.groups[seat[0]].seats[seat[1]], Conversation)

    def _fits(self, shard: int) -> bool:
        writings = self._writings(*self._wanted())
        return self._tables.fits(shard, [writing for writing in writings if self._shard(writing.slot) == shard])

    def _forget_prompts(self, shard: int, *, but: int = -1, all_others: bool = False) -> bool:
        """Forget the kept prompts of a shard that no sample will need, or whose slot is another's.

        all_others: also those that no sample needs in this round; prompt number `but` is needed.

        Returns whether there were some."""
        starting = {slot.player.prompt for slot in self._shard_slots(shard) if slot.player and slot.player.starts}
        held = {slot.held for slot in self._shard_slots(shard)}
        forgotten = False
        for prompt in self._tables.prompts(shard):
            needed = prompt == but or prompt in starting or (self._waiting[prompt] > 0 and not all_others)
            if prompt in held and needed:
                continue
            self._tables.forget(shard, prompt)
            forgotten = True
        self._note_forgotten()
        return forgotten

    def _shard_slots(self, shard: int) -> list:
        size = self._with.sampler.slots_per_shard
        return self._slots[shard * size : (shard + 1) * size]

    def _note_forgotten(self) -> None:
        for number, slot in enumerate(self._slots):
            if slot.held is not None and not self._tables.kept(self._shard(number), slot.held):
                slot.held = None

    # What they write.

    def _wanted(self) -> tuple[list[Extension], list[tuple[int, ...]], list[Draw]]:
        needs = super().needs()
        return needs.extensions, needs.copies, needs.draws

    def needs(self) -> Needs:
        """Return what the slots need in this round, the pages not given yet.

        Who computes a prompt that is kept goes on in a copy of its last page, if that is partly filled."""
        extensions, copies, draws = self._wanted()
        size = self._with.sampler.shapes.page
        kept = [writing for writing in self._writings(extensions, copies, draws) if writing.keeps]
        copies = [*copies, *((writing.slot, writing.slot) for writing in kept if writing.known % size)]
        return Needs(extensions, copies, draws)

    def give_pages(self, needs: Needs) -> Needs:
        writings = self._writings(needs.extensions, needs.copies, needs.draws)
        given = {writing.slot: self._tables.give(writing) for writing in writings}
        return Needs(
            [dataclasses.replace(one, pages=given[one.slot].extended) for one in needs.extensions],
            [(source, target, *given[target].copied) for source, target, *_ in needs.copies],
            [dataclasses.replace(one, pages=given[one.slot].drawn) for one in needs.draws],
        )

    def _writings(
        self, extensions: Sequence[Extension], copies: Sequence[tuple[int, ...]], draws: Sequence[Draw]
    ) -> list[Writing]:
        """Return what the players that need something write in this round."""
        extended, sources = {one.slot: one for one in extensions}, {source for source, *_ in copies}
        copied = {target for _, target, *_ in copies}
        writings = []
        for draw in draws:
            number, player = draw.slot, self._slots[draw.slot].player
            shares = number in copied and number not in extended
            keeps = number in extended and player.starts and (self._waiting[player.prompt] > 0 or number in sources)
            stop = draw.length + min(self._with.sampler.shapes.chunk, draw.allowance)
            writings.append(Writing(number, player.prompt, player.sent, draw.length, stop, shares=shares, keeps=keeps))
        return writings

    def _when_back(self, number: int) -> Writing:
        """Return what a player that waits for a tool writes when it goes on, if its pages are taken."""
        player = self._slots[number].player
        known = player.sent or len(player.conversation.token)
        return Writing(number, player.prompt, player.sent, known, known)

    def mark_sent(self, needs: Needs) -> None:
        super().mark_sent(needs)
        self._note_forgotten()
