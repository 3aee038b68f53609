"""Predict whether TAPO should help a run: measure the policy of its first episodes and train it in the laboratory."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapo_jax import records
from tapo_jax.lab import questions, recorded
from tapo_jax.lab.methods import Method
from tapo_jax.lab.recorded import Measured
from tapo_jax.lab.worlds import World
from tapo_jax.report.plots import INK, new_figure, title

RATES = (0.01, 0.02, 0.04, 0.08)
"""Learning rates of Adam, the trainer's optimiser. The verdict is about the slowest rate at which the base gets
half-way: a large model takes hundreds of updates too."""
PLAIN_RATES = (0.35, 0.7, 1.4, 2.8)
"""Learning rates of plain gradient ascent, which does not scale up the rest of a gradient that TAPO has reduced."""
UPDATES = 300
SEEDS = range(32)
MAP_GUESS, MAP_HEADROOM = (0.0, 0.2, 0.4, 0.6, 0.8), (0.05, 0.15, 0.3, 0.5)
MAP_SEEDS = range(16)
LEAST_GAIN, LEAST_SAVED = 0.01, 0.1
"""A training run would not show a difference smaller than a point of accuracy and a tenth of the updates."""
FRACTIONS = ((0.1, "a tenth"), (0.2, "a fifth"), (0.25, "a quarter"), (1 / 3, "a third"), (0.5, "half"))
FRACTIONS += ((2 / 3, "two thirds"), (0.75, "three quarters"))


def predict(run: Path, out: Path, *, least: int = 256) -> str:
    """Measure a run's first `least` recorded episodes, train what was measured, write predict.json and predict.png.

    Returns the report as text. Raises UserError if a run cannot be measured.
    """
    config = recorded.settings(run)
    method = method_of(config)
    measured = recorded.measure(recorded.read(run, least), float(method.theta))
    method = dataclasses.replace(method, group=measured.group, rollouts=_rollouts(config, measured, method))
    world = world_of(measured)
    result = compare(world, method, SEEDS, RATES)
    plain = compare(world, dataclasses.replace(method, optimizer="sgd"), SEEDS, PLAIN_RATES)
    changed = what_if(world, method)
    found_map = diagram(world, method)
    verdict = decide(measured, world, result, changed) + _with_plain(result, plain)
    answer = {
        "measured": dataclasses.asdict(measured) | {"headroom": measured.headroom},
        "world": questions.describe(world),
        "method": dataclasses.asdict(method) | {"rates": RATES},
        "result": result,
        "plain_gradient_ascent": plain,
        "what_if": changed,
        "map": found_map,
        "verdict": verdict,
    }
    (out / "predict.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    draw(answer, out / "predict.png")
    return "\n".join(
        [
            *describe(measured, world, config, run),
            "",
            *_results(result, {"with plain gradient ascent": plain} | changed),
            "",
            verdict,
        ]
    )


def method_of(config: Mapping[str, Any]) -> Method:
    """Return TAPO as the run's config.json sets it; numbers that are missing there are as published."""
    tapo, algorithm = config.get("tapo", {}), config.get("algorithm", {})
    given = {name: tapo[name] for name in ("theta", "alpha_min", "beta", "support", "clip") if name in tapo}
    given |= {name: algorithm[name] for name in ("clip_low", "clip_high", "aggregation") if name in algorithm}
    if "loss" in algorithm:
        given["algorithm"] = algorithm["loss"]
    updates = config.get("train", {}).get("updates_per_batch", 1)
    return Method(optimizer="adam", updates_per_batch=updates, rollouts=8 * updates, **given)


def _rollouts(config: Mapping[str, Any], measured: Measured, method: Method) -> int:
    prompts = config.get("data", {}).get("prompts_per_step", 8)
    rows = prompts * measured.group
    return rows if rows % method.updates_per_batch == 0 else rows * method.updates_per_batch


def world_of(measured: Measured) -> World:
    """Return the world with the measured numbers. The part of p_t that the tool steps do not explain is the reading.

    A tool's skill is used at each of its positions in the chain. If no episode guessed, a guess is taken to be wrong.
    """
    skill_K = np.array([measured.skill[tool].value for tool in measured.chain], np.float32)
    unharmed = float(np.prod(skill_K + (1 - skill_K) * measured.harmless))
    return World(
        guess=measured.guess.value if measured.guess.whole else 0.0,
        lookup=measured.lookup.value,
        skill=skill_K,
        reading=min(0.999, measured.tools.value / unharmed),
        harmless=measured.harmless,
        spread=measured.spread,
        overlap=measured.overlap,
        steps=len(measured.chain),
    )


def compare(world: World, method: Method, seeds: range, rates: Sequence[float]) -> dict[str, Any]:
    pair = {"base": (world, _settings(method, tapo=False)), "TAPO": (world, _settings(method, tapo=True))}
    found = questions.by_rate(pair, rates, seeds, UPDATES)
    return slowest(questions.compare(found["base"], found["TAPO"]))


