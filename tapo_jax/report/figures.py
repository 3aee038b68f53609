"""Draw the figures of a sweep from `results.summarise`. Each function returns whether there was anything to draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tapo_jax.report.claims import SHARE_OF_TIME
from tapo_jax.report.plots import BLUE, GOLD, GREEN, INK, RED, SOFT, new_figure, title
from tapo_jax.report.results import AT, Result, Sweep
from tapo_jax.report.statistics import bootstrap

COLOURS = (
    BLUE,
    GOLD,
    GREEN,
    RED,
    "#7e57c2",
    "#00897b",
    "#c2185b",
    "#5d4037",
    "#26c6da",
    "#9e9d24",
    "#ff7043",
    "#f48fb1",
)
DYNAMICS = (
    ("reward/accuracy", "accuracy in training"),
    ("loss/entropy", "entropy, nats per token"),
    ("rollout/written", "tokens written per episode"),
    ("tools/calls", "tool calls per episode"),
    ("tapo/correctable_actions", "failing steps with a match"),
    ("time/tapo_share", "TAPO’s share of the time"),
)


def draw_curves(sweep: Sweep, summary: Mapping[str, Any], out: Path) -> bool:
    """Draw one panel for each family (a base and what is compared with it).

    A panel has the mean over seeds of every row, and the interval of the base and the reference.
    """
    families = _families(sweep)
    figure = new_figure(-(-len(families) // 3), min(3, len(families)), width=_width(len(families)), height=3.2)
    for axes, (name, rows) in zip(figure.axes, families.items(), strict=False):
        title(axes, name)
        pair = _pair(sweep, rows)
        ordered = [*pair, *(row for row in rows if row not in pair)]
        for row, colour in zip(ordered, (SOFT, *COLOURS * len(rows)), strict=False):
            results = list(sweep.results[row].values())
            at_N = sorted({step for result in results for step, _, _ in result.evals})
            value_SxN = [[100 * result.at_step(step) for step in at_N] for result in results]
            band(axes, at_N, value_SxN, colour, row, shaded=row in pair)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("held-out accuracy, %" if axes is figure.axes[0] else "")
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(rows) > 4 else {}
        axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, **beside)
    _hide(figure, len(families))
    _same_heights(figure.axes[: len(families)])
    figure.savefig(out, dpi=150)
    return True


def draw_differences(sweep: Sweep, summary: Mapping[str, Any], out: Path) -> bool:
    """Draw differences to the base and to the reference, a panel each: mean, interval and every seed of a row."""
    panels = {
        kind: {row: found[f"{kind}_at_step"] for row, found in summary["rows"].items() if found[f"{kind}_at_step"]}
        for kind in ("base", "reference")
    }
    panels = {kind: rows for kind, rows in panels.items() if rows}
    if not panels:
        return False
    figure = new_figure(1, len(panels), width=5.0 * len(panels), height=1.1 + 0.32 * max(map(len, panels.values())))
    for axes, (kind, rows) in zip(figure.axes, panels.items(), strict=True):
        title(axes, f"Δ to the {kind} at equal steps, points")
        axes.axvline(0, color=INK, linewidth=0.8)
        for y, delta in enumerate(rows.values()):
            colour = {"better": GREEN, "worse": RED}.get(delta["verdict"], SOFT)
            if delta["interval"]:
                interval_2 = [100 * value for value in delta["interval"]]
                axes.plot(interval_2, [y, y], color=colour, linewidth=3, solid_capstyle="round")
            value_S = [100 * value for value in delta["values"]]
            axes.plot(value_S, [y] * len(value_S), "|", color=colour, markersize=7, alpha=0.7)
            axes.plot(100 * delta["mean"], y, "o", color=colour, markersize=6)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", color="#e8e5dd", linewidth=0.8)
    figure.savefig(out, dpi=150)
    return True


def draw_fields(sweep: Sweep, summary: Mapping[str, Any], out: Path) -> bool:
    """Draw accuracy against each numeric field in which at least three rows differ, and in nothing else."""
    configs = {row: next(iter(seeds.values())).config for row, seeds in sweep.results.items()}
    lines = swept_fields(configs)
    if not lines:
        return False
    figure = new_figure(-(-len(lines) // 3), min(3, len(lines)), width=_width(len(lines)), height=3.2)
    for axes, (field, rows) in zip(figure.axes, lines, strict=False):
        title(axes, f"held-out accuracy by {field}, %")
        found = [summary["rows"][row]["at_step"] for row in rows]
        at_N = [configs[row][field] for row in rows]
        axes.plot(at_N, [100 * f["mean"] for f in found], color=BLUE, marker="o", linewidth=1.8)
        for x, f in zip(at_N, found, strict=True):
            if f["interval"]:
                axes.plot([x, x], [100 * end for end in f["interval"]], color=BLUE, linewidth=1.2)
        base = sweep.base.get(rows[0])
        if base and all(sweep.base.get(row) == base for row in rows):
            axes.axhline(
                100 * summary["rows"][base]["at_step"]["mean"], color=SOFT, linestyle="--", linewidth=1.2, label=base
            )
            axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        axes.set_xticks(at_N)
    _hide(figure, len(lines))
    figure.savefig(out, dpi=150)
    return True


def swept_fields(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return (field, its rows by ascending value) for numeric fields that are the only difference of 3 or more rows."""
    names = sorted({name for config in configs.values() for name in config if name != "seed"})
    found = []
    for name in names:
        groups: dict[str, dict[float, str]] = {}
        for row, config in configs.items():
            if isinstance(config.get(name), int | float) and not isinstance(config[name], bool):
                rest = json.dumps({k: v for k, v in config.items() if k not in (name, "seed")}, sort_keys=True)
                groups.setdefault(rest, {}).setdefault(float(config[name]), row)
        found += [(name, [rows[value] for value in sorted(rows)]) for rows in groups.values() if len(rows) >= 3]
    return found


