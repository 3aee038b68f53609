"""Numbers of an evaluation, and the program that evaluates a checkpoint."""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_world import model

from tapo_jax import check, evaluate, records
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.evaluate import checkpoint as evaluate_checkpoint
from tapo_jax.evaluate import measure
from tapo_jax.learn.checkpoints import Checkpoints, read_params
from tapo_jax.learn.state import TrainState, split_model
from tapo_jax.report import answers, statistics
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.types import Episode, Prompt, ToolCall, ToolResult, Turn

CONFIGS = Path(__file__).parents[1] / "configs"


def episode(hops: int, right: bool, answer: str | None = "a", *, errors: tuple[str | None, ...] = ()) -> Episode:
    """An episode of 90 tokens, 40 of them written, whose turns called `zoom` with these errors (None: none)."""
    token_T = np.zeros(90, np.int32)
    turns = [Turn(0, 1, "", ToolCall("zoom", {}), ToolResult("", error=error)) for error in errors]
    return Episode(
        Prompt(f"q{hops}", "?", (), ("a",), hops=hops),
        0,
        token_T,
        np.arange(90) < 40,
        np.zeros(90, np.float32),
        [],
        [],
        turns,
        answer,
        "length" if answer is None else "answer",
        {"accuracy": float(right), "format": 1.0},
        reward=0.5 + right,
    )


EPISODES = [
    episode(1, True, errors=(None, "timeout", None)),
    episode(1, False, errors=(None, "timeout")),
    episode(2, False, errors=(None,)),
    episode(2, False, None),
]
TOOLS = ("zoom", "search")


def tallied(episodes):
    return evaluate.Tally.of(episodes, TOOLS).metrics()


def test_wilson():
    """The roots of (p̂ − p)² = z² p(1 − p)/n. For 0 of n the upper end is z²/(n + z²): 3.8415/13.8415 = 0.27754 for n
    = 10; 5 of 10 gives 0.5 ± z·sqrt(0.025 + z²/400)/(1 + z²/10) = 0.5 ± 0.26341 (z² = 3.84146)."""
    assert statistics.wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert statistics.wilson(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-5)
    assert statistics.wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-5)
    assert statistics.wilson(0, 0) == (0.0, 1.0)
    low, high = statistics.wilson(37, 128)
    for end in (low, high):  # the definition itself
        assert (37 / 128 - end) ** 2 == pytest.approx(statistics.Z95**2 * end * (1 - end) / 128)


def test_metrics_by_hop_count():
    values = tallied(EPISODES)
    assert (values["episodes"], values["accuracy"]) == (4, 0.25)
    assert (values["episodes/hops_1"], values["accuracy/hops_1"], values["accuracy/hops_2"]) == (2, 0.5, 0.0)
    assert values["accuracy_low"] < 0.25 < values["accuracy_high"]
    assert (values["answered"], values["reward"]) == (0.75, 0.75)  # rewards 1.5, 0.5, 0.5, 0.5
    assert (values["tool_calls"], values["tool_calls/zoom"], values["tool_calls/search"]) == (1.5, 1.5, 0.0)
    assert (values["errors"], values["errors/timeout"], values["errors/other"]) == (0.5, 0.5, 0.0)
    assert (values["turns"], values["length"], values["written"]) == (1.5, 90.0, 40.0)
    assert (values["finish/answer"], values["finish/length"]) == (0.75, 0.25)
    assert not [name for name in values if "time" in name.split("/")[0]]


