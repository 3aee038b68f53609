"""The training loop, from a config to a trained model directory. Read it from the top: `train` is the order of events.

prompts → rollout (sampler × tools) → rewards → advantages → TAPO → updates → metrics → checkpoint → evaluation
"""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import check, evaluate, processes, records, sharding, viewer
from tapo_jax.agent import Agent, examiner, load_model, make_agent, open_tools
from tapo_jax.config import UserError, flat, total_steps
from tapo_jax.data import sources
from tapo_jax.data.pipeline import Prompts
from tapo_jax.learn.checkpoints import Checkpoints
from tapo_jax.learn.state import TrainState, init_state, split_model
from tapo_jax.metrics import Clock, MetricWriter, profiling
from tapo_jax.models import hf, lora, safetensors_files
from tapo_jax.models.parameters import logical_axes
from tapo_jax.models.shipped import model_directory
from tapo_jax.one_step import Run, one_step, warm_up
from tapo_jax.programs import adaptive_settings, keep_compiled, make_encoder, make_optimizer, make_programs
from tapo_jax.report.curve import write_curve
from tapo_jax.rollout.flight import Flight
from tapo_jax.rollout.players import Wish
from tapo_jax.rollout.progress import Moment, ProgressLine
from tapo_jax.rollout.rounds import Stopped
from tapo_jax.tapo import adaptive
from tapo_jax.types import Prompt

