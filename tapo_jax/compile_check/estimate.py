"""How fast a rollout and a whole step can be, from the bounds of their programs."""

from collections.abc import Mapping
from typing import Any

from tapo_jax.compile_check.programs import Abstract

COLUMNS = (
    "model", "chips", "rollout.mesh", "tokens/s/chip, full", "a third full", "decode is limited by", "written",
    "reshard", "extend", "decode", "rollout", "updates", "step",
)  # fmt: skip


def speed(reports: Mapping[str, Any], run: Abstract, written: int) -> dict[str, Any]:
    """Return the speed of decoding and the seconds of a rollout and of a step; empty without a decoding program.

    Every conversation ends with rollout.max_length tokens, of which `written` are drawn and all others are extended:
    nothing is shared, nothing waits, all slots are busy. While it grows evenly, a slot is half full on the average.

    reports: program -> its `check.Report`. Seconds of a part whose program is not among them, or did not compile, are
        missing, and so are the sums that need it.
    run: the run.
    written: tokens that the policy writes in an episode.
    """
    decode = reports.get("decode")
    if decode is None or decode.error:
        return {}
    config, chips = run.config, run.mesh.size
    episodes = config.data.prompts_per_step * config.rollout.group_size
    chosen = config.rollout.mesh
    found: dict[str, Any] = {
        "tensor": chosen.tensor,
        "data": chips // chosen.tensor if chosen.tensor else 0,
        "written": written,
        "tokens_per_s_per_chip": decode.tokens / decode.seconds / chips,
        "tokens_per_s_per_chip_third": decode.tokens / decode.seconds_filled["third"] / chips,
        "limit": limit(decode),
        "decode": episodes * written / decode.tokens * decode.seconds_filled["half"],
    }
    compiled = {name: report for name, report in reports.items() if not report.error}
    found["reshard"] = compiled["reshard"].seconds if "reshard" in compiled else 0.0
    if "extend" in compiled:
        others = max(config.rollout.max_length - written, 0)
        found["extend"] = episodes * others / compiled["extend"].tokens * compiled["extend"].seconds
        found["rollout"] = found["reshard"] + found["extend"] + found["decode"]
    if "train" in compiled:
        found["updates"] = config.train.updates_per_batch * compiled["train"].seconds
        found["updates"] += compiled["log_probs"].seconds if "log_probs" in compiled else 0.0
    if "rollout" in found and "updates" in found:
        found["step"] = found["rollout"] + found["updates"]
    return found


def limit(report: Any) -> str:
    """Return what limits a program: "links", "memory" or "arithmetic"."""
    if report.seconds_network >= report.seconds:
        return "links"
    return "memory" if report.seconds_memory > report.seconds_flops else "arithmetic"


def row(found: Mapping[str, Any], model: str, chips: str) -> list[str]:
    """Return a line of the table; parts whose programs were not compiled are empty."""
    parts = (found.get(name) for name in ("reshard", "extend", "decode", "rollout", "updates", "step"))
    return [
        model,
        chips,
        f"{found['data']} × {found['tensor']}" if found["tensor"] else "as in training",
        f"{found['tokens_per_s_per_chip']:,.0f}",
        f"{found['tokens_per_s_per_chip_third']:,.0f}",
        found["limit"],
        f"{found['written']:,}",
        *("" if seconds is None else f"{seconds:.3g} s" for seconds in parts),
    ]
