"""The figure of one run: reward, accuracy, held-out accuracy, TAPO, entropy, tool calls and seconds, by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tapo_jax.config import UserError
from tapo_jax.records import read_metrics
from tapo_jax.report.plots import BLUE, GOLD, INK, RED, SOFT, new_figure, series, smooth, title

_TIMES = (
    ("time/decode", "decode", "#2f6fde"),
    ("time/prefill", "pre-fill", "#74add1"),
    ("time/tool_wait", "tool wait", "#d99a00"),
    ("rest", "rest of the rollout", "#c9dcef"),
    ("time/logprobs", "log-probs", "#b39ddb"),
    ("time/update", "update", "#d0453b"),
    ("time/tapo", "TAPO", "#111111"),
)


def write_curve(metrics_jsonl: Path, out: Path) -> None:
    """Draw the figure of one run. Raises UserError if the run has logged no step."""
    lines = read_metrics(Path(metrics_jsonl))
    if not lines:
        raise UserError(f"{metrics_jsonl} holds no step: give the folder of a run that has begun.")
    figure = new_figure(2, 3)
    accuracy, reward, tapo, entropy, tools, seconds = figure.axes
    draw(accuracy, "accuracy", ("training", lines, "reward/accuracy", BLUE))
    draw_evaluations(accuracy, lines)
    draw(reward, "reward", ("mean", lines, "reward/mean", BLUE), ("format", lines, "reward/format", SOFT))
    draw(
        tapo,
        "share of failing tool steps",
        ("match a witness", lines, "tapo/correctable_actions", SOFT),
        ("corrected", lines, "tapo/corrected_actions", GOLD),
    )
    draw(entropy, "entropy, nats per token", ("entropy", lines, "loss/entropy", BLUE), legend=False)
    draw(
        tools,
        "per episode",
        ("turns", lines, "rollout/turns", SOFT),
        ("tool calls", lines, "tools/calls", BLUE),
        ("errors", lines, "tools/errors", RED),
    )
    draw_seconds(seconds, lines)
    for axes in figure.axes:
        axes.set_xlim(left=0)
        axes.set_ylim(0, axes.get_ylim()[1] * (1.0 if axes is seconds else 1.06))
    for axes in (entropy, tools, seconds):
        axes.set_xlabel("step")
    figure.savefig(out, dpi=150)


def draw(
    axes: Axes, text: str, *curves: tuple[str, Sequence[Mapping[str, Any]], str, str], legend: bool = True
) -> None:
    """Draw curves (label, lines, metric, colour): steps pale, running mean strong, metrics not logged left out."""
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
    """Draw held-out accuracy with its 95 % interval, the first and last value written next to their points."""
    step_N, value_N = series(lines, "eval/accuracy")
    if not len(step_N):
        return
    _, low_N = series(lines, "eval/accuracy_low")
    _, high_N = series(lines, "eval/accuracy_high")
    error = np.abs(np.stack([value_N - low_N, high_N - value_N])) if len(low_N) == len(high_N) == len(value_N) else None
    axes.errorbar(
        step_N,
        value_N,
        yerr=error,
        color=RED,
        marker="o",
        markersize=4.5,
        linewidth=1.6,
        capsize=3,
        label="held out, 95 %",
    )
    for at, place, align in ((0, (7, -11), "left"), (-1, (-7, 9), "right")):
        axes.annotate(
            f"{100 * value_N[at]:.0f} %",
            (step_N[at], value_N[at]),
            xytext=place,
            textcoords="offset points",
            ha=align,
            fontsize=9.5,
            color=RED,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0},
            zorder=9,
        )
    axes.legend(fontsize=8.5, frameon=False, loc="best", labelcolor=INK)


def draw_seconds(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the time of a step by phase, stacked. Steps that compile are much longer and exceed the top of the scale."""
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
    if not kept:  # only whole steps were timed
        title(axes, "seconds per step")
        axes.plot([line["step"] for line in timed], total, color=SOFT)
        return
    axes.stackplot(
        [line["step"] for line in timed],
        [parts[name] for name, _, _ in kept],
        labels=[label for _, label, _ in kept],
        colors=[colour for _, _, colour in kept],
        linewidth=0,
    )
    axes.set_ylim(0, 1.4 * min(float(total.max()), 1.6 * float(np.median(total))))
    share = float(
        np.median(parts["time/tapo"] / np.maximum(total, 1e-9))
    )  # the median: steps that compile are not typical
    title(axes, f"seconds per step, TAPO {100 * share:.2f} %")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=7.5, frameon=False, loc="upper right", ncols=2, labelcolor=INK)
