"""Whole runs: what they leave, that they go on exactly where they were killed, several processes, bad input."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import docs_tables
import numpy as np
import pytest
import tiny_run

from tapo_jax import metrics, records, train
from tapo_jax.config import UserError
from tapo_jax.models import hf

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run8(model, tmp_path_factory) -> Path:
    """The folder of a run of four steps on eight devices, every shape compiled before the first step."""
    workdir = tmp_path_factory.mktemp("run8")
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.patch(patch.setattr)
        train.train(tiny_run.config(model, train__warm_up=True, log__episodes_every=1), workdir)
    return workdir


@pytest.fixture
def start(model):
    """A run in a process of its own; what it prints goes to WORKDIR.log. What still runs after the test is ended."""
    started = []

    def run(workdir: Path, *fields: str, devices: int = 1, **environment: str) -> subprocess.Popen:
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        command = [sys.executable, str(ROOT / "tests" / "tiny_run.py"), str(workdir), str(model), *fields]
        with open(f"{workdir}.log", "a") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen, workdir: Path, code: int = 0) -> str:
    """The run's output, once it has ended as expected."""
    process.wait(timeout=900)
    printed = Path(f"{workdir}.log").read_text()
    assert process.returncode == code, printed[-3000:]
    return printed


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Until the run has written the line of a step."""
    while not any(line["step"] >= step for line in records.read_metrics(workdir / "metrics.jsonl")):
        assert process.poll() is None, Path(f"{workdir}.log").read_text()[-3000:]
        time.sleep(0.01)


def repeatable(workdir: Path) -> list[dict]:
    """The metrics of a run without those that depend on the machine's mood."""
    lines = records.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]


