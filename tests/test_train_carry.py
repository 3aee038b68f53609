"""Whole runs that carry groups over, and that are killed or stopped in the middle of a rollout."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import docs_tables
import numpy as np
import pytest
import test_checkpoints
from test_train import finish, model, repeatable, start  # noqa: F401 - fixtures

from tapo_jax import sharding
from tapo_jax.config import UserError
from tapo_jax.learn.checkpoints import Checkpoints

CARRY = ("rollout.carry=2", "rollout.max_staleness=2", "total_steps=4", "eval.at_start=False")
COUNTED = ("rollout/", "tools/", "reward/", "data/", "tapo/")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """What starts of the same program need to compile it once."""
    folder = str(tmp_path_factory.mktemp("cache"))
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory, cache) -> Path:  # noqa: F811
    """The folder of a run that nothing disturbs."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", model, cache, CARRY)


def undisturbed(workdir: Path, model: Path, cache: dict[str, str], fields: tuple[str, ...]) -> Path:  # noqa: F811
    """Run to the end in a process of its own with one device. Returns the folder."""
    root = Path(__file__).parents[1]
    env = os.environ | cache | {"JAX_NUM_CPU_DEVICES": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(root / "tests" / "tiny_run.py"), str(workdir), str(model), *fields]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=900)
    return workdir


def test_a_run_that_carries_has_its_metrics_and_they_are_documented(whole):
    lines = repeatable(whole)
    assert docs_tables.undocumented(set().union(*lines) - {"step"}) == []
    assert docs_tables.missing(set(lines[0]), "`rollout.carry > 0`") == []
    assert [line["rollout/carried"] for line in lines][-1] == 0
    assert sum(line["rollout/carried"] for line in lines) > 0 and sum(line["rollout/recomputed"] for line in lines) > 0
    assert 0 < max(line["rollout/staleness_max"] for line in lines) <= 2
    for line in lines:
        assert 0 <= line["rollout/idle"] < 1 and line["loss/weight_clip_fraction"] < 0.5
    assert lines[0]["loss/sampler_logp_difference"] < 1e-4  # what the first step trains on, its own policy drew


