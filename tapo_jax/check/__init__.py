"""Check a config for all mistakes that can be found before anything is compiled. Raises UserError."""

from ml_collections import ConfigDict

from tapo_jax.atlas import closed
from tapo_jax.atlas.scene import fits
from tapo_jax.check.ranges import FREE, check_fields
from tapo_jax.config import UserError, flat

__all__ = ["check", "check_rows"]


def check(config: ConfigDict) -> None:
    """Check an RL config for all mistakes that can be found without a device or a file. Raises UserError."""
    for name in FREE:
        section, _, field = name.removesuffix(".").rpartition(".")
        part = config.get(section)
        if isinstance(part, ConfigDict) and not isinstance(part.get(field), ConfigDict):
            raise UserError(f"{section}.{field} is {part.get(field)!r}: it must be a ConfigDict of names and values.")
    check_fields(flat(config))
    rollout = config.rollout
    if config.total_steps <= 0 and config.total_epochs <= 0:
        raise UserError("total_steps and total_epochs are both 0: set one of them.")
    if config.tapo.max_tool_steps < rollout.max_turns:
        raise UserError(
            f"tapo.max_tool_steps is {config.tapo.max_tool_steps} and rollout.max_turns is {rollout.max_turns}: "
            "set tapo.max_tool_steps to at least the number of turns, so that every tool step has a slot."
        )
    if config.tools.parallel_calls > 1 and config.tapo.max_tool_steps < rollout.max_turns * config.tools.parallel_calls:
        raise UserError(
            f"tapo.max_tool_steps is {config.tapo.max_tool_steps}, rollout.max_turns {rollout.max_turns} and "
            f"tools.parallel_calls {config.tools.parallel_calls}: set tapo.max_tool_steps to at least the product of "
            "the other two, so that every tool step has a slot."
        )
    if config.algorithm.credit == "gigpo" and rollout.max_think_tokens:
        raise UserError(
            f"algorithm.credit is 'gigpo' and rollout.max_think_tokens {rollout.max_think_tokens}: GiGPO tells turns "
            "apart by the tokens between them, and a thought closed by force has such tokens inside; set it to 0."
        )
    if rollout.carry > config.data.prompts_per_step:
        raise UserError(
            f"rollout.carry is {rollout.carry} and data.prompts_per_step {config.data.prompts_per_step}: carry at most "
            "as many groups as a step trains on."
        )
    if rollout.pages and not rollout.page_size:
        raise UserError(
            f"rollout.pages is {rollout.pages} and rollout.page_size 0: set the tokens of a page, or pages to 0."
        )
    if config.algorithm.overlong_buffer > rollout.max_length:
        raise UserError(
            f"algorithm.overlong_buffer is {config.algorithm.overlong_buffer} and rollout.max_length is "
            f"{rollout.max_length}: the penalty grows over the last tokens before max_length, so choose fewer."
        )
    if config.data.outline[0] > config.data.outline[1]:
        raise UserError(f"data.outline is {config.data.outline}: give the smallest outline first, then the largest.")
    check_atlas(config.data)
    if config.data.prompts_per_step % config.tapo.chunks:
        raise UserError(
            f"tapo.chunks is {config.tapo.chunks} and data.prompts_per_step {config.data.prompts_per_step}: choose a "
            "divisor."
        )
    if list(config.log.profile_steps) != sorted(config.log.profile_steps):
        raise UserError(f"log.profile_steps is {config.log.profile_steps}: give the first step, then the last.")
    if config.model.lora_rank and not config.model.lora_modules:
        raise UserError(
            f"model.lora_rank is {config.model.lora_rank} and model.lora_modules is empty: name the kernels that get "
            "low-rank updates."
        )


def check_atlas(data: ConfigDict) -> None:
    """Check that Atlas can draw its scenes and questions. Raises UserError."""
    if data.source != "atlas":
        return
    if sum(data.mix.values()) <= 0:
        raise UserError("data.mix.open and all its other shares are 0: set the share of at least one kind of question.")
    paired = any(data.mix[kind] > 0 for kind in closed.PAIRS)
    count = max(2, data.outlines) if paired else data.outlines
    if not fits(count, data.outline[0]):
        raise UserError(
            f"data.outline begins with {data.outline[0]} and a scene has {count} outlines (data.outlines, at least two "
            "with questions about pairs), which do not fit beside each other: choose fewer or smaller ones."
        )


def check_rows(*, prompts: int, group_size: int, shards: int, processes: int, updates: int, micro_batches: int) -> None:
    """Check that prompts × group_size rows divide into updates × micro_batches pieces, each over `shards` devices.

    Also checks that the processes divide the prompts. Raises UserError.
    """
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
