"""Draw one figure for each question, only from its saved answer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tapo_jax.report.plots import BLUE, GOLD, GREEN, INK, RED, SOFT, new_figure, title

Answer = Mapping[str, Any]
PAIRS = (("GRPO", "GRPO + TAPO"), ("GSPO", "GSPO + TAPO"), ("SAPO", "SAPO + TAPO"))
CONTROLS = (("GRPO", SOFT), ("GRPO + TAPO", RED), ("shuffled", GOLD), ("zero_tools", BLUE), ("GiGPO", GREEN))
WIDEST = 0.25  # the difference of mean accuracy at the ends of the colour scale
LEAST = 0.005  # smaller differences are written as 0


def draw_tables(answer: Answer) -> Figure:
    """Draw every number of the first simulation against the number found here."""
    figure = new_figure(1, 1, width=4.6, height=4.2)
    axes = figure.axes[0]
    for name, colour in (("GRPO", SOFT), ("TAPO", RED), ("zero_tools", BLUE)):
        pairs = [
            pair for row in answer["rows"] if row["method"] == name
            for pair in zip(row["published"], row["here"], strict=False)
        ]  # fmt: skip
        axes.plot(*np.array(pairs).T, "o", color=colour, markersize=4, alpha=0.8, label=name)
    axes.plot([0.2, 1], [0.2, 1], color=INK, linewidth=0.8)
    title(axes, "accuracies of the first simulation, made again")
    axes.set_xlabel("first simulation")
    axes.set_ylabel("here")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


def draw_curves(answer: Answer) -> Figure:
    """Draw accuracy at each method's own best rate; updates to .9 and runs without tools by learning rate."""
    figure = new_figure(2, 3, width=11, height=2.9)
    methods = answer["methods"]
    lines = [((base, SOFT), (tapo, RED)) for base, tapo in PAIRS]
    for axes, pair in zip(figure.axes[:3], lines, strict=True):
        _bands(axes, methods, pair, "accuracy")
        title(axes, pair[0][0])
        axes.set_ylabel("accuracy, own best rate" if axes is figure.axes[0] else "")
        axes.set_ylim(0.15, 1.02)
        axes.set_xlabel("update")
    _bands(figure.axes[3], methods, CONTROLS, "accuracy")
    title(figure.axes[3], "controls on GRPO")
    figure.axes[3].set_ylabel("accuracy, own best rate")
    figure.axes[3].set_ylim(0.15, 1.02)
    figure.axes[3].set_xlabel("update")
    axes = figure.axes[4]
    for name, colour in CONTROLS:
        axes.plot(answer["rates"], _holes(methods[name]["updates"]["0.9"]), "o-", color=colour, label=name)
    _log_axes(axes, answer["rates"], "learning rate")
    title(axes, "updates to 90 %, median")
    axes = figure.axes[5]
    for name, colour in CONTROLS:
        axes.plot(answer["rates"], 100 * np.array(methods[name]["collapsed"]), "o-", color=colour, label=name)
    _log_axes(axes, answer["rates"], "learning rate")
    axes.set_yscale("linear")
    title(axes, "runs without tools at the end, %")
    return figure


def draw_phases(answer: Answer) -> Figure:
    """Draw TAPO − GRPO over guess rate × tool skill, one panel for each headroom; below at their own best rates."""
    names = {"common": f"rate {answer['rates'][0]:g}"}
    if len(answer["rates"]) > 1:
        names["best"] = "own best rates"
    columns = len(answer["skills"])
    figure = new_figure(len(names), columns, width=2 + 3 * columns, height=3.3)
    for row, (which, words) in enumerate(names.items()):
        for column, skill in enumerate(answer["skills"]):
            axes = figure.axes[row * columns + column]
            _heat(axes, answer, answer["cells"][which]["TAPO"][column])
            title(axes, f"{words}; tool steps right: {skill:g}")
            axes.set_ylabel("a look-up is right, p_t" if column == 0 else "")
    words = "TAPO − GRPO: points of accuracy, mean over training"
    figure.suptitle(words + (" (bold: 95 % interval without 0)" if columns > 1 else ""), fontsize=10)
    return figure


