"""Give the pages of one shard's cache to conversations and prompts, share them, and take them back. Plain Python.

A page has places for `size` consecutive tokens. An owner (a slot's conversation, or a prompt that is kept for the
samples that still have to begin) has a list of pages: the i-th holds its tokens i·size … (i + 1)·size - 1. Pages that
several owners have are never written: who writes into one gets a page of its own in its place, which is a copy if the
old one holds tokens that stay (copy on write).

The page to be given next is the free one of the smallest number, so that what is free follows from what is owned.
"""

import heapq
from collections.abc import Hashable, Mapping, Sequence


class Pages:
    """The pages 1 … count. Page 0 is nobody's: it takes what padding writes.

    count: number of pages.
    size: places of a page.
    """

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(1, count + 1))  # a heap
        self._users = [0] * (count + 1)
        self._owned: dict[Hashable, list[int]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def owned(self) -> Mapping[Hashable, Sequence[int]]:
        """Return the pages of every owner that has some."""
        return self._owned

    def of(self, owner: Hashable) -> tuple[int, ...]:
        return tuple(self._owned.get(owner, ()))

    def reach(self, length: int) -> int:
        """Return the number of pages that hold so many tokens."""
        return -(-length // self.size)

    def missing(self, owner: Hashable, start: int, stop: int) -> int:
        """Return how many free pages `write` would take."""
        owned = self._owned.get(owner, ())
        shared = sum(self._users[page] > 1 for page in owned[start // self.size : self.reach(stop)]) if owned else 0
        return shared + max(0, self.reach(stop) - len(owned)) if stop > start else 0

    def write(self, owner: Hashable, start: int, stop: int) -> tuple[int, int] | None:
        """Give the owner pages for its tokens up to `stop`, of which those from `start` on are its own alone.

        Returns (source, target) if the page of token `start` has become a copy: the tokens before `start` have to be
        copied from one to the other. Raises ValueError, and changes nothing, if too few pages are free, or if the
        owner has no pages for the tokens before `start`.
        """
        if stop <= start:
            return None
        if self.missing(owner, start, stop) > self.free:
            raise ValueError(f"{self.missing(owner, start, stop)} pages are asked for and {self.free} are free")
        owned = self._owned.get(owner, [])
        if len(owned) < self.reach(start):
            raise ValueError(f"{owner} has {len(owned)} pages, too few for the {start} tokens before")
        self._owned[owner] = owned
        copied = None
        first = start // self.size
        for index in range(first, self.reach(stop)):
            if index == len(owned):
                owned.append(self._take())
            elif self._users[owned[index]] > 1:
                old, owned[index] = owned[index], self._take()
                self._drop(old)
                copied = (old, owned[index]) if index == first and start % self.size else copied
        return copied

    def share(self, source: Hashable, target: Hashable, length: int) -> None:
        """Let a target that has no pages use the source's pages of its first `length` tokens.

        Raises ValueError if the target has pages or the source has too few."""
        pages = self._owned.get(source, [])[: self.reach(length)]
        if target in self._owned or len(pages) < self.reach(length):
            raise ValueError(f"{target} cannot share {length} tokens of {source}")
        self._own(target, pages)

    def release(self, owner: Hashable) -> None:
        """Take back what an owner has; pages without another owner are free again."""
        for page in self._owned.pop(owner, ()):
            self._drop(page)

    def set_owned(self, owned: Mapping[Hashable, Sequence[int]]) -> None:
        """Go on with the pages that owners had (`owned`)."""
        self._users, self._owned = [0] * (self.count + 1), {}
        for owner, pages in owned.items():
            self._own(owner, pages)
        self._free = [page for page in range(1, self.count + 1) if not self._users[page]]  # ascending, so a heap

    def _own(self, owner: Hashable, pages: Sequence[int]) -> None:
        if pages:
            self._owned[owner] = list(pages)
        for page in pages:
            self._users[page] += 1

    def _take(self) -> int:
        page = heapq.heappop(self._free)
        self._users[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            heapq.heappush(self._free, page)