MOST_SLOT_BYTES = 1 << 30  # of a process, that are saved in the middle of a rollout; more are computed anew
SILENT_STEPS = 3  # steps in a row without a written token after which the config must be wrong
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def train(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Train as `config` says and write everything to `workdir`; resume if the folder has a checkpoint.

    Raises UserError for a mistake, for a second run in the same folder, and for a full disk.
    """
    if not str(workdir):
        raise UserError("--workdir is empty: name the folder of the run.")
    if "://" in str(workdir):
        raise UserError(f"--workdir is '{workdir}', an address: mount that bucket (gcsfuse) and give its folder.")
    check.check(config)
    with processes.alone_in(Path(workdir)), contextlib.ExitStack() as at_end:
        try:
            train_alone(config, Path(workdir), at_end)
        except OSError as error:
            if error.errno not in DISK:
                raise
            raise UserError(
                f"A file of the run in {workdir} could not be written ({error}): make room on the disk and run the "
                "same command again; it goes on from the last checkpoint."
            ) from error


def train_alone(config: ConfigDict, workdir: Path, at_end: contextlib.ExitStack) -> None:
    """Train in a folder that no other run uses, with a checked config. at_end: gets what has to be closed."""
    directory = model_directory(config.model.path, config.model.shape)
    keep_compiled(config.compilation_cache)
    # -------------------------------------------------------------------------------------- mesh
    mesh = make_mesh(config)
    # -------------------------------------------------------------------------------------- data
    source = sources.prompts(config, config.data.split)
    local = local_prompts(mesh, config)
    prompts = Prompts(source, prompts_per_step=config.data.prompts_per_step, local=local, seed=config.seed)
    total = total_steps(config.total_steps, config.total_epochs, len(source), config.data.prompts_per_step)
    held_out = evaluate.split_prompts(config) if config.eval.at_start or config.eval.at_end or config.eval.every else []
    # -------------------------------------------------------------------------------------- tools and model
    tools = open_tools(config, at_end)
    model, model_config = load_model(directory, config.model, mesh)
    wishes = Wishes(config.checkpoint.minutes)
    agent = make_agent(config, directory, model, tools, mesh, at_end, wish=wishes.now)
    graphdef, params = split_model(model)
    # -------------------------------------------------------------------------------------- init or restore
    optimizer, schedule = make_optimizer(config, total)
    state = init_state(params, logical_axes(model_config), optimizer, mesh, initial_thresholds(config, agent))
    encoder = make_encoder(config, agent, params)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, mesh=mesh)
    parts, flight = {"prompts": prompts, "witnesses": encoder}, make_flight(config, prompts, local, total)
    state, resumed, line = restore(checkpoints, state, parts, flight, agent, config)
    agent, clock, heart = watched(agent, config, workdir, resumed, lambda text: writer.say(text))
    programs = make_programs(config, graphdef, optimizer, schedule, state, agent, mesh)
    reference = load_reference(config, directory, mesh)
    run = Run(config, workdir, mesh, agent, examiner(agent, config), programs, encoder, reference, local, flight, clock)
    at_end.callback(run.examiner.close)
    written = resumed - 1 if line else resumed
    writer = MetricWriter(workdir, total_steps=total, resumed_step=written, tensorboard=config.log.tensorboard)
    write_config(config, workdir, resumed, writer)
    state = warm_up(run, state, writer.say) if config.train.warm_up else state
    # -------------------------------------------------------------------------------------- loop
    step, stopped, silent, broken = resumed or 0, False, 0, ""
    first = resumed is None and config.eval.at_start  # whether the evaluation before training is still to come

    def save_middle() -> None:
        data = positions(parts) | {"line": {name: float(value) for name, value in line.items()}}
        within = flight.counts.places is not None  # a rollout of training, whose caches are those of its conversations
        slots = agent.players.sampler.get_state(MOST_SLOT_BYTES) if within else None
        checkpoints.save_flight(step, state, data=data, seed=config.seed, flight=flight.pack(), slots=slots)
        wishes.saved()

    with wishes.stop, heart.beating():
        try:
            if first:
                writer.write(0, evaluated(run, state, held_out))
                first = False
            while (step < total or line) and not stopped:
                if not line:
                    with profiling(step + 1, config.log.profile_steps, workdir / "profile"):
                        state, line = one_step(run, state, step + 1, save_middle)
                    step += 1
                if (step == total and config.eval.at_end) or (config.eval.every and step % config.eval.every == 0):
                    line |= evaluated(run, state, held_out)
                writer.write(step, line)
                raise_if_broken(line, step, config, workdir)
                silent = 0 if line["rollout/written"] else silent + 1
                raise_if_silent(silent, step, total, config)
                line, wish, broken = {}, wishes.agreed(), agent.broken_service()
                stopped = bool(broken) or (wish == Wish.STOP and step < total)
                if wish != Wish.NOTHING or stopped or step == total or step % config.checkpoint.every == 0:
                    left = flight.pack() if flight.groups else None
                    checkpoints.save(step, state, data=positions(parts), seed=config.seed, flight=left)
                    wishes.saved()
        except Stopped:  # within a rollout: that of step + 1, or that of an evaluation
            stopped = True
            if not first:
                save_middle()
        checkpoints.close()
    if broken:
        raise UserError(f"{broken}: step {step} is saved; look at the service, then give the same command to go on.")
    # -------------------------------------------------------------------------------------- what a run leaves
    if stopped:
        writer.say(f"stopped after step {step}; the same command goes on from there")
    else:
        leave_results(run, nnx.merge(graphdef, state.params), directory, writer)
    writer.close()


class Wishes:
    """What the user and the clock want besides training on: to stop, or to save.

    minutes: between two saves; 0 means that the clock wants none.
    """

    def __init__(self, minutes: float) -> None:
        self.stop = processes.StopRequest()
        self._seconds, self._last = 60 * minutes, time.monotonic()

    def now(self) -> Wish:
        """Return what this process wants."""
        if self.stop.requested:
            return Wish.STOP
        late = self._seconds and jax.process_index() == 0 and time.monotonic() - self._last >= self._seconds
        return Wish.SAVE if late else Wish.NOTHING

    def agreed(self) -> Wish:
        """Return what any process wants. Every process must call this."""
        return Wish(*processes.largest(self.now()))

    def saved(self) -> None:
        self._last = time.monotonic()


def watched(
    agent: Agent, config: ConfigDict, workdir: Path, resumed: int | None, say: Callable[[str], None]
) -> tuple[Agent, Clock, processes.Heartbeat]:
    """Return the agent and the clock of a run, which tell the heartbeat where the run is, and the heartbeat.

    Rollouts also tell the user, in process 0. say: gets a line of text.
    """
    heart = processes.Heartbeat(workdir / "heartbeat", config.log.late_s, say)
    mine = "process 0, " if jax.process_count() > 1 else ""
    tell = ProgressLine(lambda text: say(mine + text), config.log.progress_s if jax.process_index() == 0 else 0.0)

    def watch(moment: Moment) -> None:
        if moment.in_tools:
            heart.note("rollout, waiting for tools,")
        else:
            heart.come("rollout")
        tell(moment)

    def enter(phase: str) -> None:
        heart.step = clock.step
        heart.come({"step": "a part between phases", "": "metrics or checkpoint"}.get(phase, phase))

    clock = Clock(enter)
    clock.step = resumed or 0
    return agent.watched(watch), clock, heart


# -------------------------------------------------------------------------------------------- parts of a run


def make_mesh(config: ConfigDict) -> Mesh:
    """Return the mesh of a run. Raises UserError if it does not divide the batch."""
    mesh = sharding.make_mesh(**config.mesh)
    check.check_rows(
        prompts=config.data.prompts_per_step,
        group_size=config.rollout.group_size,
        shards=sharding.batch_shards(mesh),
        processes=jax.process_count(),
        updates=config.train.updates_per_batch,
        micro_batches=config.train.micro_batches,
    )
    return mesh


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


def make_flight(config: ConfigDict, prompts: Prompts, local: Sequence[int], total: int) -> Flight:
    """Return the groups in flight of a run that begins. Raises UserError if the processes do not divide the carry."""
    r, count = config.rollout, jax.process_count()
    if r.carry % count:
        raise UserError(f"rollout.carry is {r.carry} and there are {count} processes: choose a multiple.")
    return Flight(
        prompts,
        local=local,
        batch=config.data.prompts_per_step,
        group_size=r.group_size,
        carry=r.carry // count,
        max_staleness=r.max_staleness,
        total=total,
    )


def positions(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the state that a checkpoint keeps of the host-side parts of a run; each has get_state and set_state."""
    return {name: part.get_state() for name, part in parts.items()}


def restore(
    checkpoints: Checkpoints,
    state: TrainState,
    parts: dict[str, Any],
    flight: Flight,
    agent: Agent,
    config: ConfigDict,
) -> tuple[TrainState, int | None, dict[str, float]]:
    """Return the newest checkpoint's state and step, and set the parts and the flight; (state, None, {}) if none.

    The third value is the metrics of that step if the run was stopped in its evaluation, which is then still to come.

    Raises UserError if the checkpoint was saved with another seed.
    """
    latest = checkpoints.latest()
    if latest is None:
        return state, None, {}
    state, data, saved = checkpoints.restore(latest, state)
    if saved["seed"] != config.seed:
        raise UserError(
            f"seed is {config.seed} but the run in this --workdir began with {saved['seed']}: give another --workdir."
        )
    in_flight, newer, flight.slots = checkpoints.restore_flight(saved, agent.players.sampler.abstract_state())
    data = data if newer is None else newer
    for name, part in parts.items():
        part.set_state(data[name])
    flight.skip_to(latest)
    if in_flight is not None:
        try:
            flight.unpack(in_flight, agent.players.reopen)
        except ValueError as error:
            raise UserError(
                f"The run in this --workdir cannot go on from step {latest} ({error}): use the config and data that "
                "it began with, or give another --workdir."
            ) from error
    return state, latest, data.get("line", {})


def initial_thresholds(config: ConfigDict, agent: Agent) -> Any:
    """Return the thresholds that adapt while training; None if they are fixed."""
    follow = adaptive_settings(config, list(agent.players.runner.tools))
    return None if follow is None else adaptive.init(follow, config.tapo.theta)


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
        found = evaluate.evaluate(run.examiner, state.params, prompts, evaluate.sampling_of(run.config))
        numbers = {f"eval/{name}": value for name, value in found.items()}
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
