"""Sweeps: which runs there are, that nothing is mixed or left out, and what the processes do."""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
import tiny_run
from rich.console import Console

from tapo_jax import records
from tapo_jax.config import UserError
from tapo_jax.report import __main__ as report
from tapo_jax.report import results, tables
from tapo_jax.sweep import processes
from tapo_jax.sweep import runs as sweep
from tapo_jax.sweep.runs import Run
from tapo_jax.sweep.table import Progress

TESTS = Path(__file__).parent

# A program that leaves what a run leaves: python -c FAKE NAME --workdir=DIR. Its arguments and cores go to `noted`.
FAKE = """
import json, os, pathlib, signal, sys, time
name, workdir = sys.argv[1], pathlib.Path(sys.argv[2].removeprefix("--workdir="))
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
(workdir / "noted").write_text(json.dumps([time.time(), cores]))
if name == "bad":
    print("some output"); sys.exit("error: The disk is full.")
if name == "shot":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "slow":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)
(workdir / "config.json").write_text(json.dumps({"total_steps": 2}))
lines = [{"step": step, "time/step": 1.0, "eval/accuracy": 0.1 * step} for step in range(3)]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""


def fake(root: Path, name: str, seed: int = 0, **asked) -> Run:
    command = (sys.executable, "-c", FAKE, name)
    places = root / "out" / name / f"seed_{seed}", root / "runs" / name / f"seed_{seed}"
    return Run(name, seed, *places, command, {"total_steps": 2, "seed": seed} | asked, "model")


def work(runs, root: Path, *, jobs=1, watch=lambda run, state: None) -> list[str]:
    processes.work(runs, jobs=jobs, cache=root / "compiled", watch=watch)
    return [sweep.state(run) for run in runs]


def noted(run: Run) -> list:
    return json.loads((run.workdir / "noted").read_text())


# What there is to run.


def test_seeds_and_sweeps():
    assert sweep.parse_seeds("0-2,7,1") == [0, 1, 2, 7]
    with pytest.raises(UserError, match=r"--seeds is '0\.\.3': give numbers and ranges"):
        sweep.parse_seeds("0..3")
    sweeps, rows = {"a": ("x", "y"), "b": ("x", "z")}, dict.fromkeys("xyzw")
    assert sweep.parse_sweeps("b,a", sweeps, rows) == ["x", "z", "y"]
    assert sweep.parse_sweeps("w,a,x", sweeps, rows) == ["w", "x", "y"]
    with pytest.raises(UserError, match="--sweep is 'c': the sweeps of configs/ablations.py are a, b"):
        sweep.parse_sweeps("a,c", {"a": (), "b": ()}, {"d": None})


def test_a_plan_grows_with_every_sweep_into_the_same_folder(tmp_path):
    partners = {"a": ("", ""), "b": ("a", ""), "c": ("a", "b")}
    rows = {row: {"base": base, "reference": reference} for row, (base, reference) in partners.items()}
    sweep.save_plan(tmp_path, rows, ["a", "c"], [0, 1])
    assert json.loads((tmp_path / "sweep.json").read_text())["reference"] == {}
    sweep.save_plan(tmp_path, rows, ["b"], [1])
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "rows": ["a", "b", "c"],
        "seeds": {"a": [0, 1], "b": [1], "c": [0, 1]},
        "base": {"b": "a", "c": "a"},
        "reference": {"c": "b"},
    }


def test_the_fingerprint_of_a_model_is_that_of_its_files(tmp_path):
    (tmp_path / "config.json").write_text("1")
    before = sweep.fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("2")
    assert sweep.fingerprint(tmp_path) != before


@pytest.mark.parametrize("name", ["result.json", "failed.json", "asked.json"])
def test_a_folder_of_another_config_or_model_is_refused(tmp_path, name):
    run = fake(tmp_path, "good", beta=0.4, hops=[1, 2])
    path = (run.workdir if name == "asked.json" else run.result) / name
    sweep.save(path, {"config": {"beta": 0.4, "hops": [1, 2], "gone": 1}, "model": "model"})
    sweep.check_same(run)
    sweep.save(path, {"config": {"beta": 0.8, "hops": [1, 2]}, "model": "model"})
    with pytest.raises(UserError, match=r"is of a run with beta 0\.8, and 0\.4 is asked for: give another --out"):
        sweep.check_same(run)
    sweep.save(path, {"config": {"beta": 0.4}, "model": "other"})
    with pytest.raises(UserError, match="began with another model"):
        sweep.check_same(run)


# Processes.


def test_runs_end_in_order_and_failures_are_kept(tmp_path):
    runs = [fake(tmp_path, name, seed) for seed in (0, 1) for name in ("good", "bad")] + [fake(tmp_path, "shot")]
    seen = []
    assert work(runs, tmp_path, watch=lambda run, state: seen.append((run.row, run.seed, state))) == [
        "done", "failed", "done", "failed", "failed"
    ]  # fmt: skip
    started = [noted(run)[0] for run in runs]
    assert started == sorted(started)
    assert [entry for entry in seen if entry[2] != "running"] == [
        ("good", 0, "done"), ("bad", 0, "failed"), ("good", 1, "done"), ("bad", 1, "failed"), ("shot", 0, "failed")
    ]  # fmt: skip
    kept = results.load(tmp_path / "out")
    assert kept.results["good"][1].evals[-1] == (2.0, 3.0, 0.2)
    assert ("bad", 0, "The disk is full.") in kept.failed
    (shot,) = [sentence for row, _, sentence in kept.failed if row == "shot"]
    assert shot.startswith("The process was ended by SIGKILL")


def test_finished_and_failed_runs_are_left_alone(tmp_path):
    runs = [fake(tmp_path, "good"), fake(tmp_path, "bad")]
    work(runs, tmp_path)
    before = [noted(run) for run in runs]
    assert work(runs, tmp_path) == ["done", "failed"]
    assert [noted(run) for run in runs] == before
    (runs[1].result / "failed.json").unlink()
    work(runs, tmp_path)
    assert noted(runs[1]) != before[1]


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path):
    run, seen = fake(tmp_path, "good"), []
    run.workdir.mkdir(parents=True)
    with open(run.workdir / "lock", "w") as lock:
        processes.fcntl.flock(lock, processes.fcntl.LOCK_EX)
        assert work([run], tmp_path, watch=lambda run, state: seen.append(state)) == ["waiting"]
    assert seen == ["elsewhere"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are dealt out on Linux")
def test_jobs_run_at_a_time_on_their_share_of_the_cores(tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    runs = [fake(tmp_path, "good", seed) for seed in range(4)]
    assert work(runs, tmp_path, jobs=2) == ["done"] * 4
    shares = {tuple(noted(run)[1]) for run in runs}
    assert shares <= {tuple(mine[0::2]), tuple(mine[1::2]) or tuple(mine)}
    assert sorted(os.sched_getaffinity(0)) == mine


def test_sigterm_ends_the_children_and_starts_no_other(tmp_path):
    assert threading.current_thread() is threading.main_thread()
    runs, seen = [fake(tmp_path, "slow"), fake(tmp_path, "good")], []

    def watch(run, state):
        seen.append(state)
        if seen == ["running"]:
            while not (run.workdir / "noted").exists():
                time.sleep(0.01)
            time.sleep(0.3)
            signal.raise_signal(signal.SIGTERM)

    began = time.monotonic()
    assert work(runs, tmp_path, watch=watch) == ["waiting", "waiting"]
    assert seen[-1] == "interrupted" and time.monotonic() - began < 30
    assert not (runs[0].result / "failed.json").exists() and not runs[1].workdir.exists()


def test_the_table_shows_every_run(tmp_path):
    runs = [fake(tmp_path, name, seed) for seed in (0, 1) for name in ("good", "bad")]
    console = Console(width=100, record=True, file=io.StringIO())
    with Progress(runs, console) as watch:
        work(runs[:2], tmp_path, watch=watch)
    text = console.export_text()
    assert "good seed 0: 20.0 %" in text and "bad seed 0: failed: The disk is full." in text
    assert "good │ 20.0 %" in text and text.count("waiting") == 2


# Real runs, on the little world of `rollout_world`.

TINY = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
import tiny_run
from tapo_jax.config import run_main
from tapo_jax.train import train
def main(argv):
    tiny_run.patch(setattr)
    train(tiny_run.config(Path({model!r}), **{fields!r}), sys.argv[-1].removeprefix("--workdir="))
sys.argv, argument = sys.argv[:1], sys.argv[-1]
def started(argv):
    sys.argv.append(argument)
    main(argv)
run_main(started, words=True)
"""


