"""Damaged files, two runs in one place, and hosts: each ends with one sentence, or the run goes on and says so."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny_run

from tapo_jax import metrics, processes, records, train, viewer
from tapo_jax.config import UserError
from tapo_jax.report import __main__ as report
from tapo_jax.report import results
from tapo_jax.sweep import runs

ROOT = Path(__file__).parents[1]
STEP = '{"step": 1, "reward/mean": 0.5, "time/step": 1.0}\n'


# Files.


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"null\n", "it is no step with its numbers"),
        (b"\xff\xfe\n", "can't decode byte 0xff"),
        (b'{"step": 1, "re\n', "Unterminated string"),
        (b'{"step": "1"}\n', "it is no step with its numbers"),
        (b'{"step": 2, "reward/mean": "much"}\n', "reward/mean is no number"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_named_and_the_others_are_kept(tmp_path, capsys, bad, says):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(bad + STEP.encode() + b'{"step": 2}\n{"step": 3, "cut')
    assert [line["step"] for line in records.read_metrics(path)] == [1, 2]
    said = capsys.readouterr().err
    assert f"{path}, line 1 is left out: " in said and says in said and "line 4" not in said
    before = path.read_bytes()
    metrics.MetricWriter(tmp_path, total_steps=3, resumed_step=1, tensorboard=False).close()
    assert path.read_text() == STEP
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == before
    assert "line 1 is left out" in capsys.readouterr().out


def test_a_curve_of_a_run_with_a_damaged_line_and_no_parts_of_its_time(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"null\n" + STEP.encode())
    report.main(["curve", str(tmp_path)])
    assert (tmp_path / "curve.png").stat().st_size > 0


def damaged(path: Path, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "foreign":
        np.savez(path, other=np.zeros(3))
    elif kind == "other json":
        np.savez(path, episodes=np.frombuffer(b'[{"step": 1}]', np.uint8))
    elif kind == "cut":
        records.save(path, [])
        path.write_bytes(path.read_bytes()[:60])
    else:
        path.write_bytes(b"" if kind == "empty" else b"\x80 no archive")
    return path


@pytest.mark.parametrize("kind", ["empty", "cut", "foreign", "other json", "noise"])
def test_a_damaged_recording_is_named_and_does_not_end_a_finished_run(tmp_path, kind):
    path = damaged(tmp_path / "episodes" / "step_000001.npz", kind)
    for command in ("credit", "truth", "page"):
        with pytest.raises(
            UserError, match=r"The recording .*step_000001\.npz cannot be read .*remove the damaged file"
        ):
            report.main([command, str(tmp_path)])
    told = []
    viewer.write_page([path], tmp_path / "page.html", told=told.append)
    assert (tmp_path / "page.html").exists() and len(told) == 1 and "step_000001.npz" in told[0]


@pytest.mark.parametrize("data", [b"", b'{"evals": [[1', b"null", b"[]", b"\xff", b"{}", b'{"evals": 3}'])
def test_damaged_files_of_a_sweep_are_named(tmp_path, data):
    folder = tmp_path / "row" / "seed_0"
    folder.mkdir(parents=True)
    run = runs.Run("row", 0, folder, folder, (), {}, "model")
    (folder / "result.json").write_bytes(data)
    for read in (lambda: results.load(tmp_path), lambda: runs.check_same(run)):
        with pytest.raises(UserError, match=r"result\.json is damaged"):
            read()
    (folder / "result.json").unlink()
    (folder / "asked.json").write_bytes(data)
    with pytest.raises(UserError, match=r"asked\.json is damaged"):
        runs.check_same(run)
    if data not in (b"{}", b'{"evals": 3}'):
        (folder / "failed.json").write_bytes(data)
        with pytest.raises(UserError, match=r"failed\.json is damaged"):
            results.load(tmp_path)
        (tmp_path / "sweep.json").write_bytes(data)
        with pytest.raises(UserError, match=r"sweep\.json is damaged"):
            runs.save_plan(tmp_path, {}, [], [])


@pytest.mark.parametrize("seeds", ["4-0", "", "1,", "-1", "0-²", "0-1-2"])
def test_seeds_that_are_none_are_refused(seeds):
    with pytest.raises(UserError, match="--seeds is"):
        runs.parse_seeds(seeds)


# Runs.


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


def test_a_second_run_in_one_folder_is_refused_and_a_dead_one_holds_nothing(model, tmp_path):
    with open(tmp_path / "train.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another run is working in .*: give another --workdir"):
            train.train(tiny_run.config(model), tmp_path)
    program = (
        "import os, pathlib, sys\nfrom tapo_jax import processes\n"
        "with processes.alone_in(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=env, check=False, capture_output=True)
    with processes.alone_in(tmp_path), pytest.raises(UserError), processes.alone_in(tmp_path):
        pass


def test_a_run_without_a_folder_and_a_disk_without_room_are_one_sentence(model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--workdir is empty"):
        train.train(tiny_run.config(model), "")
    with pytest.raises(UserError, match="'gs://bucket/run', an address: mount that bucket"):
        train.train(tiny_run.config(model), "gs://bucket/run")

    def full(config, workdir, at_end):
        raise OSError(28, "No space left on device", str(workdir / "episodes"))

    monkeypatch.setattr(train, "train_alone", full)
    with pytest.raises(
        UserError, match=r"No space left on device.*make room on the disk and run the same command again"
    ):
        train.train(tiny_run.config(model), tmp_path)


@pytest.mark.parametrize("bytes_", [b"", b'{"seed": ', b"null", b"[1]", b"\xff"])
def test_a_damaged_config_of_a_run_is_named_and_written_again(model, tmp_path, capsys, bytes_):
    config = tiny_run.config(model)
    writer = metrics.MetricWriter(tmp_path, total_steps=3, resumed_step=1, tensorboard=False)
    (tmp_path / "config.json").write_bytes(bytes_)
    train.write_config(config, tmp_path, 1, writer)
    said = capsys.readouterr().out
    assert "config.json is damaged" in said and "it is written again" in said and "resumed after step 1" in said
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == config.seed
    config.optimizer.lr = 0.5
    train.write_config(config, tmp_path, 1, writer)
    assert "changed since then: optimizer.lr" in capsys.readouterr().out
    writer.close()


def test_a_run_in_which_nothing_is_written_ends_with_a_sentence(model):
    config = tiny_run.config(model)
    train.raise_if_silent(0, 60, 60, config)
    train.raise_if_silent(1, 5, 60, config)
    for silent, step, total in ((3, 5, 60), (2, 2, 2), (1, 1, 1)):
        with pytest.raises(UserError, match=r"could not write a single token.*rollout\.max_length is 112"):
            train.raise_if_silent(silent, step, total, config)


@pytest.mark.parametrize("values", [("two", "0"), ("2", "one"), ("2", "2"), ("2", "-1"), ("²", "0")])
def test_numbers_of_processes_that_are_none_are_one_sentence(monkeypatch, values):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", values[0])
    monkeypatch.setenv("JAX_PROCESS_ID", values[1])
    with pytest.raises(UserError, match=f"JAX_NUM_PROCESSES '{values[0]}' and JAX_PROCESS_ID '{values[1]}'"):
        processes.join()


PREPARE = """
import sys
from tapo_jax.atlas.dataset import prepare
from tapo_jax.atlas.play import Settings
print(len(prepare(sys.argv[1], settings=Settings(size=64), seed=0, sizes=(24, 4)).encoded("train")))
"""


def test_two_first_runs_on_an_empty_cache_both_find_the_questions(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "cache")]
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / "lock", "w") as lock:  # so that both wait for it at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        with pytest.raises(subprocess.TimeoutExpired):
            started[0].wait(8)
    assert [one.communicate(timeout=120)[0].split()[-1] for one in started] == ["24", "24"]


# Pods.

GCLOUD = """#!/usr/bin/env bash
# Stands in for gcloud: the host is the folder HOST.
set -e
action=$4
shift 4
case $action in
  scp) cp "$1" "$HOST/${2#*:}" ;;
  ssh) for a in "$@"; do case $a in --command=*) cd "$HOST" && HOME=$HOST bash -c "${a#--command=}" ;; esac; done ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """A small checkout, an empty host, and the script between them; a call of it returns how it ended."""
    repo, host, programs = (tmp_path / name for name in ("repo", "host", "bin"))
    for folder in (repo / "launch", repo / "tapo_jax", host / "venv" / "bin", programs):
        folder.mkdir(parents=True)
    (repo / "launch" / "tpu_pod.sh").write_text((ROOT / "launch" / "tpu_pod.sh").read_text())
    for path, text in ((programs / "gcloud", GCLOUD), (programs / "uv", "#!/bin/sh\n")):
        path.write_text(text)
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "HOST": str(host), "PYTHONPATH": str(ROOT)}

    def call(*words: str) -> subprocess.CompletedProcess:
        command = ["bash", str(repo / "launch" / "tpu_pod.sh"), *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)

    call.repo, call.host = repo, host
    return call


