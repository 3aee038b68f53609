"""Define the range of every config field. A field that is not in the table is an error, and so is a value out of range.

To add a field, add its line to RANGES. The error message is made from the line:

    "rollout.slots": whole(1),      rollout.slots is 0: it must be a whole number of at least 1.
    "tapo.theta": number(0, 1),     tapo.theta is nan: it must be a number from 0 to 1.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping
from typing import Any

from tapo_jax import tapo
from tapo_jax.atlas import closed
from tapo_jax.atlas.scene import COLOURS
from tapo_jax.config import UserError
from tapo_jax.learn import advantages, assign_credit, losses, optimizer
from tapo_jax.models.stack import REMAT
from tapo_jax.tapo import controls, similarity
from tapo_jax.tools import backends
from tapo_jax.tools.schemas import KINDS

INF = math.inf
SEED = 2**31 - 1  # max seed: seeds are passed as 32-bit integers


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that one field may have."""

    kind: str
    """One of "whole", "number", "text", "flag", "choice" or "tuple"."""
    low: float = -INF
    """Lower bound of a number, or of the length of a text or tuple."""
    high: float = INF
    """Upper bound of the same."""
    beyond_low: bool = False
    """Whether the lower bound itself is excluded."""
    beyond_high: bool = False
    """Whether the upper bound itself is excluded."""
    also: tuple = ()
    """Further allowed values, such as None."""
    choices: tuple[str, ...] = ()
    """Values of the kind "choice"."""
    each: "Range | None" = None
    """Range of an element of the kind "tuple"."""


def whole(low: int, high: float = INF, *, also: tuple = ()) -> Range:
    return Range("whole", low, high, also=also)


def number(low: float, high: float = INF, *, also: tuple = ()) -> Range:
    return Range("number", low, high, also=also)


def above(low: float, high: float = INF, *, also: tuple = ()) -> Range:
    """Return the range of a number greater than `low`."""
    return Range("number", low, high, beyond_low=True, also=also)


def below(low: float, high: float) -> Range:
    """Return the range of a number of at least `low` and less than `high`."""
    return Range("number", low, high, beyond_high=True)


def text(low: int = 0) -> Range:
    return Range("text", low)


def choice(*choices: str, also: tuple = ()) -> Range:
    return Range("choice", choices=choices, also=also)


def each(element: Range, low: int = 0, high: float = INF) -> Range:
    """Return the range of a tuple of `low` to `high` elements."""
    return Range("tuple", low, high, each=element)


FLAG = Range("flag")
FLOATS = ("float32", "bfloat16", "float16")