def test_a_sweep_that_is_stopped_goes_on_and_ends_with_a_report(tmp_path, monkeypatch):
    """Two rows and one whose checkpoint is damaged; SIGTERM in the first run, then the same again."""
    jax.devices()  # this process keeps its eight
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # one device
    model = tiny_run.write_model(tmp_path / "model")
    runs = []
    for row, fields in {"grpo": {"algorithm__credit": "trajectory"}, "broken": {}, "tapo_grpo": {}}.items():
        fields |= {"total_steps": 3, "eval__at_start": True, "tapo__theta": 0.7, "tapo__alpha_min": 0.25}
        code = TINY.format(tests=str(TESTS), model=str(model), fields=fields)
        places = tmp_path / "out" / row / "seed_0", tmp_path / "runs" / row / "seed_0"
        config = tiny_run.config(model, **fields)
        runs.append(Run(row, 0, *places, (sys.executable, "-c", code), sweep.as_json(config), sweep.fingerprint(model)))
    (runs[1].workdir / "checkpoints" / "1" / "state").mkdir(parents=True)
    (runs[1].workdir / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text("{}")
    rows = {"grpo": {"base": "", "reference": ""}} | {
        row: {"base": "grpo", "reference": ""} for row in ("broken", "tapo_grpo")
    }
    sweep.save_plan(tmp_path / "out", rows, list(rows), [0])

    stopped = []

    def stop(run, state):
        """In the first step, which compiles for seconds."""
        if not stopped and records.read_metrics(run.workdir / "metrics.jsonl"):
            stopped.append(run.row)
            time.sleep(0.2)
            signal.raise_signal(signal.SIGTERM)

    assert work(runs, tmp_path, watch=stop) == ["waiting"] * 3
    assert 0 <= records.read_metrics(runs[0].workdir / "metrics.jsonl")[-1]["step"] < 3
    assert work(runs, tmp_path) == ["done", "failed", "done"]
    log = (runs[0].workdir / "log.txt").read_text()
    assert "resumed after step" in log and "changed since then" not in log
    for run in runs:
        sweep.check_same(run)
    first, last = (json.loads((run.result / "result.json").read_text()) for run in (runs[0], runs[2]))
    assert first["evals"][0] == last["evals"][0]  # the same model on the same questions
    assert first["steps"] == 3 and first["model"] == sweep.fingerprint(model)
    text = tables.write_sweep(tmp_path / "out")
    assert "**Failed:** broken, seed 0: The checkpoint" in text and "| broken | 0 + 1 failed |" in text
    assert "| TAPO improves grpo | **not decided** |" in text
    # Without TAPO the steps are recorded with what they resemble, so that misplaced credit can be counted.
    report.main(["credit", str(runs[0].workdir)])
    turns = [turn for path in report.recordings(runs[0].workdir) for e in records.load(path) for turn in e.turns]
    assert any(turn.slot >= 0 and turn.correctable for turn in turns) and not any(turn.corrected for turn in turns)
    assert all(turn.adv_after == turn.adv_before for turn in turns)
