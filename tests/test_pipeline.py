"""The order of prompts: fixed by the seed, restorable, and the same however many processes read it."""

import numpy as np
import pytest

from tapo_jax.config import BadImage, UserError
from tapo_jax.data import pipeline
from tapo_jax.data.pipeline import Prompts
from tapo_jax.types import BadPrompt, Images, Prompt

SOURCE = [Prompt(f"q{i}", "?", (), ("x",)) for i in range(10)]


def make(local=(0, 1, 2, 3), seed=0, source=SOURCE) -> Prompts:
    return Prompts(source, prompts_per_step=4, local=local, seed=seed)


def test_an_epoch_has_every_prompt_once_and_every_epoch_another_order():
    """20 draws of 10 prompts are two epochs; a batch may span them."""
    drawn = [prompt.id for _, batch in zip(range(5), iter(make().__next__, None), strict=False) for prompt in batch]
    names = [prompt.id for prompt in SOURCE]
    assert sorted(drawn[:10]) == names and sorted(drawn[10:]) == names
    assert drawn[:10] != drawn[10:] and drawn[:10] != names


def test_a_step_of_one_question_takes_them_in_the_order_of_larger_steps():
    one_by_one = Prompts(SOURCE, prompts_per_step=1, local=[0], seed=0)
    assert [next(one_by_one)[0] for _ in range(8)] == [
        prompt for _, batch in zip(range(2), iter(make().__next__, None), strict=False) for prompt in batch
    ]


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


def shown(count: int, *, broken: set[int]) -> list[Prompt]:
    """Questions with one image each, which some cannot show."""

    def image(i: int):
        def look():
            if i in broken:
                raise BadImage(f"The image {i}.png cannot be shown: it is damaged.")
            return np.full((4, 4, 3), i, np.uint8)

        return look

    return [Prompt(f"q{i}", "?", Images([image(i)]), ("x",)) for i in range(count)]


def test_a_question_that_cannot_be_shown_gives_its_place_to_the_next_row():
    whole, bad = make(source=shown(10, broken=set())), make(source=shown(10, broken={3, 4}))
    skipped = []
    for _ in range(5):
        want = [{"q3": "q5", "q4": "q5"}.get(prompt.id, prompt.id) for prompt in next(whole)]
        drawn = next(bad)
        assert [prompt.id for prompt in drawn] == want and all(len(prompt.images) == 1 for prompt in drawn)
        skipped.append(bad.skipped)
    assert sum(skipped) == 2 * (2 + 1), "two epochs: row 3 is followed by row 4, row 4 by row 5"
    assert whole.get_state() == bad.get_state() and whole.skipped == 0


def test_each_row_that_is_skipped_is_named_once(capsys):
    prompts = make(source=shown(10, broken={3}))
    for _ in range(5):
        next(prompts)
    assert capsys.readouterr().err == "skipped question 3: The image 3.png cannot be shown: it is damaged.\n"


def test_evaluation_leaves_out_what_cannot_be_shown(capsys):
    source = shown(5, broken={1, 4})
    assert pipeline.showable(source) == [source[0], source[2], source[3]]
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "left out question 'q1'",
        "left out question 'q4'",
    ]


def test_skipping_is_the_same_in_parts_and_after_resuming():
    source = shown(10, broken={0, 7})
    whole, first, second = (make(local=local, source=source) for local in ((0, 1, 2, 3), (0, 1), (2, 3)))
    state, want = None, []
    for step in range(5):
        state = whole.get_state() if step == 2 else state
        drawn = [prompt.id for prompt in next(whole)]
        assert drawn == [prompt.id for prompt in [*next(first), *next(second)]]
        assert whole.skipped == first.skipped + second.skipped
        want += drawn if step >= 2 else []
    resumed = make(source=source)
    resumed.set_state(state)
    assert [prompt.id for _ in range(3) for prompt in next(resumed)] == want


def test_a_set_without_anything_to_show_is_refused():
    with pytest.raises(UserError, match=r"None of 10 questions in a row can be shown. The last one: The image \d.png"):
        next(make(source=shown(10, broken=set(range(10)))))


def test_a_source_that_makes_no_prompts_ends_in_a_sentence():
    class Own(list):
        def __getitem__(self, index):
            return Prompt("a", "?", (), "Paris")

    with pytest.raises(UserError, match=r"Row \d of the questions: the answers of question 'a' are 'Paris'"):
        next(make(source=Own(range(10))))
    with pytest.raises(UserError, match="there is a str and no Prompt"):
        next(make(source=["?"] * 10))


def test_the_answers_of_a_prompt_are_a_tuple():
    assert Prompt("a", "?", (), ["x", "y"]).answers == ("x", "y")
    for answers in ("Paris", {"Paris": 1}, 5, None, [5], b"x"):
        with pytest.raises(BadPrompt, match="question 'a'"):
            Prompt("a", "?", (), answers)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Prompt("a", "?", (np.zeros((4, 4)),), ("x",)), r"float64 \[4, 4\], and uint8 \[H, W, 3\] is needed"),
        (Prompt("a", "?", ("a.png",), ("x",)), "it is str"),
        (Prompt("a", "?", (np.zeros((1, 300, 3), np.uint8),), ("x",)), "300 x 1 is more than 200 times"),
        (Prompt("a", "\ud83d?", (), ("x",)), "half of a surrogate pair"),
    ],
)
def test_what_a_question_of_yours_must_be(prompt, says):
    with pytest.raises(BadImage, match=says):
        pipeline.decoded(prompt)
