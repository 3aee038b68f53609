"""A checkpoint on held-out questions: JSON, a Markdown table and, on demand, a page. Run by `launch/eval.py`."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from tapo_jax import check, evaluate, records, sharding, viewer
from tapo_jax.agent import load_model, make_agent
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.learn import checkpoints
from tapo_jax.learn.state import split_model
from tapo_jax.models.shipped import model_directory
from tapo_jax.records import write_whole

_GIVE = "give a WORKDIR, a WORKDIR/checkpoints/N or a model directory"


def run(config: ConfigDict, checkpoint: str, out: str | None = None, *, page: bool = False) -> dict[str, float]:
    """Evaluates a checkpoint, prints the table and writes NAME.json and NAME.md (page: NAME.html too) into `out`.

    checkpoint: a WORKDIR (its newest checkpoint), a WORKDIR/checkpoints/N, or a model directory in Hugging Face form.
    out: None is the run's folder `eval`, or ./eval for a model directory that is no run's. Raises UserError.
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
    model, _ = load_model(directory, config.model, mesh)
    agent = make_agent(config, directory, model, sources.tools(config), mesh)
    params = split_model(model)[1]
    if saved is not None:
        params = checkpoints.read_params(saved, params)
    episodes, played = evaluate.play(agent, params, prompts, temperature=config.eval.temperature, seed=config.seed)
    values = evaluate.numbers(evaluate.added(evaluate.tally(episodes, played)))
    if jax.process_index() == 0:
        folder = Path(out) if out else folder
        about = {
            "checkpoint": str(saved or directory),
            "split": config.eval.split,
            "temperature": config.eval.temperature,
            "seed": config.seed,
        }
        text = f"# {name}: {config.data.source}, {config.eval.split}\n\n{evaluate.table(values)}"
        write_whole(folder / f"{name}.json", json.dumps(about | {"metrics": values}, indent=2) + "\n")
        write_whole(folder / f"{name}.md", text)
        if page:
            recorded = [records.record(e, step=0, prompt=p, advantage=0.0, credit=()) for p, e in enumerate(episodes)]
            records.save(folder / f"{name}.npz", recorded)
            viewer.write_page([folder / f"{name}.npz"], folder / f"{name}.html")
        print(f"{text}\nwritten to {folder / name}.json", flush=True)
    return values


def find(checkpoint: Path, config: ConfigDict) -> tuple[Path | None, Path, str, Path]:
    """-> (the checkpoint's folder, None for a model directory; the model directory; a name; the folder for results)."""
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
