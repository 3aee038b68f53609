"""A config against everything that can be known before anything is compiled. Raises UserError."""

from ml_collections import ConfigDict

from tapo_jax import tapo
from tapo_jax.config import UserError, check_choice, check_positive
from tapo_jax.learn import advantages, assign_credit, losses, optimizer
from tapo_jax.models.stack import REMAT
from tapo_jax.tapo import controls, similarity


def check(config: ConfigDict) -> None:
    """Everything about an RL config that can be wrong without looking at a device or a file. Raises UserError."""
    algorithm, train, rollout = config.algorithm, config.train, config.rollout
    check_choice("algorithm.estimator", algorithm.estimator, advantages.ESTIMATORS)
    check_choice("algorithm.loss", algorithm.loss, tuple(losses.LOSSES))
    check_choice("algorithm.credit", algorithm.credit, tuple(assign_credit.CREDIT))
    if algorithm.aggregation is not None:
        check_choice("algorithm.aggregation", algorithm.aggregation, losses.AGGREGATIONS)
    check_choice("algorithm.kl_estimator", algorithm.kl_estimator, losses.KL_ESTIMATORS)
    check_choice("optimizer.schedule", config.optimizer.schedule, optimizer.SCHEDULES)
    check_choice("tapo.cluster", config.tapo.cluster, tuple(tapo.CLUSTERINGS))
    check_choice("tapo.aggregate", config.tapo.aggregate, tapo.AGGREGATES)
    check_choice("tapo.scope", config.tapo.scope, tapo.SCOPES)
    check_choice("tapo.control", config.tapo.control, controls.CONTROLS)
    check_choice("tapo.text", config.tapo.text, (*similarity.TEXT_MEASURES, "embedding"))
    check_choice("model.remat", config.model.remat, tuple(REMAT))
    for field, value in (
        ("data.prompts_per_step", config.data.prompts_per_step),
        ("rollout.group_size", rollout.group_size),
        ("rollout.slots", rollout.slots),
        ("rollout.max_turns", rollout.max_turns),
        ("rollout.max_new_tokens", rollout.max_new_tokens),
        ("rollout.max_length", rollout.max_length),
        ("rollout.temperature", rollout.temperature),
        ("rollout.top_p", rollout.top_p),
        ("train.updates_per_batch", train.updates_per_batch),
        ("train.micro_batches", train.micro_batches),
        ("train.max_nonfinite", train.max_nonfinite),
        ("optimizer.lr", config.optimizer.lr),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
    ):
        check_positive(field, value)
    if config.total_steps <= 0 and config.total_epochs <= 0:
        raise UserError("total_steps and total_epochs are both 0: set one of them.")
    if config.tapo.max_tool_steps < rollout.max_turns:
        raise UserError(
            f"tapo.max_tool_steps is {config.tapo.max_tool_steps} and rollout.max_turns is {rollout.max_turns}: "
            "set tapo.max_tool_steps to at least the number of turns, so that every tool step has a slot."
        )
    if "accuracy" not in config.reward.weights:
        raise UserError(
            "reward.weights has no field 'accuracy': TAPO's success is the accuracy part of the reward, "
            "so give it a weight."
        )


def check_rows(*, prompts: int, group_size: int, shards: int, processes: int, updates: int, micro_batches: int) -> None:
    """The batch of prompts × group_size rows must divide into updates × micro_batches pieces, each over `shards`
    devices."""
    rows = prompts * group_size
    if rows % shards:
        raise UserError(
            f"The batch has {rows} rows (data.prompts_per_step {prompts} × rollout.group_size {group_size}) "
            f"and the mesh splits it {shards} ways (mesh.data × mesh.fsdp): "
            f"change a field so that {shards} divides the rows."
        )
    pieces = updates * micro_batches
    if rows % pieces or (rows // pieces) % shards:
        raise UserError(
            f"The batch of {rows} rows does not divide into train.updates_per_batch {updates} × train.micro_batches "
            f"{micro_batches} pieces of a multiple of {shards} rows (mesh.data × mesh.fsdp): change a field."
        )
    if prompts % processes:
        raise UserError(
            f"data.prompts_per_step is {prompts} and there are {processes} processes: "
            "choose a multiple, because all samples of one prompt are rolled out by one process."
        )
