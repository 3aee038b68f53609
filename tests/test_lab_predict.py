"""Predictions: what recorded episodes say about a policy, the verdict in words, and figures from kept answers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tapo_jax import records
from tapo_jax.config import UserError
from tapo_jax.lab import __main__ as command
from tapo_jax.lab import figures, predict, recorded
from tapo_jax.lab.questions import QUESTIONS
from tapo_jax.lab.recorded import Share
from tapo_jax.records import RecordedEpisode, RecordedTurn

KEPT = Path(__file__).parents[1] / "docs" / "lab"


def episode(prompt, sample, calls, success, prompt_id="a question of one's own", step=1):
    """calls: (tool, arguments, result, similarity to a witness) each; at .7 and more a failing step is correctable."""
    turns = [
        RecordedTurn(
            text="",
            call_name=tool,
            call_arguments=arguments,
            result=result,
            slot=k,
            sim=sim,
            correctable=not success and sim >= 0.7,
        )
        for k, (tool, arguments, result, sim) in enumerate(calls)
    ]
    return RecordedEpisode(
        step=step,
        prompt=prompt,
        sample=sample,
        prompt_id=prompt_id,
        question="",
        answers=(),
        hops=1,
        images=(),
        prompt_images=0,
        turns=(*turns, RecordedTurn(text="<answer>x</answer>")),
        answer="x",
        finish="answer",
        rewards={"accuracy": float(success)},
        reward=float(success),
        success=success,
        advantage=1.0 if success else -0.5,
    )


def search(sim):
    return ("search", {"query": "x"}, "found", sim)


def opened(sim):
    return ("open", {"page": 1}, "page", sim)


def own_world():
    """Two groups of four. The first: a success by search and open; a failure that did the same; one that searched
    another thing; a guess that was right. The second fails as a whole."""
    return [
        episode(0, 0, [search(1.0), opened(1.0)], True),
        episode(0, 1, [search(0.9), opened(0.8)], False),
        episode(0, 2, [search(0.3), opened(0.2)], False),
        episode(0, 3, [], True),
        *(episode(1, sample, [search(0.0)], False) for sample in range(3)),
        episode(1, 3, [], False),
    ]


def test_a_run_without_known_facts_is_measured_by_its_witnesses():
    measured = recorded.measure(own_world(), 0.7)
    assert (measured.known, measured.groups, measured.groups_without_success, measured.group) == (False, 2, 1, 4)
    assert measured.deciding_tool == "open" and measured.chain == ("search", "open")
    assert measured.lookup == Share(3, 8)
    assert measured.tools == Share(1, 3)
    assert measured.guess == Share(1, 5)
    assert measured.skill == {"search": Share(2, 3), "open": Share(2, 2)}  # of calls before which none was wrong
    assert measured.witnessed == Share(2, 4)


def test_a_run_on_atlas_is_measured_by_its_facts():
    """The second episode's image search named Spain, not France: its text search is not counted."""
    zoom = ("image_zoom_in_tool", {"bbox_2d": [0, 0, 9, 9], "label": "red", "img_idx": 0}, "Image 1.", 0.9)

    def calls(name, sim):
        text = ("text_search_tool", {"query": name}, f"1. {name}, capital\nThe capital", sim)
        return [zoom, ("image_search_tool", {"img_idx": 1}, f"1. {name}", sim), text]

    group = [episode(0, 0, calls("France", 1.0), True, "capital/France/1234")]
    group += [episode(0, 1, calls("Spain", 0.1), False, "capital/France/1234")]
    group += [episode(0, 2, calls("France", 0.8), False, "capital/France/1234")]
    measured = recorded.measure(group, 0.7)
    assert measured.known
    assert measured.skill["image_search_tool"] == Share(2, 3)
    assert measured.skill["text_search_tool"] == Share(2, 2)
    assert measured.harmless == 0.0
    assert measured.found == Share(2, 2) and measured.right == Share(2, 2)


