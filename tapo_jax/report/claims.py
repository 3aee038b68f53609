"""Judge each claim of the paper (arXiv 2606.05784), and the controls, from a sweep.

The rule. A claim is a number for every seed and a bound, usually a difference paired by seed and 0. It **holds** if the
95 % bootstrap interval of the mean over seeds and Student's are both on the claimed side of the bound, **does not
hold** if both are on the other side, and is **not decided** otherwise or with fewer than three seeds. A claim of
several parts ("all betas help") holds if every part does, and does not hold if one part does not. There is no
correction for multiple comparisons: of twenty differences that are truly 0, one is expected to look significant.

A seed whose run failed has no accuracy and is in no pair; the tables count it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tapo_jax.report.plots import smooth
from tapo_jax.report.results import AT, MIN_SEEDS, PUBLISHED, Result, Sweep, assigns_credit
from tapo_jax.report.statistics import mean_of, student

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
SHARE_OF_TIME = 0.0006
GAINS = {"grpo": "+8.7 % relative", "sapo": "up to +4.4 % relative", "gspo": "an improvement"}
DYNAMICS = {  # over the last third of the steps: metric -> claim, unit, what is published
    "reward/accuracy": ("Accuracy in training is higher at the end than without TAPO", "accuracy", ""),
    "loss/entropy": ("Entropy is higher at the end than without TAPO", "nats", "yes"),
    "rollout/written": ("Responses are longer at the end than without TAPO", "tokens", "yes"),
    "tools/calls": ("More tools are called at the end than without TAPO", "calls", "yes"),
}
CONTROLS = {
    "shuffled": "shuffled witnesses", "zero_tools": "never punishing a tool step of a failure", "gigpo": "GiGPO",
}  # fmt: skip


def claims(sweep: Sweep, step: float) -> list[dict[str, Any]]:
    """Return one dict for each claim that the rows of this sweep can judge.

    step: the step at which held-out accuracies are compared.

    Keys: claim, verdict, mean, interval, student, values (over seeds), seeds, unit, rows, paper (the published result,
    "" for this project's own claims) and parts.
    """
    configs = {row: next(iter(seeds.values())).config for row, seeds in sweep.results.items()}
    published = {sweep.base[row]: row for row in configs if row in sweep.base and is_published(configs[row])}
    accuracy = lambda result: result.at_step(step)  # noqa: E731
    found: list[dict[str, Any] | None] = []
    for base in published:
        for unit, text in (("trajectories", "the failing trajectories"), ("actions", "their tool calls")):
            found.append(misassigned(sweep, base, unit, f"{base}: over half of {text} could be credited"))
    for base, row in published.items():
        loss = configs[base].get("algorithm.loss", "")
        paper = GAINS.get(loss, "") if base == loss else ""
        about = {"claim": f"TAPO improves {base}", "unit": "accuracy", "paper": paper, "ratio": True}
        found.append(compared(sweep, row, base, accuracy, **about))
        about = {"claim": f"TAPO improves {base}: area under the held-out curve", "unit": "accuracy", "ratio": True}
        found.append(compared(sweep, row, base, lambda result: area(result, step), **about))
    for row, config in configs.items():
        reference = sweep.reference.get(row)
        if reference is not None and is_published(configs[reference]):
            found.append(ablated(sweep, row, reference, config, accuracy))
            if config.get("tapo.clip") is False:
                found.append(unstable(sweep, row, reference))
    found += betas(sweep, configs, published, accuracy)
    for base, row in published.items():
        for name, (text, unit, paper) in DYNAMICS.items():
            late = lambda result, name=name: ending(result, name)  # noqa: E731
            found.append(compared(sweep, row, base, late, claim=f"{base}: {text}", unit=unit, paper=paper))
    found.append(cost(sweep, configs))
    return [claim for claim in found if claim is not None]


def is_published(config: Mapping[str, Any]) -> bool:
    """Return whether TAPO is on and as published; a field that the config lacks counts as published."""
    same = all(config.get(name, value) == value for name, value in PUBLISHED.items())
    return same and assigns_credit(config)


def decided(value_N: Sequence[float], *, bound: float = 0.0, above: bool = True, **about: Any) -> dict[str, Any] | None:
    """Return the claim that the mean is above (or below) a bound, by the rule; None without a seed."""
    if not len(value_N):
        return None
    found = {"paper": "", "parts": []} | about | mean_of(value_N) | {"student": student(value_N), "bound": bound}
    found["seeds"] = len(value_N)
    intervals = [found["interval"], found["student"]]
    verdict = OPEN
    if len(value_N) >= MIN_SEEDS and all(low > bound for low, _ in intervals):
        verdict = HOLDS if above else FAILS
    elif len(value_N) >= MIN_SEEDS and all(high < bound for _, high in intervals):
        verdict = FAILS if above else HOLDS
    return found | {"verdict": verdict}


def compared(
    sweep: Sweep, row: str, other: str, value: Callable[[Result], float | None], *, ratio: bool = False, **about: Any
) -> dict[str, Any] | None:
    """Return the claim that a row's value is above another's, paired by seed.

    ratio: also add `relative`, the difference divided by the other's mean.
    """
    both = sweep.results[row], sweep.results[other]
    pairs = [tuple(value(results[seed]) for results in both) for seed in sorted(both[0].keys() & both[1].keys())]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    found = decided([ours - theirs for ours, theirs in pairs], rows=[row, other], **about)
    if found is not None and ratio and (whole := sum(theirs for _, theirs in pairs)) > 0:
        found["relative"] = sum(ours - theirs for ours, theirs in pairs) / whole
    return found


def misassigned(sweep: Sweep, base: str, unit: str, claim: str) -> dict[str, Any] | None:
    """Judge the paper's first figure over all steps of the runs without TAPO, at the threshold that TAPO would use."""
    values = []
    for result in sweep.results[base].values():
        name = f"tapo/correctable_{unit}{AT}{float(result.config.get('tapo.theta', PUBLISHED['tapo.theta']))}"
        if len(result.curves.get(name, ())):
            values.append(float(np.mean([value for _, value in result.curves[name]])))
    return decided(values, bound=0.5, claim=claim, unit="share", rows=[base], paper="over half")


def ablated(
    sweep: Sweep, row: str, reference: str, config: Mapping[str, Any], accuracy: Callable[[Result], float]
) -> dict[str, Any] | None:
    """Return the claim that TAPO as published beats this row: no support, exact matches only, or a control."""
    control = "gigpo" if config.get("algorithm.credit") == "gigpo" else config.get("tapo.control", "none")
    claim, paper = "", ""
    if config.get("tapo.support") is False:
        claim, paper = "Support helps (TAPO over TAPO without it)", "−4.71 % relative without it"
    elif control in CONTROLS:
        claim = f"TAPO beats {CONTROLS[control]}"
    elif config.get("tapo.theta") == 1:
        claim = "TAPO beats exact matches alone"
    if not claim:
        return None
    return compared(sweep, reference, row, accuracy, claim=claim, unit="accuracy", paper=paper, ratio=True)


def unstable(sweep: Sweep, row: str, reference: str) -> dict[str, Any] | None:
    """Return the claim that training accuracy falls further below its earlier best without the clip.

    A run of either row whose updates were not finite counts as a fall of 1; a run that failed for another reason is in
    no pair.
    """

    def falls(name: str) -> dict[int, float | None]:
        broken = {seed: 1.0 for other, seed, why in sweep.failed if other == name and "finite" in why}
        return {seed: fall(result) for seed, result in sweep.results[name].items()} | broken

    ours, theirs = falls(row), falls(reference)
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    values = [mine - other for mine, other in pairs if mine is not None and other is not None]
    claim = "Without the clip training is unstable (accuracy falls further from its best)"
    return decided(values, claim=claim, unit="accuracy", rows=[row, reference], paper="unstable")


def betas(
    sweep: Sweep, configs: Mapping[str, Mapping[str, Any]], published: Mapping[str, str], accuracy: Callable
) -> list[dict[str, Any] | None]:
    """Return the claims "all betas help" and "0.8 is the best" for every base with at least three betas."""
    found: list[dict[str, Any] | None] = []
    for base, centre in published.items():
        as_centre = lambda config: is_published(config | {"tapo.beta": PUBLISHED["tapo.beta"]})  # noqa: E731
        rows = [row for row in configs if sweep.base.get(row) == base and as_centre(configs[row])]
        rows.sort(key=lambda row: configs[row].get("tapo.beta", PUBLISHED["tapo.beta"]))
        if len(rows) < 3:
            continue
        named = {row: f"beta {configs[row]['tapo.beta']:g}" for row in rows}
        helps = [compared(sweep, row, base, accuracy, claim=named[row], unit="accuracy") for row in rows]
        found.append(together(f"{base}: all betas help", helps, "all of 0.2 to 1.2"))
        others = [row for row in rows if row != centre]
        beats = [compared(sweep, centre, row, accuracy, claim=f"over {named[row]}", unit="accuracy") for row in others]
        found.append(together(f"{base}: beta 0.8 is the best", beats, "0.8"))
    return found


def together(claim: str, parts: Sequence[dict[str, Any] | None], paper: str) -> dict[str, Any] | None:
    """Return a claim that is the conjunction of its parts; its numbers are those of the weakest part."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    verdicts = {part["verdict"] for part in known}
    verdict = FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} and len(known) == len(parts) else OPEN
    weakest = min(known, key=lambda part: part["mean"])
    rows = list(dict.fromkeys(row for part in known for row in part["rows"]))
    return weakest | {"claim": claim, "verdict": verdict, "parts": known, "paper": paper, "rows": rows}


def cost(sweep: Sweep, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Judge TAPO's share of a step's time (median over steps), for each seed the mean over the rows with TAPO."""
    by_seed: dict[int, list[float]] = {}
    rows = [row for row in configs if assigns_credit(configs[row])]
    for row in rows:
        for seed, result in sweep.results[row].items():
            if result.tapo_share is not None:
                by_seed.setdefault(seed, []).append(result.tapo_share)
    values = [float(np.mean(by_seed[seed])) for seed in sorted(by_seed)]
    claim = "TAPO costs less than 0.06 % of the training time"
    return decided(values, bound=SHARE_OF_TIME, above=False, claim=claim, unit="share", rows=rows, paper="0.06 %")


# Values of one run.


def ending(result: Result, name: str) -> float | None:
    """Return the mean of a curve's last third; None if it was not logged."""
    curve = result.curves.get(name, ())
    return float(np.mean([value for _, value in curve[-max(1, len(curve) // 3) :]])) if len(curve) else None


def area(result: Result, step: float) -> float | None:
    """Return the mean held-out accuracy from the first evaluation to `step`, None with fewer than two until then.

    Accuracies between two evaluations are interpolated.
    """
    at_N = np.array([at for at, _, _ in result.evals if at <= step])
    if len(at_N) < 2:
        return None
    value_N = np.array([value for _, _, value in result.evals[: len(at_N)]])
    return float(np.trapezoid(value_N, at_N) / (at_N[-1] - at_N[0]))


def fall(result: Result) -> float | None:
    """Return the largest drop of training accuracy (running mean of 5 points) from its best; None if not logged."""
    curve = result.curves.get("reward/accuracy", ())
    if not len(curve):
        return None
    value_N = smooth(np.array([value for _, value in curve], float), 5) if len(curve) >= 5 else np.array(curve)[:, 1]
    return float((np.maximum.accumulate(value_N) - value_N).max())


# As text.


def markdown(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the section; [] if there are no claims."""
    if not found:
        return []
    lines = [
        "",
        "## Claims",
        "",
        "Each is a number for every seed, mostly a difference paired by seed. It holds where the 95 % bootstrap "
        "interval (in brackets) and Student's both lie on its side of the bound (0; for shares the claimed one), does "
        f"not hold where both lie on the other, and is not decided else or with fewer than {MIN_SEEDS} seeds. Where a "
        "claim has parts, the weakest is shown.",
        "",
        "| claim | verdict | measured | seeds | published |",
        "|---|---|---|---:|---|",
    ]
    for claim in found:
        cells = [claim["claim"], f"**{claim['verdict']}**", measured(claim), str(claim["seeds"]), claim["paper"] or "–"]
        lines.append("| " + " | ".join(cells) + " |")
    for claim in found:
        if claim["parts"]:
            parts = ", ".join(f"{part['claim']} {measured(part)} ({part['verdict']})" for part in claim["parts"])
            lines += ["", f"{claim['claim']}: {parts}."]
    return lines


def measured(claim: Mapping[str, Any]) -> str:
    """Return text such as "+1.2 [+0.3, +2.0] points, +4.0 % relative"."""
    factor, form, unit = {"accuracy": (100, "+.1f", " points"), "share": (100, ".3g", " %")}.get(
        claim["unit"], (1, "+.3g", f" {claim['unit']}")
    )
    text = format(factor * claim["mean"], form)
    if claim["interval"] is not None:
        text += f" [{', '.join(format(factor * value, form) for value in claim['interval'])}]"
    relative = f", {100 * claim['relative']:+.1f} % relative" if "relative" in claim else ""
    return text + unit + relative
