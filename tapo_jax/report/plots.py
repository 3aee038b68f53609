"""Make plain figures: colours, undecorated axes, series of metrics. Does not change matplotlib's global state."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, BLUE, RED, GREEN, GOLD = "#1b1b1f", "#8a8893", "#2f6fde", "#d0453b", "#1a7f37", "#d99a00"


def new_figure(rows: int, columns: int, *, width: float = 10.0, height: float = 2.9) -> Figure:
    """Return a figure of rows × columns plain axes, readable at the width of a README. height: inches of a row."""
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
    """Return (step_N, value_N) of the steps at which the metric was logged and finite."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def smooth(value_N: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over the `window` nearest values, fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(value_N, kernel, "same") / np.convolve(np.ones(len(value_N)), kernel, "same")