RANGES: dict[str, Range] = {
    "seed": whole(0, SEED),
    "total_steps": whole(0),
    "total_epochs": number(0),
    "data.source": text(1),
    "data.split": text(1),
    "data.prompts_per_step": whole(1),
    "data.dir": text(),
    "data.hops": each(whole(1, 8), 1),
    "data.outlines": whole(1, len(COLOURS)),
    "data.size": whole(32, 4096),
    "data.outline": each(above(0, 0.9), 2, 2),
    "data.world_seed": whole(0, SEED),
    "data.sizes": each(whole(1), 2, 2),
    **{f"data.mix.{kind}": number(0) for kind in ("open", *closed.KINDS)},
    "model.path": text(),
    "model.shape": text(),
    "model.dtype": choice(*FLOATS),
    "model.param_dtype": choice(*FLOATS),
    "model.remat": choice(*REMAT),
    "model.logp_chunk": whole(1),
    "model.train_vision": FLAG,
    "model.lora_rank": whole(0),
    "model.lora_modules": each(text(1)),
    "model.lora_alpha": above(0, also=(None,)),
    "rollout.system": text(),
    "rollout.group_size": whole(1),
    "rollout.slots": whole(1),
    "rollout.page_size": whole(0),
    "rollout.pages": whole(0),
    "rollout.max_turns": whole(1),
    "rollout.max_new_tokens": whole(1),
    "rollout.max_think_tokens": whole(0),
    "rollout.max_length": whole(1),
    "rollout.max_image_tokens": whole(0),
    "rollout.max_pixels": whole(0),
    "rollout.temperature": above(0),
    "rollout.top_p": above(0, 1),
    "rollout.decode_chunk": whole(1),
    "rollout.mesh.data": whole(1, also=(-1,)),
    "rollout.mesh.tensor": whole(0),
    "rollout.carry": whole(0),
    "rollout.max_staleness": whole(1),
    "rollout.tool_wait_s": number(0, also=(INF,)),
    "tools.source": text(1),
    "tools.names": each(text(1)),
    "tools.timeout_s": above(0),
    "tools.retries": whole(0),
    "tools.workers": whole(1),
    "tools.zoom_size": whole(0),
    "tools.image_top_k": whole(1),
    "tools.thumbnails": whole(0),
    "tools.text_top_k": whole(1),
    "tools.text_budget": whole(1),
    "tools.backend": choice(*backends.NAMES),
    "tools.endpoint": text(),
    "tools.requests_per_second": number(0),
    "tools.max_failures": number(0, 1),
    "tools.failure_window": whole(1),
    "tools.visit_budget": whole(1),
    "tools.cache": text(),
    "tools.record": text(),
    "tools.replay": text(),
    "tools.mcp": text(),
    "tools.verl": text(),
    "tools.parallel_calls": whole(1),
    "tools.max_response_tokens": whole(0),
    "reward.source": text(1),
    "reward.workers": whole(1),
    "reward.judge.endpoint": text(),
    "reward.judge.model": text(),
    "reward.judge.key_variable": text(1),
    "reward.judge.concurrency": whole(1),
    "reward.judge.timeout_s": above(0),
    "reward.judge.retries": whole(0),
    "reward.judge.max_failed": number(0, 1),
    "reward.judge.cache": text(),
    "reward.weights.accuracy": number(0),
    "algorithm.credit": choice(*assign_credit.CREDIT),
    "algorithm.gigpo_omega": number(0),
    "algorithm.gigpo_discount": number(0, 1),
    "algorithm.estimator": choice(*advantages.ESTIMATORS),
    "algorithm.loss": choice(*losses.LOSSES),
    "algorithm.clip_low": number(0, 1),
    "algorithm.clip_high": number(0),
    "algorithm.clip_dual": above(1, also=(None,)),
    "algorithm.tau_pos": above(0),
    "algorithm.tau_neg": above(0),
    "algorithm.aggregation": choice(*losses.AGGREGATIONS, also=(None,)),
    "algorithm.kl_coef": number(0),
    "algorithm.kl_estimator": choice(*losses.KL_ESTIMATORS),
    "algorithm.importance_cap": above(0, also=(None,)),
    "algorithm.dynamic_sampling": FLAG,
    "algorithm.overlong_buffer": whole(0),
    "tapo.theta": number(0, 1),
    "tapo.alpha_min": number(0, 1),
    "tapo.beta": number(0),
    "tapo.cluster": choice(*tapo.CLUSTERINGS),
    "tapo.cluster_theta": number(0, 1, also=(None,)),
    "tapo.aggregate": choice(*tapo.AGGREGATES),
    "tapo.support": FLAG,
    "tapo.clip": FLAG,
    "tapo.scope": choice(*tapo.SCOPES),
    "tapo.text": choice(*similarity.TEXT_MEASURES, "embedding"),
    "tapo.features": whole(1),
    "tapo.max_tool_steps": whole(1),
    "tapo.control": choice(*controls.CONTROLS),
    "tapo.chunks": whole(1),
    "tapo.adaptive_theta": FLAG,
    "tapo.adaptive_quantile": number(0, 1),
    "tapo.adaptive_rate": number(0, 1),
    "tapo.memory_steps": whole(0),
    "tapo.memory_size": whole(1),
    "tapo.memory_discount": number(0, 1),
    "optimizer.lr": above(0),
    "optimizer.schedule": choice(*optimizer.SCHEDULES),
    "optimizer.warmup_steps": whole(0),
    "optimizer.b1": below(0, 1),
    "optimizer.b2": below(0, 1),
    "optimizer.weight_decay": number(0),
    "optimizer.grad_clip": number(0),
    "optimizer.vision_lr_multiplier": number(0),
    "train.updates_per_batch": whole(1),
    "train.micro_batches": whole(1),
    "train.max_nonfinite": whole(1),
    "train.length_buckets": each(whole(1)),
    "train.patch_buckets": each(whole(1)),
    "train.warm_up": FLAG,
    "mesh.data": whole(1, also=(-1,)),
    "mesh.fsdp": whole(1, also=(-1,)),
    "mesh.tensor": whole(1, also=(-1,)),
    "export.dtype": choice("", *FLOATS),
    "checkpoint.every": whole(1),
    "checkpoint.minutes": number(0),
    "checkpoint.keep": whole(1),
    "log.episodes_every": whole(1),
    "log.tensorboard": FLAG,
    "log.progress_s": number(0),
    "log.late_s": number(0),
    "log.profile_steps": each(whole(1), 0, 2),
    "compilation_cache": text(),
    "eval.split": text(1),
    "eval.prompts": whole(0),
    "eval.every": whole(0),
    "eval.at_start": FLAG,
    "eval.at_end": FLAG,
    "eval.temperature": number(0),
    "eval.top_p": above(0, 1),
    "eval.top_k": whole(0),
    "eval.min_p": number(0, 1),
    "eval.presence_penalty": number(-2, 2),
    "eval.judge.endpoint": text(),
    "eval.judge.model": text(),
    "eval.judge.key_variable": text(1),
    "eval.judge.concurrency": whole(1),
    "eval.judge.timeout_s": above(0),
    "eval.judge.retries": whole(0),
    "eval.judge.max_failed": number(0, 1),
    "eval.judge.cache": text(),
    "benchmarks.mmsearch": text(),
    "benchmarks.hr_mmsearch": text(),
    "benchmarks.fvqa_test": text(),
    "benchmarks.infoseek": text(),
    "benchmarks.simplevqa": text(),
    "benchmarks.livevqa": text(),
    "benchmarks.mat_search": text(),
    "benchmarks.limit": whole(0),
}

