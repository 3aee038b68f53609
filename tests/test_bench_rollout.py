"""The rollout benchmark is honest: all sides do the same work, and greedy tokens are the same in float32."""

import dataclasses
import json

import numpy as np
import pytest
import rollout_world as world

from tapo_jax.bench import __main__ as bench
from tapo_jax.bench import model, rollout, rollout_work
from tapo_jax.bench.rollout_work import Played

SHAPE = dict(questions=2, group=3, turns=3, question=12, written=6, response=9)


@pytest.fixture
def one_thread(monkeypatch):
    """PyTorch's threads wait for each other in busy loops: between tests that share two cores one is faster."""
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    yield
    torch.set_num_threads(before)


def work(*, uneven: bool) -> rollout_work.Work:
    return rollout_work.make_work(world.config(), **SHAPE, uneven=uneven)


def test_lengths_are_even_or_spread_around_the_same_means():
    even = work(uneven=False)
    assert even.rows == 6 and even.written == [[6, 6, 6]] * 6
    assert [len(ids) for row in even.response for ids in row] == [9] * 12
    assert (even.capacity, even.total_written, even.distinct) == (12 + 18 + 18, 108, 24 + 12 * 10)
    many = rollout_work.make_work(world.config(), **SHAPE | {"questions": 200, "written": 40}, uneven=True)
    lengths = [count for row in many.written for count in row]
    assert min(lengths) >= 10 and max(lengths) <= 70 and 38 < np.mean(lengths) < 42
    assert {len(row) for row in many.written} == {1, 2, 3}
    assert all(len(said) == len(turns) - 1 for said, turns in zip(many.response, many.written, strict=True))
    tokens = {token for ids in many.question for token in ids}
    assert not tokens & set(np.flatnonzero(rollout_work.forbidden(world.config())))


def test_agreement_counts_equal_tokens_and_is_nothing_where_the_work_differs():
    def played(*written):
        return Played(1.0, 1.0, 0.5, 0.5, 1, 1, 0.0, [list(ids) for ids in written])

    assert rollout.agreement(played((1, 2), (3, 4)), played((1, 2), (3, 4))) == 1.0
    assert rollout.agreement(played((1, 2), (3, 4)), played((1, 2), (3, 5))) == 0.75
    assert rollout.agreement(played((1, 2), (3, 4)), played((1, 2, 3), (4,))) == 0.0


def test_the_command_plays_the_same_greedy_tokens_on_all_sides_and_compiles_nothing_while_it_measures(
    tmp_path, capsys, monkeypatch, one_thread
):
    toy = dataclasses.replace(model.SIZES["atlas"], config=world.config())
    monkeypatch.setattr(rollout, "size_of", lambda name: toy)
    monkeypatch.setattr("tapo_jax.bench.model_jax.random_model", lambda config, dtype: world.model())
    words = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "out.json"
    bench.main(["rollout", *words, "--chunk", "4", "--slots", "4", "--repeats", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["lengths"], row["by"]) for row in rows] == [
        (lengths, by)
        for lengths in ("even", "uneven")
        for by in ("tapo_jax", "transformers", "transformers, prompt copied")
    ]
    for uneven in (False, True):
        ours, kept, copied = rows[3 * uneven : 3 * uneven + 3]
        assert (ours["compiled"], kept["agree"], copied["agree"]) == (0, "100.0 %", "100.0 %")
        assert kept["times faster"] == pytest.approx(kept["s"] / ours["s"])
        given = work(uneven=uneven)
        again = 2 * sum(map(len, given.question)) / given.distinct  # for two of three conversations of a question
        ratios = [row["prefilled/distinct"] for row in (ours, kept, copied)]
        assert ratios == [1.0, pytest.approx(1 + again), 1.0]
        for row in (ours, kept, copied):
            assert row["written tokens/s"] == pytest.approx(given.total_written / row["s"])
            assert 0 <= row["idle"] < 1 and row["prefill s"] + row["decode s"] < row["s"]
    assert rows[1]["idle"] == 0 < rows[4]["idle"]  # in one batch, rows wait for each other only if they are uneven
    assert "times faster" in capsys.readouterr().out


def test_a_side_that_draws_other_tokens_does_not_agree():
    """The other weights of one side alone change its greedy tokens, so that equal tokens say something."""
    from tapo_jax.bench.rollout_ours import OurRollout

    given = work(uneven=True)
    found = []
    for seed in (0, 1):
        side = OurRollout(world.model(seed), given, slots=4, chunk=4)
        found.append(side.play(temperature=0.0, seed=0))
        side.close()
    assert [len(ids) for ids in found[0].written] == [sum(turns) for turns in given.written]
    assert rollout.agreement(*found) < 0.5
