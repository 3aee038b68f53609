"""What a run or a sweep came to, from its files: `python -m tapo_jax.report COMMAND DIRECTORY`.

curve RUN    RUN/curve.png: reward, accuracy, held-out accuracy, TAPO, entropy, tool calls, seconds
credit RUN   the share of failing tool steps that a success made too, by threshold; RUN/credit.png, RUN/credit.json
truth RUN    of a run on Atlas, the share of punished tool steps that were right, and how many of them TAPO finds
page RUN     RUN/episodes.html: recorded episodes, turn by turn
sweep DIR    DIR/report.md, DIR/report.json and figures; `report_sweep.py` says what a sweep's directory holds
"""

import argparse
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tapo_jax import report_credit, report_tables, report_truth, viewer
from tapo_jax.config import UserError
from tapo_jax.records import read_metrics
from tapo_jax.report_plots import BLUE, GOLD, INK, RED, SOFT, new_figure, series, smooth, title

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
    """The figure of one run. Raises UserError where the run has logged no step."""
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
    """Curves (label, lines, metric, colour): steps pale, their running mean strong, what was not logged left out."""
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
    """Where the time of a step goes, stacked. Steps that compile are much longer, and leave the scale at the top."""
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


# The command line.


def recordings(run: Path) -> list[Path]:
    """The recorded steps of a run, in order. Raises UserError where there are none."""
    found = sorted((run / "episodes").glob("step_*.npz"))
    if not found:
        raise UserError(
            f"{run} has no recorded episodes (episodes/step_*.npz): give the folder of a run; log.episodes_every says "
            "how often a step is recorded."
        )
    return found


def main(arguments: Sequence[str]) -> None:
    """Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tapo_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("curve", "credit", "truth", "page", "sweep"):
        command = commands.add_parser(name)
        command.add_argument("directory", type=Path)
        if name == "page":
            command.add_argument(
                "--questions", type=int, default=viewer.MAX_GROUPS, help="how many the page shows at most"
            )
    given = parser.parse_args(arguments)
    if not given.directory.is_dir():
        raise UserError(f"{given.directory} is no directory: give the folder of a run or of a sweep.")
    if given.command == "curve":
        write_curve(given.directory / "metrics.jsonl", given.directory / "curve.png")
        print(given.directory / "curve.png")
    elif given.command == "sweep":
        print(report_tables.write_sweep(given.directory))
    else:
        paths = recordings(given.directory)
        try:
            if given.command == "page":
                viewer.write_page(paths, given.directory / "episodes.html", max_groups=given.questions)
                print(given.directory / "episodes.html")
            else:
                write = report_truth.write_truth if given.command == "truth" else report_credit.write_credit
                print(write(paths, given.directory))
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(
                f"A recording in {given.directory / 'episodes'} cannot be read ({type(error).__name__}: {error}): "
                "remove the damaged file."
            ) from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
