"""The training loop, from a config to a trained model directory. Read it from the top: `train` is the order of events.

prompts → rollout (sampler × tools) → rewards → advantages → TAPO → updates → metrics → checkpoint → evaluation
"""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import check, evaluate, processes, records, sharding, viewer
from tapo_jax.agent import examiner, load_model, make_agent, open_tools
from tapo_jax.config import UserError, flat, total_steps
from tapo_jax.data import sources
from tapo_jax.data.pipeline import Prompts
from tapo_jax.learn.checkpoints import Checkpoints
from tapo_jax.learn.state import TrainState, init_state, split_model
from tapo_jax.metrics import Clock, MetricWriter
from tapo_jax.models import hf, lora, safetensors_files
from tapo_jax.models.parameters import logical_axes
from tapo_jax.models.shipped import model_directory
from tapo_jax.one_step import Run, one_step, warm_up
from tapo_jax.programs import adaptive_settings, make_encoder, make_optimizer, make_programs
from tapo_jax.report.curve import write_curve
from tapo_jax.tapo import adaptive
from tapo_jax.types import Prompt

SILENT_STEPS = 3  # steps in a row without a written token after which the config must be wrong
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def train(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Train as `config` says and write everything to `workdir`; resume if the folder has a checkpoint.

    Raises UserError for a mistake, for a second run in the same folder, and for a full disk.
    """
    if not str(workdir):
        raise UserError("--workdir is empty: name the folder of the run.")
    check.check(config)
    with processes.alone_in(Path(workdir)):
        try:
            train_alone(config, Path(workdir))
        except OSError as error:
            if error.errno not in DISK:
                raise
            raise UserError(
                f"A file of the run in {workdir} could not be written ({error}): make room on the disk and run the "
                "same command again; it goes on from the last checkpoint."
            ) from error


def train_alone(config: ConfigDict, workdir: Path) -> None:
    """Train in a folder that no other run uses, with a checked config."""
    directory = model_directory(config.model.path, config.model.shape)
    # -------------------------------------------------------------------------------------- mesh
    mesh = sharding.make_mesh(**config.mesh)
    check.check_rows(
        prompts=config.data.prompts_per_step,
        group_size=config.rollout.group_size,
        shards=sharding.batch_shards(mesh),
        processes=jax.process_count(),
        updates=config.train.updates_per_batch,
        micro_batches=config.train.micro_batches,
    )
    # -------------------------------------------------------------------------------------- data
    source = sources.prompts(config, config.data.split)
    local = local_prompts(mesh, config)
    prompts = Prompts(source, prompts_per_step=config.data.prompts_per_step, local=local, seed=config.seed)
    total = total_steps(config.total_steps, config.total_epochs, len(source), config.data.prompts_per_step)
    held_out = evaluate.split_prompts(config) if config.eval.at_start or config.eval.at_end or config.eval.every else []
    # -------------------------------------------------------------------------------------- tools and model
    tools = open_tools(config)
    model, model_config = load_model(directory, config.model, mesh)
    agent = make_agent(config, directory, model, tools, mesh)
    graphdef, params = split_model(model)
    # -------------------------------------------------------------------------------------- init or restore
    optimizer, schedule = make_optimizer(config, total)
    follow = adaptive_settings(config, list(agent.players.runner.tools))
    thresholds = None if follow is None else adaptive.init(follow, config.tapo.theta)
    state = init_state(params, logical_axes(model_config), optimizer, mesh, thresholds)
    encoder = make_encoder(config, agent, params)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    parts = {"prompts": prompts, "witnesses": encoder}
    state, resumed = restore(checkpoints, state, parts, config)
    programs = make_programs(config, graphdef, optimizer, schedule, state, agent, mesh)
    reference = load_reference(config, directory, mesh)
    run = Run(config, workdir, mesh, agent, examiner(agent, config), programs, encoder, reference, local, Clock())
    writer = MetricWriter(workdir, total_steps=total, resumed_step=resumed, tensorboard=config.log.tensorboard)
    write_config(config, workdir, resumed, writer)
    if config.train.warm_up:
        writer.say("compiling all that a step runs …")
        state = warm_up(run, state)
    # -------------------------------------------------------------------------------------- evaluate at start
    if resumed is None and config.eval.at_start:
        writer.write(0, evaluated(run, state, held_out))
    # -------------------------------------------------------------------------------------- loop
    step, stopping, silent, broken = resumed or 0, False, 0, ""
    with processes.StopRequest() as stop:
        while step < total and not stopping:
            step += 1
            state, metrics = one_step(run, state, next(prompts), step)
            metrics["data/skipped"] = sum(processes.gather(prompts.skipped))
            if (step == total and config.eval.at_end) or (config.eval.every and step % config.eval.every == 0):
                metrics |= evaluated(run, state, held_out)
            writer.write(step, metrics)
            raise_if_broken(metrics, step, config, workdir)
            silent = 0 if metrics["rollout/written"] else silent + 1
            raise_if_silent(silent, step, total, config)
            broken = agent.broken_service()
            stopping = step == total or broken or processes.any_of(stop.requested)
            if stopping or step % config.checkpoint.every == 0:
                checkpoints.save(step, state, data=positions(parts), seed=config.seed)
        checkpoints.close()
    if broken:
        raise UserError(f"{broken}: step {step} is saved; look at the service, then give the same command to go on.")
    # -------------------------------------------------------------------------------------- what a run leaves
    if step < total:
        writer.say(f"stopped after step {step}; the same command goes on from there")
    else:
        leave_results(run, nnx.merge(graphdef, state.params), directory, writer)
    writer.close()


# -------------------------------------------------------------------------------------------- parts of a run


def local_prompts(mesh: Mesh, config: ConfigDict) -> list[int]:
    """Return the indices of the prompts whose rows this process holds.

    Raises UserError if a group would be split between processes.
    """
    P, G = config.data.prompts_per_step, config.rollout.group_size
    rows = sharding.local_rows(mesh, P * G)
    prompts = sorted({int(row) // G for row in rows})
    if len(rows) != len(prompts) * G:
        raise UserError(
            f"data.prompts_per_step {P} does not divide over the {jax.process_count()} processes of this mesh: "
            "choose a multiple, because all samples of one prompt are played by one process."
        )
    return prompts


def positions(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the state that a checkpoint keeps of the host-side parts of a run; each has get_state and set_state."""
    return {name: part.get_state() for name, part in parts.items()}


def restore(
    checkpoints: Checkpoints, state: TrainState, parts: dict[str, Any], config: ConfigDict
) -> tuple[TrainState, int | None]:
    """Return the newest checkpoint's state and step and set the parts to its positions; (state, None) if none exists.

    Raises UserError if the checkpoint was saved with another seed.
    """
    latest = checkpoints.latest()
    if latest is None:
        return state, None
    state, data, saved = checkpoints.restore(latest, state)
    if saved["seed"] != config.seed:
        raise UserError(
            f"seed is {config.seed} but the run in this --workdir began with {saved['seed']}: give another --workdir."
        )
    for name, part in parts.items():
        part.set_state(data[name])
    return state, latest


def load_reference(config: ConfigDict, directory: Path, mesh: Mesh) -> Any:
    """Return the parameters that the KL term pulls towards (the model that the run began with); None without KL."""
    if config.algorithm.kl_coef == 0:
        return None
    return split_model(load_model(directory, config.model, mesh)[0])[1]


def write_config(config: ConfigDict, workdir: Path, resumed: int | None, writer: MetricWriter) -> None:
    """Write config.json into `workdir`; on resume, report the fields that have changed since the last start."""
    if jax.process_index() > 0:
        return
    path, now = workdir / "config.json", json.loads(config.to_json_best_effort())
    if resumed is not None and path.exists():
        try:
            before = flat(records.read_json(path, way="it is written again, and what has changed is not known"))
            changed = [name for name, value in flat(now).items() if before.get(name) != value]
        except UserError as error:
            writer.say(str(error))
            changed = []
        writer.say(f"resumed after step {resumed}" + (f"; changed since then: {', '.join(changed)}" if changed else ""))
    records.write_whole(path, json.dumps(now, indent=2) + "\n")


# -------------------------------------------------------------------------------------------- around the steps


def evaluated(run: Run, state: TrainState, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Return the evaluation's metrics as eval/…."""
    with run.clock("eval"):
        found = evaluate.evaluate(
            run.examiner,
            state.params,
            prompts,
            temperature=run.config.eval.temperature,
            top_p=run.config.eval.top_p,
            seed=run.config.seed,
        )
        numbers = {f"eval/{name}": value for name, value in found}
    return numbers | run.clock.take()


def raise_if_broken(metrics: dict[str, float], step: int, config: ConfigDict, workdir: Path) -> None:
    """Raise UserError after train.max_nonfinite updates in a row without a finite loss and gradient."""
    skipped = int(metrics["optimizer/skipped_in_a_row"])
    if skipped >= config.train.max_nonfinite:
        raise UserError(
            f"At step {step} the loss or the gradient was not finite for {skipped} updates in a row "
            f"(train.max_nonfinite {config.train.max_nonfinite}): look at loss/ratio_max, loss/sampler_kl and "
            "optimizer/grad_norm in "
            f"{workdir / 'metrics.jsonl'} and at the episodes in {workdir / 'episodes'}, "
            "then lower optimizer.lr or optimizer.grad_clip."
        )


def raise_if_silent(silent: int, step: int, total: int, config: ConfigDict) -> None:
    """Raise UserError if the policy wrote nothing in the last `silent` steps, so that nothing was trained."""
    if silent >= SILENT_STEPS or (silent and silent >= min(step, total) and step == total):
        raise UserError(
            f"In the last {silent} steps the policy could not write a single token, because no question left room for "
            f"one: rollout.max_length is {config.rollout.max_length} and rollout.max_image_tokens "
            f"{config.rollout.max_image_tokens}; give more, or smaller images (rollout.max_pixels)."
        )


def leave_results(run: Run, model: nnx.Module, directory: Path, writer: MetricWriter) -> None:
    """Write the trained model as a Hugging Face directory, the curve, and the page of recorded episodes.

    Low-rank updates are merged into the model and also written next to it as an adapter that peft reads.
    """
    export, part = run.workdir / "export", run.workdir / "export.part"
    if run.config.model.lora_rank:
        if jax.process_index() == 0:
            lora.save_adapter(model, run.agent.players.sampler.config, run.workdir / "adapter", base=str(directory))
        model = lora.merged(model)
    dtype = run.config.export.dtype or safetensors_files.stored_dtype(directory)
    hf.save(model, run.agent.players.sampler.config, part, dtype=dtype, assets=directory)
    if jax.process_index() > 0:
        return
    shutil.rmtree(export, ignore_errors=True)
    part.rename(export)
    write_curve(run.workdir / "metrics.jsonl", run.workdir / "curve.png")
    recorded = sorted((run.workdir / "episodes").glob("step_*.npz"))
    viewer.write_page(recorded, run.workdir / "episodes.html", told=writer.say)