# Sections whose field names the user chooses -> range of such a field, None for any value.
FREE: dict[str, Range | None] = {
    "data.extra.": None,
    "tools.extra.": None,
    "tools.kinds.": choice(*KINDS),
    "tools.request.": None,
    "reward.extra.": None,
    "reward.weights.": number(-INF),
}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise UserError for a field that is missing, unknown or out of its range. fields: a flat config."""
    for name in RANGES:
        if name not in fields:
            raise UserError(
                f"The config has no field {name}: begin with configs/tapo_grpo.py, which has every field, and change "
                "what you need."
            )
    for name, value in fields.items():
        allowed = find(name)
        if allowed is not None and not holds(allowed, value):
            raise UserError(sentence(name, value, allowed))


def find(name: str) -> Range | None:
    """Return the range of a field, None for one that may have any value. Raises UserError for an unknown field."""
    if name in RANGES:
        return RANGES[name]
    for prefix, allowed in FREE.items():
        if name.startswith(prefix):
            return allowed
    close = difflib.get_close_matches(name, RANGES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"{name} has no range: it is misspelt{hint}, or new (then add it to tapo_jax/check/ranges.py).")


def holds(allowed: Range, value: Any) -> bool:
    """Return whether the range allows a value."""
    if any(value is other or (type(value) is type(other) and value == other) for other in allowed.also):
        return True
    if allowed.kind == "flag":
        return isinstance(value, bool)
    if allowed.kind == "choice":
        return isinstance(value, str) and value in allowed.choices
    if allowed.kind == "text":
        return isinstance(value, str) and len(value.strip()) >= allowed.low
    if allowed.kind == "tuple":
        fits = isinstance(value, tuple | list) and allowed.low <= len(value) <= allowed.high
        return fits and all(holds(allowed.each, element) for element in value)
    wanted = numbers.Integral if allowed.kind == "whole" else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
        return False
    over = value > allowed.low if allowed.beyond_low else value >= allowed.low
    return over and (value < allowed.high if allowed.beyond_high else value <= allowed.high)


def sentence(name: str, value: Any, allowed: Range) -> str:
    """Return the error message for a value out of range."""
    if allowed.kind == "choice":
        choices = [*allowed.choices, *(str(other) for other in allowed.also)]
        return f"{name} is {value!r}: choose one of {', '.join(choices)}."
    return f"{name} is {value!r}: it must be {said(allowed)}."


def said(allowed: Range) -> str:
    """Return a range in words."""
    if allowed.kind == "flag":
        return "True or False"
    if allowed.kind == "text":
        return "a text that is not empty" if allowed.low else "a text"
    if allowed.kind == "choice":
        return f"one of {', '.join(allowed.choices)}"
    if allowed.kind == "tuple":
        counts = f"{allowed.low} values" if allowed.low == allowed.high else f"at least {allowed.low} values"
        counts = counts if allowed.low or allowed.high == INF else f"at most {allowed.high} values"
        return f"a tuple of {counts if allowed.low != 1 else 'at least 1 value'}, each {said(allowed.each)}"
    words = "a whole number" if allowed.kind == "whole" else "a finite number" if allowed.high == INF else "a number"
    if allowed.low > -INF and allowed.high < INF:
        if allowed.beyond_low:
            words += f" greater than {allowed.low} and at most {allowed.high}"
        elif allowed.beyond_high:
            words += f" of at least {allowed.low} and less than {allowed.high}"
        else:
            words += f" from {allowed.low} to {allowed.high}"
    elif allowed.low > -INF:
        words += f" greater than {allowed.low}" if allowed.beyond_low else f" of at least {allowed.low}"
    return " or ".join([words, *(str(other) for other in allowed.also)])
