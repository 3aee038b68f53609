"""Make the settings of every part, the compiled programs of a run and the encoder of its calls from a config."""

import dataclasses
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import sharding, tapo
from tapo_jax.agent import Agent
from tapo_jax.learn import assign_credit, gigpo, losses, micro_batches, optimizer, train_step
from tapo_jax.learn.outcomes import CallEncoder
from tapo_jax.learn.state import TrainState
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.inputs import most_patches
from tapo_jax.tapo import adaptive, embedding, memory


def keep_compiled(where: str) -> None:
    """Keep every compiled program on the disk, so that the second start of a run compiles nothing.

    where: the config's compilation_cache: "" is a folder in the user's cache folder (one for each kind of processor,
        at most 4 GiB), "off" keeps nothing, anything else is a folder or a bucket (gs://…).

    JAX_COMPILATION_CACHE_DIR in the environment has precedence.
    """
    if where == "off" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    if not where:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        where = str(Path(cache) / "tapo_jax" / "compiled" / _processor())
        jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)
    jax.config.update("jax_compilation_cache_dir", where)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _processor() -> str:
    """Return a name of the processor and its instructions: a program for the CPU runs only on a CPU that has them."""
    try:
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    except OSError:  # not Linux
        flags = [platform.processor()]
    return f"{platform.machine()}-{hashlib.blake2b(''.join(flags).encode(), digest_size=6).hexdigest()}"


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run. Signatures are in `train_step.py` and `assign_credit.py`."""

    log_probs: Callable
    """Of all rows, for the reference model."""
    old_log_probs: Callable
    """Of the rows of the second and later updates of a batch."""
    assign_credit: Callable
    update: Callable
    index_U: list[jax.Array]
    """Indices of the mini-batches, on the device."""
    buckets: tuple[tuple[int, int], ...]
    """Ascending (tokens, patches) that rows may be cropped to; batches have the last, which holds any episode."""


def make_programs(
    config: ConfigDict,
    graphdef: Any,
    chain: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    agent: Agent,
    mesh: Mesh,
) -> Programs:
    """Return the programs of a run. chain, schedule: from `learn.optimizer`."""
    model_config = agent.players.sampler.config
    objective = make_objective(config)
    policy = train_step.Policy(graphdef, agent.players.chat.forbidden_V(model_config.vocab), mesh)
    sizes = buckets(config, model_config)
    return Programs(
        log_probs=train_step.make_log_probs(policy, objective, buckets=sizes),
        old_log_probs=train_step.make_log_probs(policy, objective, buckets=sizes, later_updates=True),
        assign_credit=assign_credit.make_assign_credit(mesh, credit_settings(config, list(agent.players.runner.tools))),
        update=train_step.make_update(policy, chain, schedule, objective, state, buckets=sizes),
        index_U=[sharding.put_replicated(np.int32(u), mesh) for u in range(objective.updates_per_batch)],
        buckets=sizes,
    )


# Settings: only here is a config converted to the frozen objects that the packages take.


def picked(kind: type, section: ConfigDict, **others: Any) -> Any:
    """Return a settings dataclass filled from the fields of the same name in a config's section, and `others`."""
    names = {field.name for field in dataclasses.fields(kind)} - others.keys()
    return kind(**{name: section[name] for name in names if name in section}, **others)


def tapo_settings(config: ConfigDict) -> tapo.Settings:
    """Return TAPO's settings. Embedded texts are compared by cosine."""
    text = "cosine" if config.tapo.text == "embedding" else config.tapo.text
    return picked(tapo.Settings, config.tapo, text=text)


def adaptive_settings(config: ConfigDict, tools: Sequence[str]) -> adaptive.Settings | None:
    """Return the settings of TAPO's adaptive thresholds; None if the thresholds are fixed."""
    t = config.tapo
    if config.algorithm.credit != "tapo" or not t.adaptive_theta:
        return None
    return adaptive.Settings(tuple(tools), quantile=t.adaptive_quantile, rate=t.adaptive_rate)


def credit_settings(config: ConfigDict, tools: Sequence[str]) -> assign_credit.Settings:
    """Return the settings of the advantages. tools: the names of the tools."""
    a = config.algorithm
    return picked(
        assign_credit.Settings,
        a,
        max_length=config.rollout.max_length,
        tapo=tapo_settings(config),
        adaptive=adaptive_settings(config, tools),
        gigpo=gigpo.Settings(omega=a.gigpo_omega, discount=a.gigpo_discount),
    )


def make_objective(config: ConfigDict) -> train_step.Objective:
    """Return the objective that an update minimises."""
    return train_step.Objective(
        loss=picked(losses.Settings, config.algorithm, algorithm=config.algorithm.loss),
        kl_coef=config.algorithm.kl_coef,
        kl_estimator=config.algorithm.kl_estimator,
        importance_cap=config.algorithm.importance_cap,
        temperature=config.rollout.temperature,
        updates_per_batch=config.train.updates_per_batch,
        micro_batches=config.train.micro_batches,
        remat=config.model.remat,
        logp_chunk=config.model.logp_chunk,
        train_vision=config.model.train_vision,
        lora=config.model.lora_rank > 0,
    )


def make_optimizer(config: ConfigDict, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer's chain and schedule for a run of `total_steps` steps."""
    return optimizer.make_optimizer(
        picked(optimizer.Settings, config.optimizer),
        total_steps=total_steps,
        updates_per_step=config.train.updates_per_batch,
        train_vision=config.model.train_vision,
        lora=config.model.lora_rank > 0,
    )


def buckets(config: ConfigDict, model_config: Qwen3VLConfig) -> tuple[tuple[int, int], ...]:
    """Return pairs of train.length_buckets and patch_buckets, including the largest that an episode can have."""
    longest = config.rollout.max_length
    most = most_patches(config.rollout.max_image_tokens, longest, model_config.vision.merge)
    lengths = (*(n for n in config.train.length_buckets if n < longest), longest)
    return micro_batches.pair_buckets(lengths, (*(n for n in config.train.patch_buckets if n < most), most))


def make_encoder(config: ConfigDict, agent: Agent, params: Any) -> CallEncoder:
    """Return the encoder of tool calls. It embeds texts with the embedding table that the run begins with."""
    t, embed, features = config.tapo, None, config.tapo.features
    if config.algorithm.credit == "tapo" and t.text == "embedding":
        table_VxD = sharding.to_host(params["embedding"])
        tokenizer = agent.players.chat.tokenizer
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        embed = embedding.text_embedding(encode, embedding.mean_of_table(table_VxD))
        features = table_VxD.shape[1]
    return CallEncoder(
        steps=t.max_tool_steps,
        slots=tapo.parameter_slots(agent.players.runner.resolved),
        features=features,
        embed=embed,
        memory=memory.Settings(steps=t.memory_steps, size=t.memory_size, discount=t.memory_discount),
        anchor_turns=config.rollout.max_turns if config.algorithm.credit == "gigpo" else 0,
        may_fail=config.reward.source != "rewards" or bool(config.reward.judge.endpoint),
    )
