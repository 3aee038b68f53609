"""One step of training: prompts → episodes → advantages → updates → what is recorded of it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import processes, records, sharding
from tapo_jax.agent import Agent
from tapo_jax.batch import TrainBatch
from tapo_jax.learn import train_step
from tapo_jax.learn.assign_credit import Credit
from tapo_jax.learn.batches import pack
from tapo_jax.learn.outcomes import CallEncoder, EncodedBatch
from tapo_jax.learn.state import TrainState
from tapo_jax.metrics import Clock, compile_count, reward_means, throughput
from tapo_jax.programs import Programs
from tapo_jax.rollout.flight import Flight
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.types import Episode, Prompt


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same over the steps."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    agent: Agent
    examiner: Agent
    """The agent with the judge of evaluations."""
    programs: Programs
    encoder: CallEncoder
    reference: Any
    """Parameters of the KL term's reference model; None without a KL term."""
    local: list[int]
    """Indices of this process's prompts within a step."""
    flight: Flight
    """The groups of this process that are not trained on yet."""
    clock: Clock


def one_step(
    run: Run, state: TrainState, step: int, save: Callable[[], None] | None = None
) -> tuple[TrainState, dict[str, float]]:
    """Run one step: prompts -> episodes -> advantages -> updates. The metrics are the same in every process.

    save: called in a rollout whenever what is in flight is to be saved.

    Raises rollout.rounds.Stopped in every process if the rollout is stopped; the state is not touched then.
    """
    config, clock, compiled = run.config, run.clock, compile_count()
    clock.step = step
    with clock("step"):
        with clock("rollout"):
            episodes, played = run.agent.play_on(state.params, run.flight, sampling(run, step), save)
        with clock("pack"):
            batch, encoded = jax.block_until_ready(to_device(run, episodes, step))
        with clock("tapo"):
            batch, state, credit, found = jax.block_until_ready(with_advantages(run, state, batch, encoded, step))
        with clock("logprobs"):
            batch, reference_BxT = jax.block_until_ready(with_log_probs(run, state, batch))
        with clock("update"):
            each = []
            with jax.transfer_guard("disallow"):
                for index in run.programs.index_U:
                    state, metrics = run.programs.update(state, batch, reference_BxT, index)
                    each.append(metrics)
            each = jax.device_get(each)
        with clock("record"):
            remember(run, episodes, credit, step)
            odd = not np.isfinite([metrics["loss/total"] for metrics in each]).all()
            if odd or step == 1 or step % config.log.episodes_every == 0:
                record_episodes(run, episodes, credit, step)
    values = reward_means(episodes) | played | clock.take() | {"perf/compiles": compile_count() - compiled}
    values |= throughput(
        values,
        episodes,
        run.agent.players.sampler.config,
        run.agent.players.pixels,
        train_vision=config.model.train_vision,
        lora=config.model.lora_rank > 0,
    )
    oldest = values.get("rollout/staleness_max")
    values = processes.mean_over(values)
    if oldest is not None:
        values["rollout/staleness_max"] = max(processes.gather(oldest))
    values["data/skipped"] = sum(processes.gather(run.flight.skipped))
    return state, values | jax.device_get(found) | train_step.over_updates(each)


def sampling(run: Run, step: int) -> Sampling:
    r = run.config.rollout
    return Sampling(r.temperature, r.top_p, run.config.seed, step, first_prompt=run.local[0])


def grouped(run: Run, episodes: Sequence[Episode]) -> list[Sequence[Episode]]:
    G = run.config.rollout.group_size
    return [episodes[start : start + G] for start in range(0, len(episodes), G)]


def to_device(run: Run, episodes: Sequence[Episode], step: int) -> tuple[TrainBatch, EncodedBatch]:
    """Pack this process's episodes into the global batch, padded to the size that holds any episode."""
    agent, P, G = run.agent, run.config.data.prompts_per_step, run.config.rollout.group_size
    size = dict(zip(("length", "patches"), run.programs.buckets[-1], strict=True))
    steps = run.config.tapo.max_tool_steps
    batch = pack(episodes, agent.players.sampler.config, agent.players.pixels, steps=steps, **size)
    encoded = run.encoder.encode(grouped(run, episodes), step)
    return sharding.put_rows(batch, run.mesh, P * G), sharding.put_rows(encoded, run.mesh, P)