def draw_variants(answer: Answer) -> Figure:
    """Draw every setting and control − GRPO over guess rate × tool skill."""
    columns = 5
    cells_V = answer["cells"]["common"]
    rows = -(-len(cells_V) // columns)
    figure = new_figure(rows, columns, width=11, height=2.35)
    for axes, (name, cells) in zip(figure.axes, cells_V.items(), strict=False):
        _heat(axes, answer, cells[0], size=7)
        title(axes, name)
    for axes in figure.axes[len(cells_V) :]:
        axes.set_visible(False)
    for axes in figure.axes[::columns]:
        axes.set_ylabel("p_t")
    figure.suptitle("setting − GRPO: points of accuracy, mean over training", fontsize=10)
    return figure


def draw_assumptions(answer: Answer) -> Figure:
    """Draw updates that TAPO saves in worlds unlike the plain one; an arrow if only TAPO gets half-way."""
    rows = answer["rows"]
    figure = new_figure(1, 2, width=10, height=0.9 + 0.3 * len(rows))
    for axes, words in zip(figure.axes, ("at the slowest rate", "at the own best rates"), strict=True):
        for y, row in enumerate(rows.values()):
            found = row["best"] if axes is figure.axes[1] else row["common"][0]
            if max(found["final"]) < answer["world"]["guess"] + 0.05:
                lost = " → ".join(f"{100 * share:.0f} %" for share in found["collapsed"])
                axes.text(2, y, f"nothing is learnt; tools lost: {lost}", fontsize=8, color=SOFT, va="center")
            elif found["saved"] is not None:
                low, high = np.clip([100 * value for value in found["saved"]["interval"]], -60, 100)
                colour = GREEN if low > 0 else RED if high < 0 else SOFT
                axes.plot([low, high], [y, y], color=colour, linewidth=2)
                axes.plot(100 * found["saved"]["mean"], y, "o", color=colour)
            elif found["updates"][1] is not None:
                axes.plot(100, y, ">", color=GREEN)
            else:
                lost = " → ".join(f"{100 * share:.0f} %" for share in found["collapsed"])
                axes.text(2, y, f"the median run fails; tools lost: {lost}", fontsize=8, color=SOFT, va="center")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), rows if axes is figure.axes[0] else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-60, 105)
        axes.grid(axis="x", color="#e8e5dd", linewidth=0.8)
        title(axes, f"updates saved by TAPO {words}, %")
    return figure


def draw_collapse(answer: Answer) -> Figure:
    """Draw the share of runs that lost their tools, by tool skill."""
    figure = new_figure(1, len(answer["rates"]), width=9, height=3.0)
    for axes, rate in zip(figure.axes, answer["rates"], strict=True):
        for name, colour in (("GRPO", SOFT), ("TAPO", RED), ("zero_tools", BLUE)):
            share_X = 100 * np.array(answer["collapsed"][name][str(rate)])
            axes.plot(answer["tools"], share_X, "o-", color=colour, label=name)
        axes.axvline(answer["guess"], color=INK, linewidth=0.8, linestyle=":")
        axes.axvline(answer["guess"] / 2, color=INK, linewidth=0.8, linestyle="--")
        axes.set_xlabel("a look-up is right at first, p_t  (dashed: p_g / 2)")
        axes.set_xlim(0, max(answer["tools"]) + 0.02)
        title(axes, f"runs without tools at the end, %; rate {rate}")
    figure.axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


def _bands(axes: Axes, methods: Answer, lines: Any, trace: str) -> None:
    for name, colour in lines:
        found = methods[name][trace]
        axes.plot(found["update"], found["mean"], color=colour, linewidth=1.6, label=f"{name}, {methods[name]['rate']}")
        axes.fill_between(found["update"], found["low"], found["high"], color=colour, alpha=0.2, linewidth=0)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def _heat(axes: Axes, answer: Answer, cells: list[list[Any]], size: float = 8) -> None:
    value_TxG = 100 * _holes([[None if cell is None else cell["mean"] for cell in row] for row in cells])
    axes.imshow(value_TxG, cmap="RdBu", vmin=-100 * WIDEST, vmax=100 * WIDEST, origin="lower", aspect="auto")
    axes.grid(False)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell is not None:
                low, high = cell["interval"]
                text = f"{100 * cell['mean']:+.0f}" if abs(cell["mean"]) >= LEAST else "0"
                sure = (low > 0 or high < 0) and text != "0"
                colour = "white" if abs(cell["mean"]) > 0.6 * WIDEST else INK if sure else SOFT
                weight = "bold" if sure else "normal"
                axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour, fontweight=weight)
    axes.set_xticks(range(len(answer["guess"])), [f"{guess:g}" for guess in answer["guess"]])
    axes.set_yticks(range(len(answer["tools"])), [f"{p_t:g}" for p_t in answer["tools"]])
    axes.set_xlabel("a guess is right, p_g" if size > 7 else "p_g")


def _holes(values: Any) -> np.ndarray:
    return np.array(values, dtype=float)  # None becomes NaN


def _log_axes(axes: Axes, rates: Any, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel(label)


FIGURES: dict[str, Callable[[Answer], Figure]] = {
    "tables": draw_tables,
    "curves": draw_curves,
    "phases": draw_phases,
    "variants": draw_variants,
    "assumptions": draw_assumptions,
    "collapse": draw_collapse,
}


def save(name: str, answer: Answer, folder: Path) -> Path:
    """Draw the answer of a question into folder/NAME.png."""
    path = folder / f"{name}.png"
    FIGURES[name](answer).savefig(path, dpi=88)
    return path
