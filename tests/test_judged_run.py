"""Whole runs with a judge on this machine that is late and wrong-headed for a third of its calls."""

import dataclasses
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recorded
import rollout_world as world
import tiny_run
from test_judge import said, served

from tapo_jax import records, viewer
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.report import misplaced
from tapo_jax.rewards import judge
from tapo_jax.rewards.judged import Scored
from tapo_jax.rollout import episode
from tapo_jax.train import train

ROOT = Path(__file__).parents[1]
KEY = "sk-planted-7f3a"
FAULTS = [(429, {"Retry-After": "0"}, ""), (500, {}, "x"), (200, {}, "garbage")]


def replies(number, body):
    """Answers that end in 4 are never judged, odd ones are right; every third request of the others fails."""
    digit = int(re.search(r"Response: x(\d)", body["messages"][1]["content"][-1]["text"])[1])
    if digit == 4:
        return 400, {}, KEY  # an endpoint that repeats the key
    return FAULTS[number // 3 % 3] if number % 3 == 0 else said("Yes" if digit % 2 else "No")


def read_turn(text):
    parsed = tiny_run.read_turn(text)
    return parsed if parsed.answer is None else dataclasses.replace(parsed, answer=f"x{sum(text.encode()) % 5}")


def planned(tmp_path, url, monkeypatch, **fields):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    tiny_run.patch(monkeypatch.setattr)
    monkeypatch.setattr(episode, "parse_turn", read_turn)
    prompts = [dataclasses.replace(prompt, answers=("nothing that is said",)) for prompt in world.prompts(24)]
    monkeypatch.setattr(sources, "prompts", lambda config, split: prompts)
    asked = {"endpoint": url, "model": "m", "max_failed": 0.9, "cache": str(tmp_path / "cache" / "verdicts.sqlite")}
    fields = {f"reward.judge.{name}": value for name, value in asked.items()} | fields
    config = tiny_run.config(tiny_run.write_model(tmp_path / "model"), **{"total_steps": 3, "log.episodes_every": 1})
    config.update_from_flattened_dict(fields)
    config.eval.update(at_start=False, at_end=True)
    return config


@pytest.fixture
def judges(monkeypatch) -> list[judge.Judge]:
    """The judges that a test's runs make; each has to be closed when the test is over."""
    made: list[judge.Judge] = []

    class Watched(judge.Judge):
        def __init__(self, settings):
            super().__init__(settings)
            made.append(self)

    monkeypatch.setattr(judge, "Judge", Watched)
    return made


def closed(one: judge.Judge) -> bool:
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        one._cache.execute("SELECT 1")
    return one._client.is_closed


def test_a_run_with_a_faulty_judge_ends_and_its_numbers_add_up(tmp_path, monkeypatch, judges):
    with served(replies, 0.05) as (url, bodies):
        train(planned(tmp_path, url, monkeypatch), tmp_path / "run")
    assert len(judges) == 1 and closed(judges[0])
    lines = records.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and len(bodies) > 10
    unjudged = 0
    for line in lines:
        played = records.load(tmp_path / "run" / "episodes" / f"step_{line['step']:06d}.npz")
        judged = [one for one in played if one.judged]
        failed = [one for one in played if not one.judged]
        assert {one.answer for one in failed} <= {"x4"} and "x4" not in {one.answer for one in judged}
        assert all(one.advantage == 0 and not any(turn.corrected for turn in one.turns) for one in failed)
        assert all(one.success == (one.answer in ("x1", "x3")) for one in judged)
        assert line["reward/unjudged"] == pytest.approx(len(failed) / len(played))
        assert line["reward/accuracy"] == pytest.approx(np.mean([one.success for one in judged]), abs=1e-6)
        assert line["reward/mean"] == pytest.approx(np.mean([one.reward for one in judged]), abs=1e-6)
        assert line["tapo/failing_trajectories"] == sum(not one.success for one in judged)
        assert line["reward/exact_match"] == 0 and line["time/reward"] >= 0
        unjudged += len(failed)
    assert unjudged > 0 and lines[-1]["eval/unjudged"] >= 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "cache" / "verdicts.sqlite") in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_judge_that_always_fails_ends_the_run_with_a_sentence(tmp_path, monkeypatch, judges):
    fields = {"reward.judge.max_failed": 0.05, "reward.judge.retries": 0}
    with served(lambda number, body: (500, {}, "")) as (url, _):
        config = planned(tmp_path, url, monkeypatch, **fields)
        config.data.prompts_per_step, config.total_steps = 8, 20
        with pytest.raises(UserError, match=r"judgements failed, more than max_failed \(0.05\) allows"):
            train(config, tmp_path / "run")
    assert len(judges) == 1 and closed(judges[0])