def test_the_spread_of_similarities_is_found_from_what_finds_its_witness():
    draw = np.random.default_rng(5)
    nearest_N = np.abs(draw.random(3000)[:, None] - draw.random((3000, 2))).min(axis=1)
    found = int((1 - 1.5 * nearest_N >= 0.7).sum())
    assert recorded._spread(Share(found, 3000), 0.7, 2) == pytest.approx(1.5, abs=0.15)


def result(gain, interval, saved, collapsed=(0.0, 0.0)):
    return {
        "gain": {"mean": gain, "interval": interval},
        "saved": None if saved is None else {"mean": saved, "interval": [saved - 0.1, saved + 0.1]},
        "collapsed": list(collapsed),
    }


@pytest.mark.parametrize(
    "found, words",
    [
        (result(0.05, [0.03, 0.07], 0.31), "TAPO should save about a third of the updates"),
        (result(0.004, [0.003, 0.005], 0.02), "No difference to be expected"),
        (result(0.03, [-0.01, 0.07], 0.3), "No difference to be expected"),
        (result(0.2, [0.1, 0.3], None, (0.9, 0.1)), "TAPO should keep the tools"),
        (result(-0.05, [-0.08, -0.02], -0.4), "TAPO should do harm"),
    ],
)
def test_the_verdict_says_what_was_simulated(found, words):
    measured = recorded.measure(own_world(), 0.7)
    helps = {"both": result(0.05, [0.03, 0.07], 0.31)}
    verdict = predict.decide(measured, predict.world_of(measured), found, helps)
    assert verdict.startswith(words)
    assert ("It would be different with: both." in verdict) == ("because" in verdict)


def test_the_world_of_a_run_succeeds_as_often_as_the_run():
    measured = recorded.measure(own_world(), 0.7)
    world = predict.world_of(measured)
    assert float(np.prod(world.skill) * world.reading) == pytest.approx(measured.tools.value)


def test_predict_writes_its_files_beside_a_run(tmp_path, monkeypatch, capsys):
    small = {"SEEDS": range(2), "MAP_SEEDS": range(2), "UPDATES": 6, "RATES": (0.05, 0.1), "PLAIN_RATES": (1.4, 2.8)}
    for name, value in (small | {"MAP_GUESS": (0.0, 0.4), "MAP_HEADROOM": (0.1,)}).items():
        monkeypatch.setattr(predict, name, value)
    records.save(tmp_path / "episodes" / "step_000001.npz", own_world())
    (tmp_path / "config.json").write_text(json.dumps({"tapo": {"theta": 0.6}, "data": {"prompts_per_step": 2}}))
    command.main(["predict", str(tmp_path)])
    text = capsys.readouterr().out
    assert "a look-up is an episode that calls open" in text and "by witnesses" in text
    answer = json.loads((tmp_path / "predict.json").read_text())
    assert answer["method"]["theta"] == 0.6 and answer["method"]["rollouts"] == 8
    assert answer["verdict"] in text
    Image.open(tmp_path / "predict.png").verify()


def test_a_run_that_cannot_be_measured_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no recorded episodes"):
        command.main(["predict", str(tmp_path)])
    only_guesses = [dataclasses.replace(episode(0, 0, [], True), success=True)]
    records.save(tmp_path / "episodes" / "step_000001.npz", only_guesses)
    with pytest.raises(UserError, match="no tool step"):
        command.main(["predict", str(tmp_path)])


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_figure_is_drawn_from_its_kept_answer(name, tmp_path):
    path = figures.save(name, command.read(name, KEPT), tmp_path)
    Image.open(path).verify()
    assert path.stat().st_size < 150_000


def test_drawing_what_was_never_run_says_how_to_run_it(tmp_path):
    with pytest.raises(UserError, match="lab run phases"):
        command.main(["draw", "phases", "--out", str(tmp_path)])


def test_the_kept_tables_are_those_of_the_first_simulation():
    """Seeds differ, and so do a few collapses: at most .06 apart, .01 in the mean."""
    answer = command.read("tables", KEPT)
    assert answer["seeds"] == 64
    assert answer["largest_difference"] < 0.06 and answer["mean_difference"] < 0.01
