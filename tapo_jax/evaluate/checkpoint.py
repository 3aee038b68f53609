"""Evaluate a checkpoint on held-out questions: JSON, a Markdown table and optionally a page (`launch/eval.py`)."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from tapo_jax import check, evaluate, records, sharding, viewer
from tapo_jax.agent import load_model, make_agent, open_tools
from tapo_jax.config import UserError
from tapo_jax.learn import checkpoints
from tapo_jax.learn.state import split_model
from tapo_jax.models.shipped import model_directory
from tapo_jax.records import write_whole

_GIVE = "give a WORKDIR, a WORKDIR/checkpoints/N or a model directory"


def run(config: ConfigDict, checkpoint: str, out: str | None = None, *, page: bool = False) -> dict[str, float]:
    """Evaluate a checkpoint, print the table, and write NAME.json and NAME.md.

    The files go into a folder of `out` that is named after the data, such as atlas-held_out. Raises UserError.

    checkpoint: a WORKDIR (its newest checkpoint), a WORKDIR/checkpoints/N, or a model directory in Hugging Face form.
    out: None is the run's folder `eval`, or ./eval for a model directory outside of a run.
    page: also write NAME.html.
    """
    check.check(config)
    saved, directory, name, folder = find(Path(checkpoint), config)
    mesh = sharding.make_mesh(**config.mesh)
    prompts = evaluate.split_prompts(config)
    if not prompts:
        raise UserError(
            f"There is nothing to evaluate: eval.prompts is {config.eval.prompts} and eval.split "
            f"'{config.eval.split}': set eval.prompts to at least 1."
        )
    tools = open_tools(config)
    model, _ = load_model(directory, config.model, mesh)
    agent = make_agent(config, directory, model, tools, mesh, evaluating=True)
    params = split_model(model)[1]
    if saved is not None:
        params = checkpoints.read_params(saved, params)
    episodes, played = evaluate.play(
        agent, params, prompts, temperature=config.eval.temperature, top_p=config.eval.top_p, seed=config.seed
    )
    if broken := agent.broken_service():
        raise UserError(f"{broken}: nothing is written; look at the service, then evaluate again.")
    values = evaluate.numbers(evaluate.added(evaluate.tally(episodes, played)))
    if jax.process_index() == 0:
        data = about_data(config)
        folder = results_folder(Path(out) if out else folder, data)
        about = {
            "checkpoint": str(saved or directory),
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