def test_a_run_killed_in_rollouts_ends_with_the_metrics_of_one_that_was_not(whole, start, cache, tmp_path):  # noqa: F811
    """SIGKILL in the second rollout (after no checkpoint), and in one that began with carried groups and a checkpoint
    that holds them."""
    broken = tmp_path / "broken"
    for at in (14, 24):
        finish(start(broken, *CARRY, f"signal={int(signal.SIGKILL)}", f"round={at}", **cache), broken, -signal.SIGKILL)
    finish(start(broken, *CARRY, **cache), broken)  # from a checkpoint if the kill has not come before its end
    assert repeatable(broken) == repeatable(whole)
    name = "model.safetensors"
    assert (whole / "export" / name).read_bytes() == (broken / "export" / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("at", [6, 24])
def test_sigterm_in_a_rollout_keeps_what_is_in_flight_and_changes_no_metric(whole, start, cache, tmp_path, at):  # noqa: F811
    """The slots are so small that they are saved too, so nothing is read again and every bit is the same."""
    stopped = tmp_path / "stopped"
    printed = finish(start(stopped, *CARRY, f"signal={int(signal.SIGTERM)}", f"round={at}", **cache), stopped)
    assert "the same command goes on from there" in printed and "Traceback" not in printed
    steps = [path.name for path in (stopped / "checkpoints").iterdir() if path.name.isdigit()]
    kept = [*(stopped / "checkpoints").glob("*/flight"), *(stopped / "in_flight").glob("*/flight")]
    assert steps and kept
    finish(start(stopped, *CARRY, **cache), stopped)
    assert repeatable(stopped) == repeatable(whole)


def close(got: list[dict], want: list[dict]) -> None:
    """Assert that the metrics are the same up to rounding, and the same where they only count."""
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            tolerance = 0 if name.startswith(COUNTED) else 2e-3
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


@pytest.mark.nightly
def test_sigterm_in_an_evaluation_leaves_it_to_the_next_start(start, cache, tmp_path):  # noqa: F811
    """The step before it is trained and saved, its line waits for the numbers of the evaluation."""
    one, two = tmp_path / "one", tmp_path / "two"
    fields = ("total_steps=1", "eval.at_start=False")
    finish(start(one, *fields, **cache), one)
    printed = finish(start(two, *fields, f"signal={int(signal.SIGTERM)}", "round=0", **cache), two)
    assert "stopped after step 1" in printed and repeatable(two) == []
    finish(start(two, *fields, **cache), two)
    assert repeatable(two) == repeatable(one)


@pytest.mark.nightly
def test_saves_by_the_clock_are_made_within_rollouts(start, cache, tmp_path):  # noqa: F811
    """So often that every round is saved: the run ends as usual, and one that is killed goes on from the last save."""
    saving = tmp_path / "saving"
    fields = ("total_steps=2", "eval.at_start=False", "eval.at_end=False", "checkpoint.minutes=1e-5")
    killed = (*fields, f"signal={int(signal.SIGKILL)}", "round=9")
    finish(start(saving, *killed, **cache), saving, -signal.SIGKILL)
    assert (saving / "checkpoints" / "0" / "flight").is_dir()
    printed = finish(start(saving, *fields, **cache), saving)
    assert "resumed after step 0" in printed
    plain = tmp_path / "plain"
    finish(start(plain, *fields[:-1], **cache), plain)
    close(repeatable(saving), repeatable(plain))


@pytest.mark.nightly
def test_two_processes_carry_and_stop_together(start, cache, tmp_path):  # noqa: F811
    """One of them gets the signal; both end, and both go on with their own conversations."""
    workdir, fields = tmp_path / "two", (*CARRY, "eval.at_end=False")

    def both(*extra: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        started = []
        for rank in ("0", "1"):
            environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": rank}
            more = extra if rank == "1" else ()
            started.append(start(workdir, *fields, *more, devices=2, **environment, **cache))
        for process in started:
            finish(process, workdir)

    both(f"signal={int(signal.SIGTERM)}", "round=6")
    assert repeatable(workdir) == [] or repeatable(workdir)[-1]["step"] < 4
    both()
    lines = repeatable(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["rollout/carried"] for line in lines) > 0 and lines[-1]["rollout/carried"] == 0


@pytest.mark.nightly
def test_twenty_kills_at_random_moments_change_nothing(whole, start, cache, tmp_path):  # noqa: F811
    broken, rng = tmp_path / "broken", np.random.default_rng(0)
    for _ in range(20):
        process = start(broken, *CARRY, **cache)
        try:
            process.wait(timeout=float(rng.uniform(5, 60)))
        except Exception:  # it still runs
            process.kill()
            process.wait()
    finish(start(broken, *CARRY, **cache), broken)
    assert repeatable(broken) == repeatable(whole)


def test_what_is_in_flight_of_another_mesh_is_one_sentence(tmp_path):
    state = test_checkpoints.make_state()
    made = Checkpoints(tmp_path / "checkpoints", keep=2, mesh=sharding.make_mesh(4, 2, 1))
    made.save(1, state, data={"a": 1}, seed=0, flight=b"one")
    made.save_flight(1, state, data={"a": 2}, seed=0, flight=b"another, longer")
    made.close()
    again = Checkpoints(tmp_path / "checkpoints", keep=2, mesh=sharding.make_mesh(4, 2, 1))
    _, data, run = again.restore(1, state)
    assert data == {"a": 1} and again.restore_flight(run) == (b"another, longer", {"a": 2}, None)
    assert again.restore_flight(run | {"params_fingerprint": 0}) == (b"one", None, None)  # the newer: another state
    other = Checkpoints(tmp_path / "checkpoints", keep=2, mesh=sharding.make_mesh(2, 2, 2))
    with pytest.raises(UserError, match="split 8 ways by the mesh .* now split 4 ways"):
        other.restore_flight(run)