@pytest.mark.parametrize("case", ["failing", "without a key"])
def test_a_judge_that_fails_in_one_process_ends_all_of_them(tmp_path, case):
    """Two processes score; only the second one's judge fails. The first has its sentence, and none is left waiting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    failing = lambda number, body: (400, {}, "")  # noqa: E731
    with served(lambda number, body: said("Yes")) as (good, _), served(failing) as (bad, _):
        started = []
        for rank, url in enumerate((good, bad)):
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(rank),
                "JAX_NUM_CPU_DEVICES": "1", "JUDGE_API_KEY": KEY,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            if case == "without a key" and rank == 1:
                del environment["JUDGE_API_KEY"]
            command = [sys.executable, str(ROOT / "tests" / "judged_process.py"), url]
            with open(tmp_path / f"{rank}.log", "w") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=300) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    said_0, said_1 = ((tmp_path / f"{rank}.log").read_text() for rank in (0, 1))
    sentence = "judgements failed, more than" if case == "failing" else "set the environment variable JUDGE_API_KEY"
    assert codes == [1, 1], (said_0, said_1)
    assert "error: Process 1 of 2 ended the run: " in said_0 and sentence in said_0
    assert "error: " in said_1 and sentence in said_1 and "Process 1 of 2" not in said_1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": ""}, "reward.judge.model is empty"),
        ({"endpoint": "localhost:1/v1"}, "reward.judge.endpoint has no host"),
        ({"endpoint": "http://me:secret@host/v1"}, "environment variable"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_a_sentence(fields, sentence):
    config = tiny_run.config("x")
    config.reward.judge.update({"endpoint": "http://host/v1", "model": "m"} | fields)
    with pytest.raises(UserError, match=sentence) as raised:
        sources.score(config)
    assert "secret" not in str(raised.value)


def test_evaluations_have_their_own_judge_where_they_name_one():
    config = tiny_run.config("x")
    assert sources.judge_settings(config) is None and sources.score_workers(config) == 1
    config.reward.judge.update(endpoint="http://a/v1", model="small", concurrency=8)
    assert sources.judge_settings(config, evaluating=True) == sources.judge_settings(config)
    assert sources.score_workers(config, evaluating=True) == 8
    config.eval.judge.update(endpoint="http://b/v1", model="large", key_variable="OTHER")
    assert sources.judge_settings(config).model == "small"
    assert sources.judge_settings(config, evaluating=True).model == "large"
    with pytest.raises(UserError, match="OTHER"):
        sources.score(config, evaluating=True)


def my_score(episode):
    return Scored({"accuracy": 0, "format": 1}, judged=False)


def test_a_reward_of_ones_own_may_say_that_nobody_knows():
    config = tiny_run.config("x")
    config.reward.source = f"{__name__}:my_score"
    assert sources.score(config)(None) == Scored({"accuracy": 0.0, "format": 1.0}, judged=False)
    config.reward.judge.update(endpoint="http://a/v1", model="m")
    with pytest.raises(UserError, match="your own function asks its own judge"):
        sources.score(config)


def test_recordings_of_before_load_and_an_unjudged_episode_is_no_failure(tmp_path):
    """One step as it was written before there was the field; then one whose failing episodes are not judged."""
    episodes = recorded.recorded(4, 4)
    path = tmp_path / "step_000001.npz"
    records.save(path, episodes)
    with np.load(path) as arrays:
        kept = dict(arrays)
    items = json.loads(kept["episodes"].tobytes())
    assert all(item.pop("judged") for item in items)
    np.savez(path, **kept | {"episodes": np.frombuffer(json.dumps(items).encode(), np.uint8)})
    assert records.load(path) == episodes
    failing = sum(not one.success for one in episodes)
    assert 0 < failing < len(episodes)
    records.save(path, [dataclasses.replace(one, judged=one.success) for one in episodes])
    text = misplaced.write_credit([path], tmp_path)
    assert text.startswith(f"{len(episodes) - failing} episodes of 1 recorded steps, {len(episodes) - failing} of them")
    viewer.write_page([path], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count(">not judged</span>") == failing