def draw_dynamics(sweep: Sweep, summary: Mapping[str, Any], out: Path) -> bool:
    """Draw the training dynamics of each family's base and reference (or first other row), in a row of panels."""
    families = {name: rows for name, rows in _families(sweep).items() if len(rows) > 1} or _families(sweep)
    figure = new_figure(len(families), len(DYNAMICS), width=16.0, height=2.4)
    for number, (name, rows) in enumerate(families.items()):
        pair = _pair(sweep, rows)
        for axes, (metric, text) in zip(figure.axes[number * len(DYNAMICS) :], DYNAMICS, strict=False):
            title(axes, text if number == 0 else "")
            for row, colour in zip(pair, (SOFT, BLUE), strict=False):
                curves = [
                    np.array(result.curves[metric])
                    for result in sweep.results[row].values()
                    if len(result.curves.get(metric, ()))
                ]
                if curves:
                    at_N = curves[0][:, 0]
                    band(axes, at_N, [np.interp(at_N, curve[:, 0], curve[:, 1]) for curve in curves], colour, row)
            if metric == "time/tapo_share":  # the first steps compile, which takes thousands of times as long
                axes.set_yscale("log")
                axes.axhline(SHARE_OF_TIME, color=RED, linewidth=0.9, linestyle=":")
            else:
                axes.set_ylim(bottom=0)
        figure.axes[number * len(DYNAMICS)].legend(fontsize=7.5, frameon=False, labelcolor=INK)
        figure.axes[number * len(DYNAMICS)].set_ylabel(name, fontsize=9)
    figure.savefig(out, dpi=150)
    return True


def draw_credit(sweep: Sweep, summary: Mapping[str, Any], out: Path) -> bool:
    """Draw the correctable share of failing steps and trajectories by threshold, early, midway and late.

    The runs are those of the reference with the most seeds.
    """
    figure = new_figure(1, 2, height=3.2)
    references = [_pair(sweep, rows)[-1] for rows in _families(sweep).values()]
    row = max(references, key=lambda row: len(sweep.results[row]))
    results = list(sweep.results[row].values())
    drawn = False
    for axes, unit in zip(figure.axes, ("actions", "trajectories"), strict=True):
        title(axes, f"{row}: correctable {unit}")
        axes.set_ylabel(f"share of failing {unit}")
        for part, label, colour in (
            (0, "first third", "#c9dcef"),
            (1, "second third", "#74add1"),
            (2, "last third", BLUE),
        ):
            at_N, mean_N = credit_by_threshold(results, unit, part)
            if len(at_N):
                axes.plot(at_N, mean_N, color=colour, marker="o", linewidth=1.8, label=label)
                drawn = True
        axes.axhline(0.5, color=RED, linewidth=0.9, linestyle=":")
        axes.set_ylim(0, 1)
        axes.set_xlabel("threshold of similarity")
        if drawn:
            axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    figure.savefig(out, dpi=150)
    return drawn


def credit_by_threshold(results: Sequence[Result], unit: str, part: int) -> tuple[list[float], list[float]]:
    """Return (thresholds, mean share over the seeds) in one third (0, 1, 2) of training."""
    prefix = f"tapo/correctable_{unit}{AT}"
    names = sorted(
        {name for result in results for name in result.curves if name.startswith(prefix)},
        key=lambda n: float(n[len(prefix) :]),
    )
    shares = []
    for name in names:
        curves = [np.array(result.curves[name])[:, 1] for result in results if len(result.curves.get(name, ()))]
        shares.append(
            float(np.mean([np.array_split(curve, 3)[part].mean() for curve in curves if len(curve) >= 3] or [np.nan]))
        )
    return [float(name[len(prefix) :]) for name in names], shares


def band(
    axes: Axes,
    at_N: Sequence[float],
    value_SxN: Sequence[Sequence[float]],
    colour: str,
    label: str,
    *,
    shaded: bool = True,
) -> None:
    """Draw the mean over seeds, and its 95 % bootstrap interval as a band."""
    value_SxN = np.asarray(value_SxN, float)
    axes.plot(at_N, value_SxN.mean(axis=0), color=colour, linewidth=2.0 if shaded else 1.0, label=label)
    if shaded and len(value_SxN) > 1:
        low_N, high_N = np.array([bootstrap(value_S, 1000) for value_S in value_SxN.T]).T
        axes.fill_between(at_N, low_N, high_N, color=colour, alpha=0.18, linewidth=0)


def _families(sweep: Sweep) -> dict[str, list[str]]:
    """Return base row -> itself and the rows compared with it; rows without a base form one family together."""
    found: dict[str, list[str]] = {}
    for row in sweep.results:
        base = sweep.base.get(row, row if row in sweep.base.values() else "")
        found.setdefault(base, []).append(row)
    return {base or "rows without a base": sorted(rows, key=lambda row: row != base) for base, rows in found.items()}


def _pair(sweep: Sweep, rows: Sequence[str]) -> list[str]:
    """Return the base of a family and its reference, or the next row if it has none."""
    reference = next((sweep.reference[row] for row in rows if row in sweep.reference), None)
    return list(dict.fromkeys([rows[0], reference or rows[min(1, len(rows) - 1)]]))


def _width(panels: int) -> float:
    return {1: 5.0, 2: 8.0}.get(panels, 11.0)


def _same_heights(panels: Sequence[Axes]) -> None:
    """Give all panels the same y range, so that their heights can be compared."""
    low_P, high_P = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(low_P), max(high_P))


def _hide(figure: Any, used: int) -> None:
    for axes in figure.axes[used:]:
        axes.set_visible(False)