def test_sums_of_two_processes_are_those_of_one(monkeypatch):
    """Three episodes and one: the means must be weighted by 3 and 1, not averaged."""
    first, second = (evaluate.Tally.of(part, TOOLS) for part in (EPISODES[:3], EPISODES[3:]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(measure.processes, "gather", lambda value: [value, dict(second.sums)])
    values = first.over_processes().metrics()
    assert values == pytest.approx(tallied(EPISODES))
    assert values["episodes/hops_2"] == 2 and values["tool_calls"] == 1.5


class FakeAgent:
    """Stands in for an Agent: remembers what it was asked to play."""

    players = SimpleNamespace(runner=SimpleNamespace(tools=dict.fromkeys(TOOLS), services=()))

    def play(self, params, prompts, group_size, sampling, *, keep_images=True):
        self.asked = (params, list(prompts), group_size, sampling, keep_images)
        return [dataclasses.replace(EPISODES[i], prompt=prompt) for i, prompt in enumerate(prompts)], {}

    def close(self):
        pass

    def broken_service(self):
        return ""


def test_evaluate_plays_each_prompt_once():
    agent, prompts = FakeAgent(), [e.prompt for e in EPISODES]
    values = evaluate.evaluate(agent, "weights", prompts, Sampling(temperature=0.0, seed=7))
    assert values["accuracy"] == 0.25
    params, asked, *options = agent.asked
    assert params == "weights" and asked == prompts
    assert options == [1, Sampling(temperature=0.0, top_p=1.0, seed=7, step=0, first_prompt=0), False]
    assert evaluate.evaluate(agent, "weights", [], Sampling()) == {}


def test_processes_share_the_prompts(monkeypatch):
    """The second of two plays the last two prompts, and numbers them as in one process."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    agent, prompts = FakeAgent(), [e.prompt for e in EPISODES]
    evaluate.play(agent, None, prompts, Sampling(temperature=0.0))
    assert agent.asked[1] == prompts[2:] and agent.asked[3].first_prompt == 2


def test_only_evaluations_have_limits_that_the_trainer_cannot_reproduce():
    config = get_config()
    config.eval.update(temperature=0.7, top_p=0.8, top_k=20, min_p=0.1, presence_penalty=1.5)
    expected = Sampling(0.7, 0.8, config.seed, top_k=20, min_p=0.1, presence_penalty=1.5)
    assert evaluate.sampling_of(config) == expected and expected.limited
    assert not evaluate.sampling_of(get_config()).limited
    with pytest.raises(AttributeError):
        config.rollout.top_k  # noqa: B018
    config.rollout.update(top_p=0.9)
    with pytest.raises(UserError, match=r"rollout.top_k has no range"):
        check.check(unlocked(config))


def unlocked(config):
    with config.unlocked():
        config.rollout.top_k = 5
    return config


def test_table():
    text = evaluate.table(tallied(EPISODES))
    assert "| all | 4 | 25.0 % | 4.6 – 69.9 % |" in text  # z² = 3.84146, n = 4, by hand
    assert "| 1 hop | 2 | 50.0 % |" in text and "| 2 hops | 2 | 0.0 % |" in text
    assert "| tool_calls: zoom | 1.50 |" in text and "| errors: timeout | 0.500 |" in text


# A checkpoint from the command line.


def save_checkpoint(workdir: Path, step: int, params) -> Path:
    """A checkpoint as a run writes it; the optimizer's moments are zeros."""
    zero, moments = jnp.int32(0), {"mu": jax.tree.map(jnp.zeros_like, params)}
    state = TrainState(update=zero, params=params, opt_state=moments, skipped=zero, skipped_in_a_row=zero)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(step, state, data={}, seed=0)
    checkpoints.close()
    return workdir / "checkpoints" / str(step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with one checkpoint of random weights, and these weights."""
    workdir = tmp_path_factory.mktemp("run")
    params = split_model(model())[1]
    return save_checkpoint(workdir, 12, params), params


def test_weights_of_a_checkpoint(saved):
    folder, params = saved
    like = jax.tree.map(lambda a: a + 1, params)
    for found, wanted in zip(jax.tree.leaves(read_params(folder, like)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(found, wanted)


def damage_by_a_bit(folder):
    largest = max(
        (path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)


def damage_by_cutting(folder):
    largest = max(
        (path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])


def damage_by_deleting(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that orbax had begun
@pytest.mark.parametrize("damage", [damage_by_a_bit, damage_by_cutting, damage_by_deleting])
def test_damaged_checkpoint_is_one_sentence(saved, tmp_path, damage):
    """The largest file holds the weights: the optimizer's moments in this checkpoint are zeros, which take no room."""
    folder = tmp_path / "checkpoints" / "12"
    shutil.copytree(saved[0], folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        read_params(folder, saved[1])
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoint_of_another_model_is_one_sentence(saved):
    folder, params = saved
    wider = jax.tree.map(lambda a: jnp.zeros((*a.shape[:-1], a.shape[-1] + 2)), params)
    with pytest.raises(UserError, match="cannot be read into the model of this config"):
        read_params(folder, wider)


def get_config(**model_fields):
    config = runpy.run_path(str(CONFIGS / "tapo_grpo.py"))["get_config"]("test")
    config.model.update(model_fields)
    return config


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (path / name).write_text("{}")
    return path


def test_what_a_checkpoint_may_be(tmp_path):
    """A run's folder means its newest checkpoint; half-written ones (orbax's temporary names) do not count."""
    models = model_folder(tmp_path / "model")
    config, workdir = get_config(path=str(models)), tmp_path / "run"
    for name in ("3", "12", "20.orbax-checkpoint-tmp"):
        (workdir / "checkpoints" / name).mkdir(parents=True)
    (workdir / "config.json").write_text("{}")
    newest = (workdir / "checkpoints" / "12", models, "step_000012", workdir / "eval")
    assert evaluate_checkpoint.find(workdir, config) == newest
    assert evaluate_checkpoint.find(workdir / "checkpoints" / "3", config)[0] == workdir / "checkpoints" / "3"
    export = model_folder(workdir / "export")
    assert evaluate_checkpoint.find(export, config) == (None, export, "export", workdir / "eval")
    assert evaluate_checkpoint.find(models, config) == (None, models, "model", Path("eval"))


def test_wrong_checkpoint_is_one_sentence(tmp_path):
    config = get_config(path=str(model_folder(tmp_path / "model")))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for path, sentence in (
        ("nowhere", "is no directory"),
        ("run", "no complete checkpoint"),
        ("other", "neither checkpoints nor a model"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate_checkpoint.find(tmp_path / path, config)


def test_missing_checkpoint_ends_the_program_with_one_sentence(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    command = [
        sys.executable,
        "launch/eval.py",
        "--config=configs/tapo_grpo.py:test",
        f"--checkpoint={tmp_path / 'nowhere'}",
    ]
    done = subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if "nowhere" in line]
    assert sentence.startswith("error: --checkpoint is") and "Traceback" not in done.stderr


def test_run_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    """The whole program around a player and a model that are not there."""
    monkeypatch.setattr(evaluate_checkpoint, "load_model", lambda *_: (model(), None))
    monkeypatch.setattr(evaluate_checkpoint, "make_agent", lambda *_, **__: FakeAgent())
    monkeypatch.setattr(sources, "tools", lambda _: [])
    monkeypatch.setattr(evaluate_checkpoint.evaluate, "split_prompts", lambda _: [e.prompt for e in EPISODES])
    config = get_config()
    evaluate_checkpoint.run(config, str(model_folder(tmp_path / "model")), str(tmp_path / "out"), page=True)
    out = tmp_path / "out" / "atlas-held_out"
    written = json.loads((out / "model.json").read_text())
    assert written["metrics"]["accuracy"] == 0.25 and written["split"] == config.eval.split
    text = (out / "model.md").read_text()
    assert "| all | 4 | 25.0 % |" in text and text in capsys.readouterr().out
    assert (out / "model.html").read_text().count("<article") == 6  # turns
    assert sorted(path.suffix for path in out.iterdir()) == [".html", ".json", ".jsonl", ".md", ".npz"]
    found = answers.read(out / "model.jsonl")
    assert [one.benchmark for one in found] == ["atlas-held_out"] * 2  # four episodes of two questions


def test_results_never_overwrite_those_of_other_data(tmp_path):
    """The same data go to the same folder again; another split, another world and another folder of rows do not."""
    config, seen = get_config(), []
    for field, value in (("seed", 1), ("data.world_seed", 7), ("eval.split", "train"), ("data.dir", "/a/b")):
        config.update_from_flattened_dict({field: value})
        data = evaluate_checkpoint.about_data(config)
        folder = evaluate_checkpoint.results_folder(tmp_path, data)
        records.write_whole(folder / "step_000001.json", json.dumps({"data": data}))
        assert evaluate_checkpoint.results_folder(tmp_path, data) == folder
        seen.append(folder.name)
    # The folder of Atlas is a cache, and the seed of training is no data.
    assert seen == ["atlas-held_out", "atlas-held_out-2", "atlas-train", "atlas-train"]
    config.data.source = "my.module:questions"
    first = evaluate_checkpoint.about_data(config)
    assert evaluate_checkpoint.results_folder(tmp_path, first).name == "my.module_questions-train"


def test_an_episode_that_is_not_judged_is_in_no_accuracy_and_no_reward():
    """Of 1 hop one right, one not judged; of 2 hops two wrong ones: 1 of 3; rewards 1.5 + 0.5 + 0.5."""
    episodes = [EPISODES[0], dataclasses.replace(EPISODES[1], judged=False), *EPISODES[2:]]
    values = tallied(episodes)
    assert (values["episodes"], values["accuracy"], values["unjudged"]) == (3, 1 / 3, 0.25)
    assert (values["episodes/hops_1"], values["accuracy/hops_1"]) == (1, 1.0)
    assert values["reward"] == pytest.approx(2.5 / 3) and values["answered"] == 0.75
    nobody = tallied([dataclasses.replace(e, judged=False) for e in episodes])
    assert np.isnan(nobody["accuracy"]) and nobody["unjudged"] == 1.0 and nobody["turns"] == 1.5