def test_a_run_writes_a_line_for_every_step_with_all_diagnostics(run8):
    lines = records.read_metrics(run8 / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert {"eval/accuracy", "time/eval"} <= lines[0].keys() and "eval/accuracy" in lines[-1]
    for line in lines[1:]:
        assert {
            "reward/mean",
            "reward/accuracy",
            "reward/format",
            "loss/policy",
            "loss/entropy",
            "tools/calls",
        } <= line.keys()
        assert {
            "tapo/correctable_actions",
            "tapo/corrected_actions",
            "tapo/mean_compensation",
            "tapo/witnesses",
        } <= line.keys()
        times = [
            "time/" + name
            for name in ("step", "rollout", "tool_wait", "prefill", "decode", "logprobs", "tapo", "update")
        ]
        assert all(line[name] >= 0 for name in times)
        assert all(np.isfinite(value) for value in line.values())
        # The trainer sees the tokens and positions that the sampler saw: else their log-probabilities would differ.
        assert line["loss/sampler_logp_difference"] < 1e-4
        assert line["optimizer/skipped"] == 0
    assert sum(line["tapo/corrected_actions"] for line in lines[1:]) > 0


def test_the_page_of_metrics_has_every_metric_of_a_run_and_no_other(run8):
    """Both ways: what a run writes is in docs/metrics.md, and what the page says that every step (or every step with an
    evaluation, or with an importance cap) has is written."""
    lines = records.read_metrics(run8 / "metrics.jsonl")
    assert docs_tables.undocumented(set().union(*lines) - {"step"}) == []
    assert docs_tables.missing(set(lines[1]), "") == []
    for condition in ("a step with an evaluation", "`algorithm.importance_cap` is set", "the built-in rewards"):
        assert docs_tables.missing(set(lines[-1]), condition) == []


def test_after_warm_up_no_step_compiles_anything(run8):
    assert [line["perf/compiles"] for line in records.read_metrics(run8 / "metrics.jsonl")[1:]] == [0, 0, 0, 0]


def test_a_run_leaves_a_model_directory_a_curve_and_a_page(run8, model):
    trained, config = hf.load(run8 / "export")
    before, _ = hf.load(model)
    assert config == before.config
    assert not np.array_equal(trained.embedding[...], before.embedding[...])
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (run8 / "export" / name).exists()
    assert (run8 / "curve.png").stat().st_size > 0 and (run8 / "episodes.html").stat().st_size > 0
    assert json.loads((run8 / "config.json").read_text())["algorithm"]["loss"] == "grpo"
    assert sorted(path.name for path in (run8 / "checkpoints").iterdir()) == ["2", "4"]


def test_recorded_episodes_show_what_tapo_did(run8):
    """Every corrected step is a failure's, got closer to 0, and names the witness: a success's step of the same group
    and tool."""
    corrected = 0
    for step in range(1, 5):
        episodes = records.load(run8 / "episodes" / f"step_{step:06d}.npz")
        assert [(e.prompt, e.sample) for e in episodes] == [(p, g) for p in range(4) for g in range(4)]
        by_place = {(e.prompt, e.sample): e for e in episodes}
        for episode in episodes:
            for turn in episode.turns:
                assert turn.adv_before == episode.advantage
                if not turn.corrected:
                    assert turn.adv_after == pytest.approx(turn.adv_before, abs=1e-6)
                    continue
                corrected += 1
                assert not episode.success and turn.adv_before < turn.adv_after <= 0
                prompt, sample, slot = turn.witness
                witness = by_place[prompt, sample]
                assert prompt == episode.prompt and witness.success
                assert [t.call_name for t in witness.turns if t.slot == slot] == [turn.call_name]
    assert corrected > 0


def test_a_run_that_is_killed_and_stopped_ends_with_the_metrics_of_one_that_was_not(start, tmp_path):
    """SIGKILL after step 1 (before any checkpoint), SIGKILL after step 3 (one step after a checkpoint), SIGTERM after
    step 4, then to the end. SIGTERM saves the step that it interrupts and exits 0."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(whole, "total_steps=6"), whole)
    for step, number in ((1, signal.SIGKILL), (3, signal.SIGKILL), (4, signal.SIGTERM)):
        process = start(broken, "total_steps=6")
        wait_for_step(process, broken, step)
        process.send_signal(number)
        finish(process, broken, 0 if number == signal.SIGTERM else -number)
    last = repeatable(broken)[-1]["step"]
    assert last < 6 and (broken / "checkpoints" / str(last)).is_dir()
    printed = finish(start(broken, "total_steps=6"), broken)
    assert f"resumed after step {last}" in printed
    want, got = repeatable(whole), repeatable(broken)
    assert [line["step"] for line in got] == [0, 1, 2, 3, 4, 5, 6]
    assert got == want
    for name in ("model.safetensors", "config.json"):
        assert (whole / "export" / name).read_bytes() == (broken / "export" / name).read_bytes()


def test_two_processes_train_like_one_with_as_many_devices(start, run8, tmp_path):
    """Four devices each. Losses to float tolerance; what was sampled must be the same, so counts are equal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workdir, processes = tmp_path / "two", []
    for rank in ("0", "1"):
        environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": rank}
        processes.append(start(workdir, "total_steps=4", devices=4, **environment))
    for process in processes:
        finish(process, workdir)
    one, two = repeatable(run8), repeatable(workdir)
    assert [line["step"] for line in two] == [0, 1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-5), (a["step"], name)
    trained, _ = hf.load(workdir / "export")
    np.testing.assert_allclose(trained.embedding[...], hf.load(run8 / "export")[0].embedding[...], atol=2e-4)


def test_updates_that_are_not_finite_end_the_run_with_a_hint(model, tmp_path, monkeypatch):
    """A learning rate of 1e38 makes the weights infinite in the first update; every later one is skipped."""
    tiny_run.patch(monkeypatch.setattr)
    config = tiny_run.config(
        model, optimizer__lr=1e38, train__max_nonfinite=2, eval__at_start=False, mesh__data=1, mesh__fsdp=8
    )
    with pytest.raises(UserError, match=r"not finite for \d updates in a row.*metrics\.jsonl.*optimizer\.lr"):
        train.train(config, tmp_path)
    last = records.read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["optimizer/skipped_in_a_row"] >= 2 and last["loss/total"] is None  # NaN is null, not a number
    assert (tmp_path / "episodes" / f"step_{last['step']:06d}.npz").exists()


def test_a_damaged_checkpoint_is_one_sentence(model, run8, tmp_path, monkeypatch):
    tiny_run.patch(monkeypatch.setattr)
    shutil.copytree(run8, tmp_path / "run")
    for array in (tmp_path / "run" / "checkpoints" / "4" / "state").rglob("d/*"):
        array.write_bytes(array.read_bytes()[: array.stat().st_size // 2])
    with pytest.raises(
        UserError, match=r"checkpoints/4 cannot be read .* delete that folder, and the run goes on from step 2"
    ):
        train.train(tiny_run.config(model), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.prompts_per_step": 3}, r"data\.prompts_per_step 3 .* mesh splits it 8 ways"),
        ({"train.micro_batches": 3}, r"train\.micro_batches 3"),
        ({"train.updates_per_batch": 4}, r"train\.updates_per_batch 4"),
        ({"mesh.tensor": 3}, r"mesh .*tensor=3 does not fit 8 devices"),
        ({"rollout.slots": 6}, r"rollout\.slots is 6"),
        ({"algorithm.loss": "ppo"}, r"algorithm\.loss is 'ppo': choose one of grpo"),
        ({"algorithm.estimator": "gae"}, r"algorithm\.estimator is 'gae'"),
        ({"tapo.cluster": "kmeans"}, r"tapo\.cluster is 'kmeans'"),
        ({"optimizer.schedule": "step"}, r"optimizer\.schedule is 'step'"),
        ({"rollout.group_size": 0}, r"rollout\.group_size is 0"),
        ({"tapo.max_tool_steps": 2}, r"tapo\.max_tool_steps is 2 and rollout\.max_turns is 3"),
        ({"model.path": "/nowhere"}, r"model\.path is '/nowhere', which is no directory"),
        ({"model.remat": "some"}, r"model\.remat is 'some'"),
    ],
)
def test_bad_fields_are_one_sentence_before_anything_is_compiled(model, tmp_path, monkeypatch, fields, message):
    tiny_run.patch(monkeypatch.setattr)
    before = metrics.compile_count()
    with pytest.raises(UserError, match=message) as raised:
        train.train(tiny_run.config(model, **fields), tmp_path)
    assert "\n" not in str(raised.value)
    assert metrics.compile_count() - before < 10  # loading a model converts a few arrays; no program of a run


def test_a_model_directory_without_a_tokenizer_is_one_sentence(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        train.train(tiny_run.config(tmp_path / "model"), tmp_path / "run")


def test_a_run_of_another_seed_does_not_go_on(model, run8, tmp_path, monkeypatch):
    tiny_run.patch(monkeypatch.setattr)
    shutil.copytree(run8, tmp_path / "run")
    with pytest.raises(UserError, match="seed is 1 but the run in this --workdir began with 0"):
        train.train(tiny_run.config(model, seed=1), tmp_path / "run")


def test_the_program_ends_with_one_line_and_code_1(tmp_path):
    """launch/train.py itself, on a mistake in the config's argument and on a field that does not exist."""
    for argument, message in (
        (["--config=configs/tapo_grpo.py:setps=3"], "error: Unknown config argument 'setps'"),
        (
            ["--config=configs/tapo_grpo.py:test", "--config.tapo.bta=1"],
            "error: A --config.… flag does not fit the config",
        ),
        (["--config=configs/tapo_grpo.py:test", "--config.model.path=/nowhere"], "error: model.path is '/nowhere'"),
    ):
        command = [sys.executable, "launch/train.py", *argument, f"--workdir={tmp_path}"]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 1
        assert ended.stderr.strip().splitlines()[-1].startswith(message)
        assert "Traceback" not in ended.stderr
