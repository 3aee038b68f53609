"""Figures and tables of runs and sweeps, from files with known numbers."""

import dataclasses
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import synthetic

from tapo_jax import records, tapo
from tapo_jax.config import UserError, flat
from tapo_jax.records import RecordedEpisode, RecordedTurn
from tapo_jax.report import __main__ as report
from tapo_jax.report import curve, figures, misplaced, results, statistics, tables
from tapo_jax.report.plots import series, smooth


def picture(path):
    """The image, which must hold something: not one colour only."""
    pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    return pixels


# One run.


def test_curve(tmp_path):
    path = synthetic.write(tmp_path / "metrics.jsonl", synthetic.lines(40))
    curve.write_curve(path, tmp_path / "curve.png")
    assert picture(tmp_path / "curve.png").shape == (870, 1500, 3)


def test_curve_of_a_run_that_logged_little(tmp_path):
    """An evaluation alone, steps without TAPO, and a number that was not finite (null) are no reason to fail."""
    path = synthetic.write(
        tmp_path / "metrics.jsonl",
        [{"step": 0, "eval/accuracy": 0.25}, {"step": 1, "reward/mean": None, "loss/entropy": 0.5}],
    )
    curve.write_curve(path, tmp_path / "curve.png")
    assert picture(tmp_path / "curve.png").size > 0


def test_curve_needs_a_step(tmp_path):
    with pytest.raises(UserError, match="holds no step"):
        curve.write_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")


