"""What a run or a sweep came to, from its files: `python -m tapo_jax.report curve|credit|page RUN`, `… report sweep DIR`.

    curve RUN    RUN/curve.png: reward, accuracy, held-out accuracy, TAPO, entropy, tool calls, seconds
    credit RUN   how much credit of failing trajectories could be corrected, at each threshold; RUN/credit.png, RUN/credit.json
    page RUN     RUN/episodes.html
    sweep DIR    DIR/report.md, DIR/report.json and figures; see `report_sweep.py`
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tapo_jax import viewer
from tapo_jax.config import UserError
from tapo_jax.metrics import read

INK, SOFT, BLUE, RED, GREEN, GOLD = "#1b1b1f", "#8a8893", "#2f6fde", "#d0453b", "#1a7f37", "#d99a00"
_TIMES = (
    ("time/decode", "decode", "#2f6fde"), ("time/prefill", "pre-fill", "#74add1"), ("time/tool_wait", "tool wait", "#d99a00"),
    ("rest", "rest of the rollout", "#c9dcef"), ("time/logprobs", "log-probs", "#b39ddb"), ("time/update", "update", "#d0453b"),
    ("time/tapo", "TAPO", "#111111"),
)  # fmt: skip


def write_curve(metrics_jsonl: Path, out: Path) -> None:
    """The figure of one run. Raises UserError where the run has logged no step."""
    lines = read(Path(metrics_jsonl))
    if not lines:
        raise UserError(f"{metrics_jsonl} holds no step: give the folder of a run that has begun.")
    figure = new_figure(2, 3)
    accuracy, reward, tapo, entropy, tools, seconds = figure.axes
    draw(accuracy, "accuracy", ("training", lines, "reward/accuracy", BLUE))
    draw_evaluations(accuracy, lines)
    draw(reward, "reward", ("mean", lines, "reward/mean", BLUE), ("format", lines, "reward/format", SOFT))
    draw(
        tapo, "share of failing tool steps", ("match a witness", lines, "tapo/correctable_actions", SOFT),
        ("corrected", lines, "tapo/corrected_actions", GOLD),
    )  # fmt: skip
    draw(entropy, "entropy, nats per token", ("entropy", lines, "loss/entropy", BLUE), legend=False)
    draw(
        tools, "per episode", ("turns", lines, "rollout/turns", SOFT), ("tool calls", lines, "tools/calls", BLUE),
        ("errors", lines, "tools/errors", RED),
    )  # fmt: skip
    draw_seconds(seconds, lines)
    for axes in figure.axes:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    for axes in (entropy, tools, seconds):
        axes.set_xlabel("step")
    figure.savefig(out, dpi=150)


def new_figure(rows: int, columns: int, *, width: float = 10.0, height: float = 2.9) -> Figure:
    """rows × columns plain axes; height: inches of a row. Readable at the width of a README."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05, hspace=0.06)
    for axes in np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel():
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b5b2a9")
        axes.tick_params(colors="#55525f", labelsize=9)
        axes.grid(axis="y", color="#e8e5dd", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(step_N, value_N) where the number was logged and finite."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def smooth(value_N: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` nearest values, fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(value_N, kernel, "same") / np.convolve(np.ones(len(value_N)), kernel, "same")


def draw(axes: Axes, text: str, *curves: tuple[str, Sequence[Mapping[str, Any]], str, str], legend: bool = True) -> None:
    """Curves (label, lines, metric, colour): every step pale, their running mean strong. What was not logged is left out."""
    title(axes, text)
    for label, lines, name, colour in curves:
        step_N, value_N = series(lines, name)
        if not len(step_N):
            continue
        window = max(1, min(len(step_N), 9)) // 2 * 2 + 1 if len(step_N) >= 16 else 1
        axes.plot(step_N, value_N, color=colour, linewidth=0.8, alpha=0.35 if window > 1 else 0.0)
        axes.plot(step_N, smooth(value_N, window), color=colour, linewidth=1.8, label=label)
    if not axes.lines:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=SOFT)
    elif legend:
        axes.legend(fontsize=8.5, frameon=False, loc="best", labelcolor=INK)


def draw_evaluations(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Held-out accuracy with its 95 % interval, the first and last value written beside their points."""
    step_N, value_N = series(lines, "eval/accuracy")
    if not len(step_N):
        return
    _, low_N = series(lines, "eval/accuracy_low")
    _, high_N = series(lines, "eval/accuracy_high")
    error = np.abs(np.stack([value_N - low_N, high_N - value_N])) if len(low_N) == len(high_N) == len(value_N) else None
    axes.errorbar(step_N, value_N, yerr=error, color=RED, marker="o", markersize=4.5, linewidth=1.6, capsize=3, label="held out, 95 %")
    for at, place, align in ((0, (7, -11), "left"), (-1, (-7, 9), "right")):
        axes.annotate(
            f"{100 * value_N[at]:.0f} %", (step_N[at], value_N[at]), xytext=place, textcoords="offset points", ha=align, fontsize=9.5,
            color=RED, fontweight="bold", bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0}, zorder=9,
        )  # fmt: skip
    axes.legend(fontsize=8.5, frameon=False, loc="best", labelcolor=INK)


def draw_seconds(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Where the time of a step goes, stacked. The first step compiles, and is left out of the scale."""
    timed = [line for line in lines if line.get("time/step") is not None]
    if not timed:
        title(axes, "seconds per step")
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=SOFT)
        return
    parts = {name: np.array([line.get(name) or 0.0 for line in timed]) for name, _, _ in _TIMES if name != "rest"}
    rollout = np.array([line.get("time/rollout") or 0.0 for line in timed])
    parts["rest"] = np.maximum(rollout - parts["time/decode"] - parts["time/prefill"] - parts["time/tool_wait"], 0.0)
    total = np.array([line["time/step"] for line in timed])
    kept = [entry for entry in _TIMES if parts[entry[0]].sum() > 0.005 * total.sum()]
    axes.stackplot(
        [line["step"] for line in timed], [parts[name] for name, _, _ in kept], labels=[label for _, label, _ in kept],
        colors=[colour for _, _, colour in kept], linewidth=0,
    )  # fmt: skip
    axes.set_ylim(0, 1.35 * float(np.quantile(total, 0.95)))
    title(axes, f"seconds per step, TAPO {100 * parts['time/tapo'].sum() / max(total.sum(), 1e-9):.2f} %")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=7.5, frameon=False, loc="upper right", ncols=2, labelcolor=INK)