def with_advantages(
    run: Run, state: TrainState, batch: TrainBatch, encoded: EncodedBatch, step: int
) -> tuple[TrainBatch, TrainState, Credit, dict[str, jax.Array]]:
    seed_step_2 = sharding.put_replicated(np.array([run.config.seed, step], np.int32), run.mesh)
    advantage_BxT, mask_BxT, credit, thresholds, metrics = run.programs.assign_credit(
        batch, encoded, state.thresholds, seed_step_2
    )
    batch = dataclasses.replace(batch, advantage_BxT=advantage_BxT, mask_BxT=mask_BxT)
    return batch, dataclasses.replace(state, thresholds=thresholds), credit, metrics


def with_log_probs(run: Run, state: TrainState, batch: TrainBatch) -> tuple[TrainBatch, jax.Array | None]:
    """Return the batch with old log-probabilities, and the reference model's log-probabilities.

    The old ones are filled only if there is more than one update; the reference's are None without a reference.
    """
    reference_BxT = None if run.reference is None else run.programs.log_probs(run.reference, batch.inputs)
    if len(run.programs.index_U) > 1:
        batch = dataclasses.replace(batch, old_logp_BxT=run.programs.old_log_probs(state.params, batch.inputs))
    return batch, reference_BxT


def remember(run: Run, episodes: Sequence[Episode], credit: Credit, step: int) -> None:
    """Store successful rollouts as witnesses for later steps if the config has such a memory."""
    if run.encoder.remembered:
        run.encoder.remember(grouped(run, episodes), step, jax.device_get(credit.advantage_PxG)[run.local])


def record_episodes(run: Run, episodes: Sequence[Episode], credit: Credit, step: int) -> None:
    """Write process 0's episodes with the credit of their steps, for the page and the credit report."""
    credit = jax.device_get(credit)
    if jax.process_index() > 0:
        return
    K, G = run.config.tapo.max_tool_steps, run.config.rollout.group_size
    pooled = run.config.algorithm.credit == "tapo" and run.config.tapo.scope == "batch"
    layout = {"steps": K, "rollouts": G + run.encoder.remembered, "pooled": pooled}
    recorded = []
    for row, episode in enumerate(episodes):
        p, g = run.local[row // G], row % G
        fields = records.credit_fields(credit.transfer, p, g, **layout)
        recorded.append(
            records.record(episode, step=step, prompt=p, advantage=float(credit.advantage_PxG[p, g]), credit=fields)
        )
    records.save(run.workdir / "episodes" / f"step_{step:06d}.npz", recorded)


def warm_up(run: Run, state: TrainState, say: Callable[[str], None]) -> TrainState:
    """Compile everything that a step runs. The update gets NaN advantages, so it changes no parameter."""
    say("compiling all that a step runs …")
    config, programs = run.config, run.programs
    run.agent.players.sampler.warm_up(state.params)
    run.agent.players.sampler.release()
    kept = jax.device_get((state.update, state.skipped, state.skipped_in_a_row))
    nothing = np.zeros(0, np.int32)
    empty = Episode(
        Prompt("", "", (), ()), 0, nothing, nothing.astype(bool), nothing.astype(np.float32), [], [], [], None,
        "length", {"accuracy": 0.0},
    )  # fmt: skip
    batch, encoded = to_device(run, [empty] * (len(run.local) * config.rollout.group_size), step=0)
    batch, _, _, _ = with_advantages(run, state, batch, encoded, step=0)
    batch, reference_BxT = with_log_probs(run, state, batch)
    bad = np.full((len(run.local) * config.rollout.group_size, batch.mask_BxT.shape[1]), np.nan, np.float32)
    bad_BxT, mask_BxT = sharding.put_rows((bad, np.isnan(bad)), run.mesh, batch.mask_BxT.shape[0])
    batch = dataclasses.replace(batch, advantage_BxT=bad_BxT, mask_BxT=mask_BxT)
    state, _ = programs.update(state, batch, reference_BxT, programs.index_U[0])
    counters = sharding.put_replicated(kept, run.mesh)
    return dataclasses.replace(state, update=counters[0], skipped=counters[1], skipped_in_a_row=counters[2])
