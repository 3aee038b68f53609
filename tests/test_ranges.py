"""Every field of the config has a range, and every value outside of it is one sentence before anything is built.

`python tests/test_ranges.py` prints the table: every field with every value of VALUES, and what becomes of it.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from tapo_jax import check
from tapo_jax.check import ranges
from tapo_jax.config import UserError, beside, flat

CONFIGS = str(Path(__file__).parents[1] / "configs" / "x")
VALUES = (-1, 0, math.nan, "", (), None)
# Values of VALUES that are in range and mean something: all others are refused.
ZERO_IS_FINE = {
    "seed", "total_epochs", "data.world_seed", "model.lora_rank", "rollout.max_image_tokens", "rollout.max_pixels",
    "rollout.max_think_tokens", "rollout.mesh.tensor", "rollout.carry", "checkpoint.minutes",
    "log.progress_s", "log.late_s",
    "rollout.page_size", "rollout.pages",
    "tools.requests_per_second", "tools.max_failures",
    "rollout.tool_wait_s", "tools.retries", "tools.thumbnails", "algorithm.gigpo_omega", "algorithm.gigpo_discount",
    "algorithm.clip_low", "algorithm.clip_high", "algorithm.kl_coef", "algorithm.overlong_buffer", "tapo.theta",
    "tapo.alpha_min", "tapo.beta", "tapo.cluster_theta", "tapo.adaptive_quantile", "tapo.adaptive_rate",
    "tapo.memory_steps", "tapo.memory_discount", "optimizer.warmup_steps", "optimizer.b1", "optimizer.b2",
    "optimizer.weight_decay", "optimizer.grad_clip", "optimizer.vision_lr_multiplier", "eval.prompts", "eval.every",
    "eval.temperature", "eval.top_k", "eval.min_p", "eval.presence_penalty", "benchmarks.limit",
    "reward.weights.accuracy", "reward.weights.format", "tools.max_response_tokens", "tools.zoom_size",
    *(f"data.mix.{kind}" for kind in ("larger", "populous", "continent", "position", "border")),
    "reward.judge.retries", "eval.judge.retries", "reward.judge.max_failed", "eval.judge.max_failed",
}  # fmt: skip
NONE_IS_FINE = {
    "model.lora_alpha", "algorithm.clip_dual", "algorithm.importance_cap", "algorithm.aggregation",
    "tapo.cluster_theta",
}  # fmt: skip
EMPTY_TEXT_IS_FINE = {
    "data.dir", "model.path", "model.shape", "rollout.system", "export.dtype", "tools.endpoint", "tools.cache",
    "tools.record", "tools.replay", "tools.mcp", "tools.verl", "compilation_cache", "benchmarks.mmsearch",
    "benchmarks.hr_mmsearch", "benchmarks.fvqa_test", "benchmarks.infoseek", "benchmarks.simplevqa",
    "benchmarks.livevqa", "benchmarks.mat_search",
    *(f"{section}.judge.{field}" for section in ("reward", "eval") for field in ("endpoint", "model", "cache")),
}  # fmt: skip
EMPTY_TUPLE_IS_FINE = {
    "model.lora_modules", "tools.names", "train.length_buckets", "train.patch_buckets", "log.profile_steps",
}  # fmt: skip
MINUS_ONE_IS_FINE = {
    "mesh.data", "mesh.fsdp", "mesh.tensor", "reward.weights.format", "rollout.mesh.data", "eval.presence_penalty",
}  # fmt: skip


def config(arg: str = "", name: str = "tapo_grpo.py") -> ConfigDict:
    return beside(CONFIGS, name)(arg)


def put(c: ConfigDict, name: str, value: Any) -> ConfigDict:
    """Set one field, whatever the type of its default."""
    section, _, field = name.rpartition(".")
    part = c[section] if section else c
    with part.ignore_type(), part.unlocked():
        part[field] = value
    return c


def outcome(name: str, value: Any) -> str:
    """What `check` says about the complete config with one field changed: "runs", or its sentence."""
    try:
        check.check(put(config(), name, value))
    except UserError as error:
        return str(error)
    return "runs"


def fine(name: str, value: Any) -> bool:
    if value is None:
        return name in NONE_IS_FINE
    if value == "":
        return name in EMPTY_TEXT_IS_FINE
    if value == ():
        return name in EMPTY_TUPLE_IS_FINE
    if value == 0:
        return name in ZERO_IS_FINE
    return value == -1 and name in MINUS_ONE_IS_FINE


def test_every_field_of_the_config_has_a_range():
    for name in flat(config()):
        ranges.find(name)  # raises for a field without one
    assert set(ranges.RANGES) <= set(flat(config()))


@pytest.mark.parametrize("name", flat(config()))
def test_one_wrong_value_is_one_sentence_that_names_the_field(name):
    for value in VALUES:
        found = outcome(name, value)
        if fine(name, value):
            assert found == "runs", found
        else:
            assert name in found and found.endswith((".", "?")) and "\n" not in found, f"{name}={value!r}: {found}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**31), ("seed", True), ("seed", 1.0), ("rollout.top_p", 1.5), ("rollout.slots", True),
        ("optimizer.lr", math.inf), ("rollout.tool_wait_s", math.nan), ("optimizer.b2", 1.0), ("tapo.clip", 1),
        ("rollout.carry", 1000), ("rollout.pages", 8),
        ("tapo.theta", "0.7"), ("data.hops", 1), ("data.hops", (1, "2")), ("data.hops", (True,)), ("data.hops", "1"),
        ("data.sizes", (1, 2, 3)), ("data.outline", (0.3, 0.2)), ("data.outlines", 7), ("tools.names", "zoom"),
        ("algorithm.clip_dual", 1.0), ("tapo.chunks", 3), ("algorithm.overlong_buffer", 10_000), ("mesh.data", 0),
        ("mesh.fsdp", -2), ("reward.weights.format", math.nan), ("reward.weights.other", "much"), ("data.extra", None),
        ("reward.weights", 1.0), ("model.dtype", "int8"), ("tools.source", " "), ("eval.prompts", -1),
    ],
)  # fmt: skip
def test_other_kinds_of_wrong_values_are_one_sentence_too(name, value):
    found = outcome(name, value)
    assert name in found and "\n" not in found


def test_infinity_and_large_seeds_are_taken_where_they_mean_something():
    assert outcome("rollout.tool_wait_s", math.inf) == "runs"
    assert outcome("seed", 2**31 - 1) == "runs"
    assert outcome("reward.weights.length", -0.5) == "runs"


def test_a_field_that_is_missing_or_unknown_is_named():
    c = config()
    del c.tapo.theta
    with pytest.raises(UserError, match="The config has no field tapo.theta: begin with configs/tapo_grpo.py"):
        check.check(c)
    assert outcome("rollout.max_turn", 3) == (
        "rollout.max_turn has no range: it is misspelt (did you mean rollout.max_turns?), or new "
        "(then add it to tapo_jax/check/ranges.py)."
    )
    assert outcome("data.extra.anything", object()) == "runs"


@pytest.mark.parametrize("size", ["qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b"])
def test_the_recipes_are_in_range(size):
    check.check(config(size))


def test_all_rows_of_the_sweeps_are_in_range():
    for row in beside(CONFIGS, "ablations.py", "ROWS"):
        check.check(config(f"row={row}", "ablations.py"))


def test_gigpo_with_a_budget_of_thoughts_is_refused():
    c = put(config(), "rollout.max_think_tokens", 64)
    assert outcome("algorithm.credit", "gigpo") == "runs"
    with pytest.raises(UserError, match=r"algorithm\.credit is 'gigpo' and rollout\.max_think_tokens 64"):
        check.check(put(c, "algorithm.credit", "gigpo"))


def table() -> str:
    """Every field × every value of VALUES, as Markdown: "runs", or "refused"."""
    heads = [repr(value) for value in VALUES]
    lines = [f"| field | {' | '.join(heads)} |", "|---|" + "---|" * len(VALUES)]
    for name in flat(config()):
        cells = ["runs" if outcome(name, value) == "runs" else "refused" for value in VALUES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
