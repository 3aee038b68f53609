"""Evaluate a checkpoint on held-out questions: JSON, a Markdown table and optionally a page (`launch/eval.py`)."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from tapo_jax import check, evaluate, processes, records, sharding, viewer
from tapo_jax.agent import Agent, load_model, make_agent, open_tools
from tapo_jax.config import UserError
from tapo_jax.evaluate import asking, benchmarks
from tapo_jax.learn import checkpoints
from tapo_jax.learn.state import split_model
from tapo_jax.models.shipped import model_directory
from tapo_jax.programs import keep_compiled
from tapo_jax.records import write_whole
from tapo_jax.report import answers

_GIVE = "give a WORKDIR, a WORKDIR/checkpoints/N or a model directory"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that is ready to play."""

    agent: Agent
    params: Any
    path: Path
    """The checkpoint's folder, or the model directory."""
    name: str
    """Of its results."""
    folder: Path
    """For results, if the user names none."""


def run(
    config: ConfigDict,
    checkpoint: str,
    out: str | None = None,
    *,
    page: bool = False,
    samples: int = 1,
    questions: Sequence[str] = (),
) -> None:
    """Evaluate a checkpoint on the benchmarks that the config names, or else on its own data. Raises UserError.

    checkpoint: a WORKDIR (its newest checkpoint), a WORKDIR/checkpoints/N, or a model directory in Hugging Face form.
    out: for results; None is the run's folder `eval`, or ./eval for a model directory outside of a run.
    page: also write a page of episodes: of the questions with the given ids, or of all of the config's own data.
    samples: answers to each question of a benchmark.
    """
    check.check(config)
    if not benchmarks.named(config):
        if samples > 1 or questions:
            raise UserError("--samples and --questions are for benchmarks: set --config.benchmarks.NAME=DIR.")
        evaluate_own_data(config, checkpoint, out, page=page)
        return
    if page != bool(questions):
        raise UserError(
            "--page with benchmarks shows the questions of --questions=BENCHMARK/ID,…: give both flags, or neither."
        )
    find(Path(checkpoint), config)
    wanted = benchmarks.chosen(benchmarks.questions_of(config), questions)
    with contextlib.ExitStack() as at_end:
        loaded = load(config, checkpoint, at_end)
        folder = Path(out) if out else loaded.folder / f"benchmarks-{loaded.name}"
        benchmarks.run(loaded.agent, loaded.params, config, loaded.path, folder, samples=samples)
        if page:
            benchmarks.page(loaded.agent, loaded.params, config, folder, samples=samples, wanted=wanted)


def load(config: ConfigDict, checkpoint: str, at_end: contextlib.ExitStack) -> Loaded:
    """Load a checkpoint and all that plays. at_end: gets what has to be closed. Raises UserError."""
    saved, directory, name, folder = find(Path(checkpoint), config)
    keep_compiled(config.compilation_cache)
    mesh = sharding.make_mesh(**config.mesh)
    tools = open_tools(config, at_end)
    model, _ = load_model(directory, config.model, mesh)
    params = split_model(model)[1]
    if saved is not None:
        params = checkpoints.read_params(saved, params)
    agent = make_agent(config, directory, model, tools, mesh, at_end, evaluating=True)
    return Loaded(agent, params, saved or directory, name, folder)