def test_a_push_brings_what_there_is_and_removes_what_it_brought_before(pod):
    repo, host = pod.repo, pod.host
    for action in ("run", "search"):
        early = pod(action, "name", "--workdir=x")
        assert early.returncode != 0 and "push it first" in early.stderr
    (host / "venv" / "bin" / "python").symlink_to("/bin/true")
    (repo / "tapo_jax" / "old.py").write_text("")
    (repo / "tapo_jax" / "kept.py").write_text("")
    git = ["git", "-C", str(repo)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    assert pod("push", "name").returncode == 0
    (host / "tapo_jax" / "run").mkdir()
    (host / "tapo_jax" / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    (repo / "tapo_jax" / "old.py").rename(repo / "tapo_jax" / "new name.py")
    found = pod("push", "name")
    assert found.returncode == 0, found.stderr
    brought = sorted(path.name for path in (host / "tapo_jax" / "tapo_jax").iterdir())
    assert brought == ["kept.py", "new name.py"] and (host / "tapo_jax" / "run" / "metrics.jsonl").exists()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", verify=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_search_service_of_a_pod_runs_on_its_first_host(pod, tmp_path):
    (pod.host / "venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (pod.host / "venv" / "bin" / "python").chmod(0o755)
    (pod.host / "tapo_jax" / "launch").mkdir(parents=True)
    script = "launch/retrieval_server.py"
    (pod.host / "tapo_jax" / script).write_text((ROOT / script).read_text())
    corpus = tmp_path / "a corpus.jsonl"
    wrong = pod("search", "name", f"--corpus={corpus}", "--port=0")
    assert wrong.returncode != 0 and "a corpus.jsonl', which is no file" in wrong.stderr
    corpus.write_text('{"contents": "Lima"}')
    started = pod("search", "name", f"--corpus={corpus}", "--port=0")
    assert started.returncode == 0, started.stderr
    number = int((pod.host / "search.pid").read_text())
    try:
        address = started.stdout.strip()  # that of this machine in its network, as another host would ask it
        reply = httpx.post(f"{address}/retrieve", json={"queries": ["lima"]}, verify=False)
        assert reply.json() == {"result": [[{"contents": "Lima"}]]}
        again = pod("search", "name", f"--corpus={corpus}", "--port=0")
        assert again.returncode != 0 and "stop-search it first" in again.stderr
        assert pod("stop-search", "name").returncode == 0
        deadline = time.monotonic() + 60
        while answers(address) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not answers(address)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