def test_series_leaves_out_what_is_not_there():
    step_N, value_N = series([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": 0.0}], "a")
    assert step_N.tolist() == [1, 4] and value_N.tolist() == [2, 0]


def test_smooth_is_a_mean_of_what_is_near():
    """Window 3 of 0, 3, 6, 0: (0+3)/2, (0+3+6)/3, (3+6+0)/3, (6+0)/2."""
    assert smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.0]


def test_commands(tmp_path, capsys):
    synthetic.write(tmp_path / "metrics.jsonl", synthetic.lines(4))
    report.main(["curve", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "curve.png")
    with pytest.raises(UserError, match="no recorded episodes"):
        report.main(["page", str(tmp_path)])
    with pytest.raises(UserError, match="is no directory"):
        report.main(["curve", str(tmp_path / "nowhere")])
    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes" / "step_000001.npz").write_bytes(b"PK broken")
    for command in ("page", "credit"):
        with pytest.raises(UserError, match="cannot be read"):
            report.main([command, str(tmp_path)])
    with pytest.raises(UserError, match="no finished run"):
        report.main(["sweep", str(tmp_path)])


# Statistics.


def test_bootstrap():
    """Two seeds 0 and 1: a resample's mean is 0, 0.5 or 1 with probabilities ¼, ½, ¼, so both 2.5 % quantiles are the
    ends."""
    assert statistics.bootstrap([0.0, 1.0]) == (0.0, 1.0)
    assert statistics.bootstrap([0.3]) is None
    assert statistics.bootstrap([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    low, high = statistics.bootstrap(np.arange(101) / 100)
    # mean 0.5, standard deviation of the mean sqrt(850/10000/101) = 0.02901; the interval is about ± 1.96 of it
    assert (low, high) == pytest.approx((0.5 - 0.0569, 0.5 + 0.0569), abs=0.003)


def test_student():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653: half = 2.484138."""
    assert statistics.student([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)


def result(row, seed, accuracy, *, seconds=10.0):
    return results.Result(row, seed, ((0, 0.0, 0.0), (10, seconds, accuracy)), {}, {}, None)


def last(found):
    return found.at_step(10)


def test_difference_is_paired_by_seed():
    """Seeds 0, 1, 2 in common; deltas 0.1, 0.1, 0.1 although the seeds themselves differ by 0.4. The base's mean is
    0.5."""
    ours = {s: result("a", s, 0.4 + 0.2 * s) for s in (0, 1, 2, 7)}
    theirs = {s: result("b", s, 0.3 + 0.2 * s) for s in (0, 1, 2, 5)}
    found = results.difference(ours, theirs, last)
    assert found["values"] == pytest.approx([0.1, 0.1, 0.1])
    assert (found["seeds"], found["improved"], found["verdict"]) == (3, 3, "better")
    assert found["relative"] == pytest.approx(0.2)
    assert results.difference(theirs, ours, last)["verdict"] == "worse"
    assert results.difference({0: ours[0]}, {1: theirs[1]}, last) is None


def test_verdict_needs_both_intervals():
    """Deltas 0.01, 0.02, 0.09: no resample has a mean of 0, so the bootstrap leaves it out; Student: 0.04 ±
    4.303·0.0252."""
    ours = {s: result("a", s, 0.3 + delta) for s, delta in enumerate((0.01, 0.02, 0.09))}
    found = results.difference(ours, {s: result("b", s, 0.3) for s in range(3)}, last)
    assert found["interval"][0] > 0 > found["student"][0]
    assert found["verdict"] == "not decided"


def test_one_seed_decides_nothing():
    found = results.difference({0: result("a", 0, 0.9)}, {0: result("b", 0, 0.1)}, last)
    assert found["interval"] is None and found["verdict"] == "not decided"


def test_interpolation_between_evaluations():
    """0 at step 0, 0.6 at step 10 after 30 s: half way it is 0.3, at 10 s 0.2; after the end the last value."""
    found = result("a", 0, 0.6, seconds=30.0)
    assert (found.at_step(5), found.at_time(10), found.at_time(99)) == pytest.approx((0.3, 0.2, 0.6))


def config(enabled, **tapo):
    """A flat config as older results hold it, with today's names."""
    tapo = {"enabled": enabled, "beta": 0.8, "theta": 0.7} | tapo
    return results.renamed(flat({"seed": 3, "algorithm": {"loss": "grpo"}, "tapo": tapo}))


def test_old_names_of_fields_are_understood():
    old = {"tapo.enabled": True, "tapo.control": "gigpo", "data.name": "atlas", "reward.format": 0.5}
    new = {"algorithm.credit": "gigpo", "tapo.control": "none", "data.source": "atlas", "reward.weights.format": 0.5}
    assert results.renamed(old) == new == results.renamed(new)
    assert config(True)["algorithm.credit"] == "tapo" and config(False)["algorithm.credit"] == "trajectory"


def test_what_the_report_calls_published_is_the_librarys_default():
    for name, value in results.PUBLISHED.items():
        section, _, field = name.partition(".")
        if section == "tapo" and hasattr(tapo.PUBLISHED, field):
            assert getattr(tapo.PUBLISHED, field) == value, name


def test_bases_and_reference_are_found_from_the_configs():
    """The published row is the one that differs least from the others: beta_2 and theta_5 are one field away from it,
    two apart."""
    configs = {
        "off": config(False),
        "beta_2": config(True, beta=0.2),
        "on": config(True),
        "theta_5": config(True, theta=0.5),
    }
    configs["other"] = config(True) | {"algorithm.loss": "sapo"}
    base, reference = results.bases(configs)
    assert base == {"beta_2": "off", "on": "off", "theta_5": "off"}
    assert reference == {"beta_2": "on", "theta_5": "on"}


def test_swept_fields():
    configs = {f"beta_{b}": config(True, beta=b) | {"seed": i} for i, b in enumerate((0.8, 0.2, 0.4))} | {
        "theta": config(True, theta=0.9)
    }
    assert figures.swept_fields(configs) == [("tapo.beta", ["beta_0.2", "beta_0.4", "beta_0.8"])]


# A sweep.


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Base and TAPO with three seeds (+0.1 in the end), two more betas with two; one failed run, one that has not
    finished."""
    directory = tmp_path_factory.mktemp("sweep")
    rows = {
        "grpo": (config(False), 0.2, 3),
        "tapo": (config(True), 0.3, 3),
        "beta_2": (config(True, beta=0.2), 0.25, 2),
    }
    rows["beta_12"] = (config(True, beta=1.2), 0.3, 2)
    for row, (fields, gain, seeds) in rows.items():
        for seed in range(seeds):
            folder = directory / row / f"seed_{seed}"
            synthetic.write(
                folder / "metrics.jsonl", synthetic.lines(20, seed=seed, gain=gain, start=0.2 + 0.01 * seed)
            )
            (folder / "config.json").write_text(json.dumps(fields | {"seed": seed}))
    (directory / "beta_2" / "seed_1" / "failed.json").write_text('{"error": "The disk\\nis full."}')
    (directory / "grpo" / "seed_3").mkdir()
    return directory


def test_condensed_results_give_the_same_report(sweep, tmp_path):
    """The small result files alone are enough to make the report again."""
    for folder in sweep.glob("*/seed_*"):
        kept = tmp_path / folder.relative_to(sweep)
        kept.mkdir(parents=True)
        if (folder / "failed.json").exists():
            (kept / "failed.json").write_text((folder / "failed.json").read_text())
        elif (folder / "metrics.jsonl").exists():
            condensed = json.dumps(results.condense(folder, folder.parent.name, int(folder.name[5:])))
            assert len(condensed) < 40_000
            (kept / "result.json").write_text(condensed)
    assert results.summarise(results.load(tmp_path)) == results.summarise(results.load(sweep))


def test_summary_of_a_sweep(sweep):
    found = results.summarise(results.load(sweep))
    assert (found["step"], found["seconds"]) == (20, 40.0)  # 20 steps of 2 s
    grpo, tapo = found["rows"]["grpo"], found["rows"]["tapo"]
    assert grpo["at_step"]["mean"] == pytest.approx(0.21 + 0.2)  # starts at 0.20, 0.21, 0.22 and gains 0.2
    assert tapo["base"] == "grpo" and tapo["base_at_step"]["mean"] == pytest.approx(0.1)
    assert tapo["base_at_step"]["improved"] == 3 and tapo["base_at_step"]["verdict"] == "better"
    assert found["rows"]["beta_12"]["reference"] == "tapo"
    assert grpo["tapo_share"] == pytest.approx(0.005)
    assert found["failed"] == [("beta_2", 1, "The disk\nis full.")] and found["unfinished"] == [("grpo", 3)]


def test_report_of_a_sweep(sweep):
    (sweep / "sweep.json").write_text(
        json.dumps({"rows": ["tapo", "grpo"], "base": {"beta_12": "beta_2", "grpo": "no such row"}})
    )
    text = tables.write_sweep(sweep)
    (sweep / "sweep.json").unlink()
    assert text == (sweep / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[1:5]] == ["| tapo", "| grpo", "| beta_12", "| beta_2"]
    assert "| tapo | 3 | 51.0 [50.0, 52.0] |" in text
    assert "+10.0 [+10.0, +10.0] | 3/3 |" in text and "| better |" in text
    assert "**Failed:** beta_2, seed 1: The disk is full." in text and "Not finished: grpo seed 3." in text
    assert "TAPO's share of a step's time: 0.50 %" in text
    assert json.loads((sweep / "report.json").read_text())["rows"]["beta_12"]["base"] == "beta_2"
    shown = [line.split("(")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert len(shown) == 5
    for name in shown:
        picture(sweep / name)


def evaluated(folder, name, accuracy, episodes, temperature=1.0):
    (folder / name).mkdir()
    found = {"split": "held_out", "temperature": temperature, "metrics": {"accuracy": accuracy, "episodes": episodes}}
    (folder / name / "export.json").write_text(json.dumps(found))


def test_later_evaluations_count_where_all_runs_of_a_seed_have_them(sweep, tmp_path):
    """Of seed 0 all four rows were evaluated again, grpo twice: 0.5 and 0.8; of seed 1 grpo alone, on questions that
    the others were not asked."""
    shutil.copytree(sweep, tmp_path / "again")
    rows = ("grpo", "tapo", "beta_2", "beta_12")
    for row in rows:
        evaluated(tmp_path / "again" / row / "seed_0", "eval_1", 0.5, 30)
    run = tmp_path / "again" / "grpo" / "seed_0"
    evaluated(run, "eval_2", 0.8, 30)
    (run / "eval_1" / "step_000010.json").write_text("of another checkpoint, not read")
    evaluated(tmp_path / "again" / "grpo" / "seed_1", "eval_1", 0.9, 30)
    before, after = (results.load(path) for path in (sweep, tmp_path / "again"))
    (*earlier, _), (*same, last) = (found.results["grpo"][0].evals for found in (before, after))
    assert earlier == same and last[2] == pytest.approx(0.65)
    assert [after.results[row][0].evals[-1][2] for row in rows[1:]] == [0.5] * 3
    assert after.results["grpo"][1] == before.results["grpo"][1]
    text = tables.markdown(results.summarise(after), "again")
    assert "4 of 9 runs were evaluated again at their end, with up to 60 answers" in text
    assert "again" not in tables.markdown(results.summarise(before), "sweep")


def test_a_later_evaluation_on_other_data_is_not_the_runs_own(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path / "again")
    run = tmp_path / "again" / "grpo" / "seed_0"
    (run / "config.json").write_text(json.dumps(config(False) | {"seed": 0, "data": {"source": "atlas", "hops": [1]}}))
    for number, (data, accuracy) in enumerate([({"hops": [1]}, 0.5), ({"hops": [2]}, 0.1), ({"source": "fvqa"}, 0.2)]):
        data = {"source": "atlas", "split": "held_out"} | data
        (run / "eval_1").mkdir(exist_ok=True)
        evaluated(run / "eval_1", str(number), accuracy, 30)
        path = run / "eval_1" / str(number) / "export.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
    assert results.later_accuracy(run, results.flat(json.loads((run / "config.json").read_text()))) == (0.5, 30, 30)


def test_a_later_evaluation_that_is_not_like_the_run_is_refused(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path / "again")
    run = tmp_path / "again" / "grpo" / "seed_0"
    evaluated(run, "eval_1", 0.5, 30)
    evaluated(run, "eval_2", 0.5, 10)
    with pytest.raises(UserError, match="different numbers of questions: keep those of one"):
        results.load(tmp_path / "again")
    shutil.rmtree(run / "eval_2")
    evaluated(run, "eval_2", 0.5, 30, temperature=0.0)
    (run / "config.json").write_text(json.dumps(config(False) | {"seed": 0, "eval.temperature": 1.0}))
    with pytest.raises(UserError, match="has the temperature 0.0 and the run 1.0: evaluate again as the run does"):
        results.load(tmp_path / "again")


def test_run_without_a_last_evaluation_is_not_finished(tmp_path):
    synthetic.write(tmp_path / "metrics.jsonl", synthetic.lines(20)[:-1])
    with pytest.raises(UserError, match="no evaluation of its last step"):
        results.condense(tmp_path, "row", 0)


def test_run_that_has_only_begun_is_not_finished(tmp_path):
    """Its evaluation at the start is no result, where the config says how many steps there are."""
    synthetic.write(tmp_path / "a" / "seed_0" / "metrics.jsonl", synthetic.lines(20)[:11])
    (tmp_path / "a" / "seed_0" / "config.json").write_text(json.dumps({"total_steps": 20, "total_epochs": 0.0}))
    with pytest.raises(UserError, match="no evaluation of its last step"):
        results.condense(tmp_path / "a" / "seed_0", "a", 0)


def test_steps_that_compile_count_as_the_others(tmp_path):
    """20 steps of 2 s, the first of which took 62 s because it compiled."""
    lines = synthetic.lines(20)
    lines[1] |= {"time/step": 62.0, "perf/compiles": 9}
    synthetic.write(tmp_path / "metrics.jsonl", lines)
    assert results.condense(tmp_path, "row", 0)["seconds"] == 40.0


def test_runs_that_were_asked_for_and_rows_that_failed_are_not_left_out(tmp_path):
    synthetic.write(tmp_path / "a" / "seed_0" / "metrics.jsonl", synthetic.lines(20))
    (tmp_path / "b" / "seed_0").mkdir(parents=True)
    (tmp_path / "b" / "seed_0" / "failed.json").write_text('{"error": "No disk."}')
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": ["a", "b"], "seeds": {"a": [0, 1], "b": [0]}}))
    assert results.load(tmp_path).unfinished == [("a", 1)]
    text = tables.write_sweep(tmp_path)
    assert "| b | 0 + 1 failed | – |" in text and "Not finished: a seed 1." in text


# Credit of recorded episodes.


def step_turn(sim, **fields):
    return RecordedTurn(
        text="", call_name="t", call_arguments={}, result="r", slot=0, sim=sim, witness=(0, 0, 0), **fields
    )


def credit_episode(sample, success, turns, *, prompt=0, step=1):
    return RecordedEpisode(
        step=step,
        prompt=prompt,
        sample=sample,
        prompt_id="",
        question="",
        answers=(),
        hops=1,
        images=(),
        prompt_images=0,
        turns=tuple(turns),
        answer=None,
        finish="answer",
        rewards={},
        reward=0.0,
        success=success,
        advantage=0.0,
    )


def recorded_credit():
    """Failing: sample 1 with 0.9 and 0.4, sample 2 with 0.6, sample 0 of another question without a witness, and one
    without a step."""
    lost = dataclasses.replace(step_turn(0.0), witness=None)
    return [
        credit_episode(0, True, [step_turn(1.0)]),
        credit_episode(1, False, [step_turn(0.9), step_turn(0.4), RecordedTurn(text="answer")]),
        credit_episode(2, False, [step_turn(0.6)]),
        credit_episode(0, False, [lost], prompt=1),
        credit_episode(1, False, [RecordedTurn(text="answer")], prompt=1),
    ]


def test_credit_of_recorded_episodes():
    """4 failing steps, 4 failing trajectories. At 0.5: 0.9 and 0.6 are near, in two trajectories; at 0.7 only 0.9."""
    rows = {row["threshold"]: row for row in misplaced.table(recorded_credit(), (0.3, 0.5, 0.7, 1.0))}
    assert [rows[t]["correctable_actions"] for t in (0.3, 0.5, 0.7, 1.0)] == [0.75, 0.5, 0.25, 0.0]
    assert [rows[t]["correctable_trajectories"] for t in (0.3, 0.5, 0.7, 1.0)] == [0.5, 0.5, 0.25, 0.0]


def test_credit_command(tmp_path, capsys):
    for step in (1, 20):
        found = [dataclasses.replace(episode, step=step) for episode in recorded_credit()]
        records.save(tmp_path / "episodes" / f"step_{step:06d}.npz", found)
    report.main(["credit", str(tmp_path)])
    assert "10 episodes of 2 recorded steps, 2 of them right" in capsys.readouterr().out
    written = json.loads((tmp_path / "credit.json").read_text())
    (at,) = [row for row in written["all"] if row["threshold"] == 0.7]
    assert (at["actions"], at["failing_actions"]) == (2, 8)
    assert sorted(written["steps"]) == ["1", "20"]
    picture(tmp_path / "credit.png")


def test_credit_needs_similarities():
    unknown = dataclasses.replace(step_turn(0.0), slot=-1, witness=None)
    with pytest.raises(UserError, match="without TAPO's similarities"):
        misplaced.table([credit_episode(0, False, [unknown])])