def evaluate_own_data(
    config: ConfigDict, checkpoint: str, out: str | None = None, *, page: bool = False
) -> dict[str, float]:
    """Evaluate on eval.split of the config's data, print the table, and write NAME.json, NAME.jsonl and NAME.md.

    The files go into a folder of `out` that is named after the data, such as atlas-held_out. NAME.jsonl has a line for
    each answer. page: also write NAME.html. Returns the metrics. Raises UserError.
    """
    find(Path(checkpoint), config)
    prompts = evaluate.split_prompts(config) if config.eval.prompts else []
    if not prompts:
        raise UserError(
            f"There is nothing to evaluate: eval.prompts is {config.eval.prompts} and eval.split "
            f"'{config.eval.split}': set eval.prompts to at least 1, or give the folder of a benchmark "
            "(--config.benchmarks.NAME=DIR)."
        )
    with contextlib.ExitStack() as at_end:
        loaded = load(config, checkpoint, at_end)
        runner = loaded.agent.players.runner
        tools = tuple(runner.tools)
        episodes = evaluate.play(loaded.agent, loaded.params, prompts, evaluate.sampling_of(config), keep_images=page)
        broken = loaded.agent.broken_service()
    if broken:
        raise UserError(f"{broken}: nothing is written; look at the service, then evaluate again.")
    values = evaluate.Tally.of(episodes, tools, runner.services).over_processes().metrics()
    data, name = about_data(config), loaded.name
    label = f"{data['source']}-{data['split']}"
    mine = [asking.answer_of(asking.Question(label, episode.prompt), episode, tools) for episode in episodes]
    found = [answers.from_json(one) for each in processes.gather(answers.as_json(mine)) for one in each]
    if jax.process_index() == 0:
        folder = results_folder(Path(out) if out else loaded.folder, data)
        about = {
            "checkpoint": str(loaded.path),
            "data": data,
            "split": config.eval.split,
            "temperature": config.eval.temperature,
            "top_p": config.eval.top_p,
            "seed": config.seed,
        }
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        text = f"# {name}: {config.data.source}, {config.eval.split}\n\n{evaluate.table(values)}"
        write_whole(folder / f"{name}.json", json.dumps(about | {"metrics": known}, indent=2) + "\n")
        write_whole(folder / f"{name}.md", text)
        answers.write(folder / f"{name}.jsonl", found)
        if page:
            recorded = [records.record(e, step=0, prompt=p, advantage=0.0, credit=()) for p, e in enumerate(episodes)]
            records.save(folder / f"{name}.npz", recorded)
            viewer.write_page([folder / f"{name}.npz"], folder / f"{name}.html")
        print(f"{text}\nwritten to {folder / name}.json", flush=True)
    return values


def about_data(config: ConfigDict) -> dict[str, Any]:
    """Return the fields that determine which questions a config evaluates on, as values read from JSON."""
    data = json.loads(config.data.to_json_best_effort()) | {"split": config.eval.split}
    del data["prompts_per_step"]
    if data["source"] == "atlas":
        del data["dir"]  # a cache
    return data


def results_folder(folder: Path, data: dict[str, Any]) -> Path:
    """Return the subfolder of `folder` for results on this data: SOURCE-SPLIT or SOURCE-SPLIT-NUMBER.

    A number is added if the folder holds results on other data (another data.dir, for example), so that they never
    overwrite each other.
    """
    name = "-".join(re.sub(r"[^\w.]+", "_", part) for part in (data["source"], data["split"]))
    for number in itertools.count(1):
        found = folder / (name if number == 1 else f"{name}-{number}")
        written = [json.loads(path.read_text(encoding="utf-8")) for path in found.glob("*.json")]
        if all(one["data"] == data for one in written):
            return found
    raise AssertionError("unreachable")


def find(checkpoint: Path, config: ConfigDict) -> tuple[Path | None, Path, str, Path]:
    """Resolve a checkpoint path to (checkpoint folder, model directory, name, folder for results).

    The checkpoint folder is None for a model directory. Raises UserError if the path is neither.
    """
    if not checkpoint.is_dir():
        raise UserError(f"--checkpoint is '{checkpoint}', which is no directory: {_GIVE}.")
    if (checkpoint / "checkpoints").is_dir():
        steps = [int(path.name) for path in (checkpoint / "checkpoints").iterdir() if path.name.isdigit()]
        if not steps:
            raise UserError(
                f"{checkpoint / 'checkpoints'} holds no complete checkpoint: wait until the run has saved one."
            )
        checkpoint = checkpoint / "checkpoints" / str(max(steps))
    if checkpoint.name.isdigit() and checkpoint.resolve().parent.name == "checkpoints":
        workdir = checkpoint.resolve().parents[1]
        models = model_directory(config.model.path, config.model.shape)
        return checkpoint, models, f"step_{int(checkpoint.name):06d}", workdir / "eval"
    if not (checkpoint / "config.json").is_file():
        raise UserError(f"{checkpoint} holds neither checkpoints nor a model: {_GIVE}.")
    parent = checkpoint.resolve().parent
    in_run = (parent / "checkpoints").is_dir()
    return None, model_directory(str(checkpoint)), checkpoint.resolve().name, (parent if in_run else Path()) / "eval"