def slowest(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the comparison at the slowest common rate at which the median base run gets half-way, else the fastest."""
    reached = [one for one in result["common"] if one["updates"][0] is not None]
    return (reached or result["common"][-1:])[0] | {"best": result["best"]}


def what_if(world: World, method: Method) -> dict[str, dict[str, Any]]:
    """Return the same comparison with one thing changed (or both), to see which change would make a difference."""
    p_t = float(np.prod(world.skill + (1 - world.skill) * world.harmless) * world.reading)
    low_K = np.minimum(world.skill, 0.6).astype(np.float32)
    reading = min(0.999, p_t / float(np.prod(low_K + (1 - low_K) * world.harmless)))
    changes = {
        "tool steps right with .6 at most": dataclasses.replace(world, skill=low_K, reading=reading),
        "a guess is right with 1/3": dataclasses.replace(world, guess=1 / 3),
        "both": dataclasses.replace(world, skill=low_K, reading=reading, guess=1 / 3),
    }
    return {name: compare(changed, method, SEEDS, RATES) for name, changed in changes.items()}


def diagram(world: World, method: Method) -> dict[str, Any]:
    """Return TAPO − base over guess rate × headroom of every tool step, with p_t as measured, at one rate."""
    p_t = float(np.prod(world.skill + (1 - world.skill) * world.harmless) * world.reading)
    cells = {}
    for headroom in MAP_HEADROOM:
        skill_K = np.full_like(world.skill, 1 - headroom)
        reading = p_t / float(np.prod(skill_K + (1 - skill_K) * world.harmless))
        for guess in MAP_GUESS:
            if reading < 1:
                cells[headroom, guess] = dataclasses.replace(world, skill=skill_K, reading=reading, guess=guess)
    named = {(flag, *at): (cell, _settings(method, tapo=flag)) for at, cell in cells.items() for flag in (False, True)}
    found = questions.by_rate(named, RATES[1:2], MAP_SEEDS, UPDATES)

    def gain(*at: float) -> dict[str, Any] | None:
        return questions.compare(found[False, *at], found[True, *at])["best"]["gain"] if at in cells else None

    gains = [[gain(headroom, guess) for guess in MAP_GUESS] for headroom in MAP_HEADROOM]
    return {"guess": MAP_GUESS, "headroom": MAP_HEADROOM, "gain": gains, "p_t": p_t}


def _settings(method: Method, *, tapo: bool) -> dict[str, Any]:
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {name: value for name, value in fields.items() if name != "rate"} | {"tapo": tapo}


def decide(
    measured: Measured, world: World, result: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the verdict in words, with its reason."""
    low, high = result["gain"]["interval"]
    gain, saved = result["gain"]["mean"], result["saved"]
    points = f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points of accuracy in the mean over training"
    lost, kept = result["collapsed"]
    if lost - kept >= 0.25:
        return (
            f"TAPO should keep the tools: without it {100 * lost:.0f} % of the simulated runs end without look-ups, "
            f"with it {100 * kept:.0f} % ({points})."
        )
    if high < -LEAST_GAIN:
        return f"TAPO should do harm: {points}. {_reason(measured, world, changed)}"
    if low > 0 and (gain >= LEAST_GAIN) and (saved is None or saved["mean"] >= LEAST_SAVED):
        if saved is None:
            return f"TAPO should help ({points}), though the median run does not get half-way."
        return f"TAPO should save about {_fraction(saved['mean'])} of the updates ({points})."
    return f"No difference to be expected ({points}), {_reason(measured, world, changed)}"


def _fraction(share: float) -> str:
    return min(FRACTIONS, key=lambda pair: abs(pair[0] - share))[1]


def _with_plain(result: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """Return the verdict under plain gradient ascent if it differs, otherwise ""."""
    if not _notable(plain) or _notable(result) or plain["saved"] is None:
        return ""
    share = _fraction(plain["saved"]["mean"])
    return f" (With plain gradient ascent in place of Adam it would save about {share} of the updates.)"


def _reason(measured: Measured, world: World, changed: Mapping[str, Mapping[str, Any]]) -> str:
    reasons = []
    headroom = 1 - float(np.prod(world.skill) ** (1 / world.steps))
    if headroom < 0.2:
        reasons.append(f"the tool steps that TAPO protects are right with {1 - headroom:.2f} already")
    if float(world.guess) < 0.1:
        reasons.append(f"a guess is right with {float(world.guess):.2f}, so that nothing drives the base off its tools")
    if measured.groups and measured.groups_without_success / measured.groups > 0.5:
        reasons.append(
            f"{measured.groups_without_success} of {measured.groups} groups have no success, hence no witness"
        )
    if measured.found.whole and measured.found.value < 0.4:
        reasons.append(f"only {measured.found} of the right failing steps find their witness")
    text = "because " + ("; ".join(reasons) if reasons else "the base learns what TAPO protects just as fast") + "."
    helps = [name for name, one in changed.items() if one["gain"]["interval"][0] > 0 and _notable(one)]
    return text + (f" It would be different with: {', '.join(helps)}." if helps else "")


def _notable(result: Mapping[str, Any]) -> bool:
    saved = result["saved"]
    return result["gain"]["mean"] >= LEAST_GAIN and (saved is None or saved["mean"] >= LEAST_SAVED)


def describe(measured: Measured, world: World, config: Mapping[str, Any], run: Path) -> list[str]:
    """Return the measured numbers, one a line."""
    source = "by the facts of Atlas" if measured.known else "by witnesses: no facts are known, so this is an estimate"
    last = measured.steps[-1]
    lines = [
        f"{measured.episodes} episodes of {len(measured.steps)} recorded steps ({measured.steps[0]} to {last}), "
        f"{measured.groups} groups of {measured.group}, {measured.groups_without_success} without a success",
        f"a look-up is an episode that calls {measured.deciding_tool}; usual chain: {' → '.join(measured.chain)}",
        f"  q, looks up                 {measured.lookup}",
        f"  p_g, right without it       {measured.guess}",
        f"  p_t, right with it          {measured.tools}",
        f"  right tool steps            {source}",
    ]
    for tool, share in measured.skill.items():
        lines.append(f"    {tool:<26}{share}, headroom {1 - share.value:.2f}")
    lines += [
        f"  the rest (reading)          {world.reading:.2f}",
        f"  a wrong step is harmless    {measured.harmless:.2f}",
        f"  failing steps witnessed     {measured.witnessed}, in groups with a success",
        f"  right among these           {measured.right if measured.known else 'not known'}",
        f"  witnessed of the right ones {measured.found if measured.known else 'not known'}",
    ]
    if measured.distance:
        quantiles = ", ".join(f"{value:.2f}" for value in measured.distance)
        lines.append(f"  1 − similarity to a witness {quantiles} (quantiles .1, .5, .9 of right failing steps)")
    logged = [line for line in records.read_metrics(run / "metrics.jsonl") if line["step"] <= last]
    for name in ("reward/accuracy", "tapo/correctable_actions", "loss/entropy"):
        values = [line[name] for line in logged if line.get(name) is not None]
        if values:
            lines.append(f"  {name + ', logged':<36}{np.mean(values):.3f}, mean of {len(values)} steps")
    return lines


def _results(result: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"{'in the laboratory':<36}{'TAPO − base, points':>24}{'updates saved':>18}{'tools lost':>14}"]
    for name, one in ({"as measured": result} | dict(changed)).items():
        low, high = one["gain"]["interval"]
        gain = f"{100 * one['gain']['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        saved = "–" if one["saved"] is None else f"{100 * one['saved']['mean']:.0f} %"
        lost = " → ".join(f"{100 * share:.0f} %" for share in one["collapsed"])
        lines.append(f"{name:<36}{gain:>24}{saved:>18}{lost:>14}")
    best = result["best"]
    saved = "–" if best["saved"] is None else f"{100 * best['saved']['mean']:.0f} %"
    lines.append(f"{'as measured, own best rates':<36}{100 * best['gain']['mean']:>+24.1f}{saved:>18}")
    return lines


def draw(answer: Mapping[str, Any], path: Path) -> None:
    """Draw TAPO − base over guess rate × headroom at the run's p_t, and the position of the run."""
    found = answer["map"]
    figure = new_figure(1, 1, width=5.2, height=3.6)
    axes = figure.axes[0]
    gain_HxG = 100 * np.array([[np.nan if one is None else one["mean"] for one in row] for row in found["gain"]])
    axes.imshow(gain_HxG, cmap="RdBu", vmin=-20, vmax=20, origin="lower", aspect="auto")
    axes.grid(False)
    for (y, x), gain in np.ndenumerate(gain_HxG):
        axes.text(x, y, "" if np.isnan(gain) else f"{gain:+.0f}", ha="center", va="center", fontsize=9, color=INK)
    skill_K = np.array(answer["world"]["skill"])
    headroom = 1 - np.prod(skill_K) ** (1 / len(skill_K))
    x = np.interp(float(answer["world"]["guess"]), found["guess"], range(len(found["guess"])))
    y = np.interp(headroom, found["headroom"], range(len(found["headroom"])))
    axes.plot(x, y, "o", markersize=22, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=2)
    axes.set_xticks(range(len(found["guess"])), [f"{guess:g}" for guess in found["guess"]])
    axes.set_yticks(range(len(found["headroom"])), [f"{headroom:g}" for headroom in found["headroom"]])
    axes.set_xlabel("a guess is right, p_g")
    axes.set_ylabel("headroom of the tool steps")
    title(axes, f"TAPO − base, points; p_t = {found['p_t']:.2f}; the ring is this run")
    figure.savefig(path, dpi=88)
