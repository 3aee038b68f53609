"""The pages of a cache: whatever is written, shared and released, everybody reads back what it wrote."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_jax.rollout.pages import Pages

OPERATIONS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4), st.integers(0, 9)), max_size=60
)


class Memory:
    """The places of all pages, and what every owner should read in its own."""

    def __init__(self, count: int, size: int):
        self.pages, self.size = Pages(count, size), size
        self.held = [[None] * size for _ in range(count + 1)]
        self.expected: dict[int, list[int]] = {}
        self.number = 0

    def add(self, owner: int, count: int) -> None:
        """Write new numbers behind what the owner has, if there is room."""
        before = self.expected.get(owner, [])
        stop = len(before) + count
        asked, free = self.pages.missing(owner, len(before), stop), self.pages.free
        if asked > free:
            kept = {name: tuple(pages) for name, pages in self.pages.owned.items()}
            with pytest.raises(ValueError, match="pages are asked for"):
                self.pages.write(owner, len(before), stop)
            assert kept == {name: tuple(pages) for name, pages in self.pages.owned.items()}
            return
        copied = self.pages.write(owner, len(before), stop)
        assert free - self.pages.free == asked
        if copied is not None:
            source, target = copied
            self.held[target] = list(self.held[source])
        users = [page for pages in self.pages.owned.values() for page in pages]
        for place in range(len(before), stop):
            page = self.pages.of(owner)[place // self.size]
            assert users.count(page) == 1  # a page that is shared is never written
            self.number += 1
            self.held[page][place % self.size] = self.number
            before = [*before, self.number]
        if count:
            self.expected[owner] = before

    def check(self) -> None:
        owned = self.pages.owned
        assert set(owned) == set(self.expected)
        for owner, numbers in self.expected.items():
            pages = owned[owner]
            assert len(set(pages)) == len(pages) >= self.pages.reach(len(numbers)) and 0 not in pages
            read = [self.held[pages[place // self.size]][place % self.size] for place in range(len(numbers))]
            assert read == numbers  # so no page was given to two that write
        used = {page for pages in owned.values() for page in pages}
        assert self.pages.free + len(used) == self.pages.count  # no page is lost


@settings(max_examples=300, deadline=None)
@given(operations=OPERATIONS, count=st.integers(1, 12), size=st.integers(1, 4))
def test_everybody_reads_what_it_wrote_and_no_page_is_lost(operations, count, size):
    memory = Memory(count, size)
    for kind, owner, other, number in operations:
        if kind <= 1:
            memory.add(owner, number)
        elif kind == 2 and owner in memory.expected and other not in memory.expected:
            length = min(number, len(memory.expected[owner]))
            memory.pages.share(owner, other, length)
            if length:
                memory.expected[other] = memory.expected[owner][:length]
        elif kind == 3:
            memory.pages.release(owner)
            memory.expected.pop(owner, None)
        memory.check()
        again = Pages(count, size)
        again.set_owned(memory.pages.owned)
        assert vars(again)["_users"] == vars(memory.pages)["_users"]
        assert sorted(vars(again)["_free"]) == sorted(vars(memory.pages)["_free"])
    for owner in list(memory.expected):
        memory.pages.release(owner)
    assert memory.pages.free == count and not memory.pages.owned


def test_only_a_partly_filled_page_that_others_use_is_copied():
    pages = Pages(6, 4)
    assert pages.write("prompt", 0, 6) is None and pages.of("prompt") == (1, 2)
    pages.share("prompt", "a", 6)
    pages.share("prompt", "b", 6)
    assert pages.missing("a", 6, 9) == 2 and pages.write("a", 6, 9) == (2, 3) and pages.of("a") == (1, 3, 4)
    pages.release("prompt")
    assert pages.write("b", 6, 7) is None and pages.of("b") == (1, 2)  # nobody else has page 2 any more
    assert pages.free == 2


def test_a_prompt_that_fills_its_pages_is_shared_without_a_copy():
    pages = Pages(4, 4)
    pages.write("prompt", 0, 8)
    pages.share("prompt", "a", 8)
    assert pages.missing("a", 8, 10) == 1 and pages.write("a", 8, 10) is None and pages.of("a") == (1, 2, 3)


def test_what_cannot_be_is_refused():
    pages = Pages(4, 4)
    pages.write("a", 0, 3)
    with pytest.raises(ValueError, match="cannot share"):
        pages.share("a", "b", 5)
    with pytest.raises(ValueError, match="cannot share"):
        pages.share("a", "a", 3)
    with pytest.raises(ValueError, match="too few for the 5 tokens before"):
        pages.write("a", 5, 6)
