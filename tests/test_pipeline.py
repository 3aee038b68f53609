"""The order of prompts: fixed by the seed, restorable, and the same however many processes read it."""

import pytest

from tapo_jax.config import UserError
from tapo_jax.data.pipeline import Prompts

SOURCE = [f"q{i}" for i in range(10)]


def make(local=(0, 1, 2, 3), seed=0, source=SOURCE) -> Prompts:
    return Prompts(source, prompts_per_step=4, local=local, seed=seed)


def test_an_epoch_has_every_prompt_once_and_every_epoch_another_order():
    """20 draws of 10 prompts are two epochs; a batch may span them."""
    drawn = [name for _, batch in zip(range(5), iter(make().__next__, None), strict=False) for name in batch]
    assert sorted(drawn[:10]) == sorted(SOURCE) and sorted(drawn[10:]) == sorted(SOURCE)
    assert drawn[:10] != drawn[10:] and drawn[:10] != SOURCE


def test_the_seed_fixes_the_order():
    assert [next(make()) for _ in range(2)] == [next(make()) for _ in range(2)]
    assert next(make(seed=0)) != next(make(seed=1))


def test_a_restored_position_goes_on_with_the_next_batch():
    one = make()
    for _ in range(3):
        next(one)
    state, want = one.get_state(), [next(one) for _ in range(3)]
    two = make()
    two.set_state(state)
    assert [next(two) for _ in range(3)] == want


def test_processes_read_their_parts_of_the_same_batch():
    whole, first, second = make(), make(local=(0, 1)), make(local=(2, 3))
    for _ in range(4):
        assert next(whole) == next(first) + next(second)
    assert first.get_state() == second.get_state()


def test_only_the_prompts_of_this_process_are_read():
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    next(make(local=(1,), source=Counting(SOURCE)))
    assert Counting.reads == 1


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no prompts"):
        make(source=[])
