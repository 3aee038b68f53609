"""Which recorded steps of Atlas were right, by players whose mistakes are known, and the table by hand."""

import dataclasses
import json

import numpy as np
import pytest
import recorded
from rollout_world import chat, pixels

from tapo_jax import records, rewards
from tapo_jax.atlas.play import Settings, parse_id
from tapo_jax.cold_start.batches import AtlasSession
from tapo_jax.cold_start.experts import Flaws, expert, play
from tapo_jax.config import UserError
from tapo_jax.report import __main__ as report
from tapo_jax.report import truth
from tapo_jax.rollout.episode import open_prompt

NONE = {field.name: 0.0 for field in dataclasses.fields(Flaws)}


def judged(episodes: int = 12, *, session: AtlasSession, **flaws: float):
    """For every episode its question and the (tool, right) of its steps, by a player who always makes the given
    mistakes."""
    rng, store, found = np.random.default_rng(3), pixels(), []
    for _ in range(episodes):
        prompt, question, scene = session.prompt(rng)
        script = expert(question, scene, rng, Flaws(**NONE | flaws))
        start = open_prompt(prompt, chat=chat(), image_tokens=store.tokens, tools=session.runner.schemas)
        episode = play(
            start, script, runner=session.runner, chat=chat(), limits=recorded.LIMITS, image_tokens=store.tokens
        )
        episode.rewards = rewards.score(episode)
        slots = iter(range(len(episode.turns)))
        made = records.record(episode, step=1, prompt=0, advantage=-1.0, credit=[])
        turns = [
            dataclasses.replace(shown, slot=next(slots) if turn.is_step else -1)
            for shown, turn in zip(made.turns, episode.turns, strict=True)
        ]
        made = dataclasses.replace(made, turns=tuple(turns))
        found.append((question, [(turn.call_name, right) for turn, right in truth.steps_of(made)]))
    return found


@pytest.fixture(scope="module")
def session():
    return AtlasSession.fictional(1, Settings(hops=(1, 2), outlines=2))


def test_every_step_of_a_perfect_player_is_right(session):
    for _, steps in judged(session=session):
        assert [name for name, _ in steps[:3]] == [truth.ZOOM, truth.IMAGE_SEARCH, truth.TEXT_SEARCH]
        assert all(right for _, right in steps)


def test_whoever_takes_the_wrong_relation_was_right_until_then(session):
    """Both neighbours stand in one passage, so the search for it is right; what follows is about another country."""
    several = lambda name: len(session.world.countries[name].neighbours) > 1  # noqa: E731
    seen = [steps for question, steps in judged(24, session=session, wrong_relation=1.0) if several(question.chain[0])]
    seen = [steps for steps in seen if len(steps) == 4]
    assert len(seen) > 3
    assert all([right for _, right in steps] == [True, True, True, False] for steps in seen)


def test_a_question_asked_one_hop_too_early_is_wrong(session):
    """The attribute of the country before the last; with one look-up nothing can be skipped."""
    for question, steps in judged(24, session=session, skip_hop=1.0):
        assert [right for _, right in steps] == [True, True, question.hops == 1]


def test_a_zoom_that_nobody_searched_is_not_known(session):
    steps = [step for _, steps in judged(session=session, wrong_image=1.0) for step in steps]
    assert {right for name, right in steps if name == truth.ZOOM} == {None}
    assert not all(right for name, right in steps if name == truth.IMAGE_SEARCH)  # of the whole scene


def test_table_by_hand():
    """Question of one look-up; three failing episodes, of which the last one's group has no advantage. Right steps have
    -0.5, -0.5 and 1 before, -0.25, -0.5 and 1 after; wrong ones -0.5 and -0.5 before, -0.25 and -0.5 after."""

    def episode(advantage: float, success: bool, *steps: tuple[str, bool]):
        turns = tuple(
            records.RecordedTurn(
                "",
                truth.TEXT_SEARCH,
                {},
                f"1. {title}\n…",
                slot=k,
                correctable=witnessed,
                adv_before=advantage,
                adv_after=min(advantage + 0.25 * witnessed, max(advantage, 0.0)),
            )
            for k, (title, witnessed) in enumerate(steps)
        )
        return records.RecordedEpisode(
            step=1, prompt=0, sample=0, prompt_id="capital/Peru/00ff00ff", question="?", answers=("Lima",), hops=1,
            images=(), prompt_images=0, turns=turns, answer=None, finish="answer", rewards={}, reward=0.0,
            success=success, advantage=advantage,
        )  # fmt: skip

    right, wrong = "Peru, capital", "Peru, currency"
    rows = truth.table(
        [
            episode(-0.5, False, (right, True), (wrong, True), (wrong, False)),
            episode(-0.5, False, (right, False)),
            episode(0.0, False, (right, True)),
            episode(1.0, True, (right, True)),
        ]
    )
    assert [row["tool"] for row in rows] == ["all", truth.ZOOM, truth.IMAGE_SEARCH, truth.TEXT_SEARCH]
    assert rows[0] | {"tool": truth.TEXT_SEARCH} == rows[3]
    assert rows[3] == {
        "tool": truth.TEXT_SEARCH, "punished": 4, "undeserved": 0.5, "found": 0.5, "precision": 0.5,
        "right": [0.0, 0.25 / 3], "wrong": [-0.5, -0.375],
    }  # fmt: skip
    nothing = {"undeserved": None, "found": None, "precision": None, "right": [None, None], "wrong": [None, None]}
    assert rows[1] == {"tool": truth.ZOOM, "punished": 0} | nothing


def test_command(tmp_path, capsys):
    episodes = recorded.recorded(4, 6)
    records.save(tmp_path / "episodes" / "step_000020.npz", episodes)
    report.main(["truth", str(tmp_path)])
    rows = json.loads((tmp_path / "truth.json").read_text())
    assert rows == truth.table(episodes) and rows[0]["punished"] > 5
    assert f"{rows[0]['undeserved']:.1%}" in capsys.readouterr().out

    other = [dataclasses.replace(episode, prompt_id="mmsearch/17") for episode in episodes]
    records.save(tmp_path / "episodes" / "step_000020.npz", other)
    with pytest.raises(UserError, match="'mmsearch/17' is no question of Atlas: `report truth` reads runs with"):
        report.main(["truth", str(tmp_path)])


def test_parse_id():
    assert parse_id("calling code/Peru/Chile/00ff00ff") == ("calling code", ["Peru", "Chile"])
    for other in ("colour/Peru/00ff00ff", "capital/00ff00ff", "17", ""):
        with pytest.raises(ValueError, match="is no question of Atlas"):
            parse_id(other)
