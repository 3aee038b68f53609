"""A config and a model -> the compiled programs of a run, and what encodes its calls."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tapo_jax import sharding, tapo
from tapo_jax.agent import Agent
from tapo_jax.learn import assign_credit, micro_batches, train_step
from tapo_jax.learn.outcomes import Outcomes
from tapo_jax.learn.state import TrainState
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.inputs import most_patches
from tapo_jax.tapo import embedding


@dataclasses.dataclass(frozen=True)
class Programs:
    """Signatures in `train_step.py` and `assign_credit.py`. index_U: the numbers of the mini-batches, on the device.

    old_log_probs: of the rows of the second and later updates of a batch; log_probs: of all, for the reference model.

    rungs: (tokens, patches) that rows may be cut to, ascending; batches have the last one, which holds any episode.
    """

    log_probs: Callable
    old_log_probs: Callable
    prepare: Callable
    update: Callable
    index_U: list[jax.Array]
    rungs: tuple[tuple[int, int], ...]


def make_programs(
    config: ConfigDict,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    agent: Agent,
    mesh: Mesh,
) -> Programs:
    a, t, objective = config.algorithm, config.tapo, train_step.make_objective(config)
    fields = (
        "theta",
        "alpha_min",
        "beta",
        "cluster",
        "cluster_theta",
        "aggregate",
        "support",
        "clip",
        "scope",
        "control",
    )
    transfer = {name: t[name] for name in fields} | {"text": "cosine" if t.text == "embedding" else t.text}
    adaptive = {"tools": list(agent.runner.tools), "quantile": t.adaptive_quantile, "rate": t.adaptive_rate}
    gigpo = {"discount": t.gigpo_discount, "omega": t.gigpo_omega}
    if t.control == "gigpo":
        transfer["control"] = "none"
    model_config = agent.sampler.config
    forbidden_V = agent.chat.forbidden_V(model_config.vocab)
    sizes = rungs(config, model_config)
    return Programs(
        log_probs=train_step.make_log_probs(graphdef, objective, forbidden_V, mesh, rungs=sizes),
        old_log_probs=train_step.make_log_probs(
            graphdef, objective, forbidden_V, mesh, rungs=sizes, later_updates=True
        ),
        prepare=assign_credit.make_prepare(
            mesh,
            estimator=a.estimator,
            dynamic_sampling=a.dynamic_sampling,
            overlong_buffer=a.overlong_buffer,
            max_length=config.rollout.max_length,
            transfer=transfer if t.enabled else None,
            adaptive=adaptive if state.thresholds is not None else None,
            gigpo=gigpo if t.enabled and t.control == "gigpo" else None,
        ),
        update=train_step.make_update(graphdef, optimizer, schedule, objective, forbidden_V, state, mesh, rungs=sizes),
        index_U=[sharding.put_replicated(np.int32(u), mesh) for u in range(objective.updates_per_batch)],
        rungs=sizes,
    )


def rungs(config: ConfigDict, model_config: Qwen3VLConfig) -> tuple[tuple[int, int], ...]:
    """train.length_buckets and patch_buckets with the largest that an episode can have, in pairs."""
    longest, most = (
        config.rollout.max_length,
        most_patches(config.rollout.max_image_tokens, config.rollout.max_length, model_config.vision.merge),
    )
    lengths = (*(n for n in config.train.length_buckets if n < longest), longest)
    return micro_batches.make_rungs(lengths, (*(n for n in config.train.patch_buckets if n < most), most))


def make_outcomes(config: ConfigDict, agent: Agent, params: Any) -> Outcomes:
    """What encodes the calls. Embedded texts are compared by the embedding table that the run begins with."""
    t, embed, features = config.tapo, None, config.tapo.features
    if t.enabled and t.text == "embedding":
        table_VxD = sharding.to_host(params["embedding"])
        encode = lambda text: agent.chat.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        embed = embedding.text_embedding(encode, embedding.mean_of_table(table_VxD))
        features = table_VxD.shape[1]
    return Outcomes(
        steps=t.steps,
        turns=config.rollout.max_turns,
        features=features,
        slots=tapo.parameter_slots(agent.runner.schemas),
        embed=embed,
        memory_steps=t.memory_steps,
        memory_size=t.memory_size,
        discount=t.memory_discount,
    )
