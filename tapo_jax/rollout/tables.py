"""Which pages the slots of this process have: what a round writes, what a prompt's samples share. Plain Python, no jax.

The prompt of a group whose next samples still wait is kept: its pages have the prompt as an owner besides the slots
that use them, so that they outlive the episode that computed them, and no episode writes into them.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from tapo_jax.rollout.pages import Pages
from tapo_jax.rollout.schedule import Shapes


@dataclasses.dataclass(frozen=True)
class Writing:
    """The tokens that a slot's cache gets in a round."""

    slot: int
    prompt: int
    """Number of the question."""
    start: int
    """Tokens that are in the cache."""
    known: int
    """Tokens that are in it when everything known has been added."""
    stop: int
    """… and when everything has been drawn that may be."""
    shares: bool = False
    """Whether what is known is the prompt, which is kept."""
    keeps: bool = False
    """Whether what is known is the prompt, which will be kept."""


@dataclasses.dataclass(frozen=True)
class Given:
    """The pages of a slot in a round."""

    extended: tuple[int, ...]
    """When the known tokens are added."""
    copied: tuple[int, int]
    """The page to be copied then, and its copy; 0 and 0: none."""
    drawn: tuple[int, ...]
    """When tokens are drawn."""


class Tables:
    """The pages of all slots and prompts.

    shapes: sizes and number of pages and slots of a shard.
    slots: slots of this process.
    """

    def __init__(self, shapes: Shapes, slots: int):
        self._per_shard, self._capacity = shapes.slots, shapes.capacity
        self._shards = [Pages(shapes.pages, shapes.page) for _ in range(slots // shapes.slots)]

    def shard(self, slot: int) -> int:
        return slot // self._per_shard

    def missing(self, writing: Writing) -> int:
        """Return how many free pages a writing takes at most."""
        pages = self._pages(writing.slot)
        own = pages.reach(writing.stop) - writing.known // pages.size  # of a slot that shares all before `known`
        if writing.shares:
            return own
        return pages.reach(writing.known) + own if writing.keeps else self._missing(writing)

    def fits(self, shard: int, writings: Iterable[Writing]) -> bool:
        """Return whether a shard has the pages for all writings in it."""
        return sum(self.missing(writing) for writing in writings) <= self._shards[shard].free

    def admits(self, shard: int, writings: Sequence[Writing], new: Writing) -> bool:
        """Return whether a shard has the pages for what a new conversation writes, and one more for each other.

        So the conversation that comes is not at once the one that has to go.

        writings: those of all others in the shard; who writes nothing is among them.
        """
        pages = self._shards[shard]
        most = pages.reach(self._capacity)
        reached = [max(len(pages.of(other.slot)), pages.reach(other.stop)) for other in writings]
        taken = sum(self.missing(other) for other in (*writings, new)) + sum(count < most for count in reached)
        return taken <= pages.free

    def give(self, writing: Writing) -> Given:
        """Give a slot the pages for what it writes. Raises ValueError if there are too few."""
        pages, slot = self._pages(writing.slot), writing.slot
        if writing.shares:
            pages.share(_kept(writing.prompt), slot, writing.known)
        else:
            pages.write(slot, writing.start, writing.known)
        extended = pages.of(slot)
        if writing.keeps:
            pages.share(slot, _kept(writing.prompt), writing.known)
        copied = pages.write(slot, writing.known, writing.stop)
        return Given(extended, copied or (0, 0), pages.of(slot))

    def of(self, slot: int) -> tuple[int, ...]:
        return self._pages(slot).of(slot)

    def kept(self, shard: int, prompt: int) -> tuple[int, ...]:
        """Return the pages of a kept prompt; none if it is not kept."""
        return self._shards[shard].of(_kept(prompt))

    def prompts(self, shard: int) -> list[int]:
        """Return the prompts that are kept."""
        return [owner[1] for owner in self._shards[shard].owned if isinstance(owner, tuple)]

    def release(self, slot: int) -> None:
        """Take back the pages of a slot."""
        self._pages(slot).release(slot)

    def forget(self, shard: int, prompt: int) -> None:
        """Keep a prompt no longer."""
        self._shards[shard].release(_kept(prompt))

    def restore(self, slots: dict[int, Sequence[int]], kept: dict[tuple[int, int], Sequence[int]]) -> None:
        """Go on with the pages that slots and kept prompts, by (shard, prompt), had."""
        for shard, pages in enumerate(self._shards):
            here: dict = {slot: owned for slot, owned in slots.items() if self.shard(slot) == shard}
            pages.set_owned(here | {_kept(prompt): owned for (at, prompt), owned in kept.items() if at == shard})

    def _pages(self, slot: int) -> Pages:
        return self._shards[self.shard(slot)]

    def _missing(self, writing: Writing) -> int:
        return self._pages(writing.slot).missing(writing.slot, writing.start, writing.stop)


def _kept(prompt: int) -> tuple[str, int]:
    return "prompt", prompt
