"""Compute the credit map of one question.

It has a row for every sample, a cell for every turn coloured by its advantage before and after TAPO, and an arrow from
each witness to the steps that borrowed from it. Geometry only; `page.html` draws it as SVG."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

LEVELS = 10
_STOPS = (
    (-1.0, (165, 0, 38)),
    (-0.5, (244, 109, 67)),
    (0.0, (238, 236, 230)),
    (0.5, (116, 173, 209)),
    (1.0, (49, 54, 149)),
)

LEFT, TOP, ROW, COLUMN, CELL_WIDTH, CELL_HEIGHT = 62, 26, 31, 82, 58, 20


def shade(value: float, scale: float) -> int:
    """Return the level of `SHADES` for an advantage, -LEVELS..LEVELS: red below 0, blue above, darkest from ±scale on.

    The level grows with the square root, so that small advantages can be told apart; only 0 itself and NaN are grey.
    """
    if not abs(value) > 0:
        return 0
    level = max(1, round(LEVELS * math.sqrt(min(abs(value) / scale, 1.0))))
    return level if value > 0 else -level


def _colours() -> list[dict[str, Any]]:
    """Return level, fill (#rrggbb) and ink (a readable text colour) of every shade."""
    colours = []
    for level in range(-LEVELS, LEVELS + 1):
        at = level / LEVELS
        (x0, low), (x1, high) = next(pair for pair in itertools.pairwise(_STOPS) if at <= pair[1][0])
        rgb = [round(a + (b - a) * (at - x0) / (x1 - x0)) for a, b in zip(low, high, strict=True)]
        light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
        colours.append(
            {"level": level, "fill": "#{:02x}{:02x}{:02x}".format(*rgb), "ink": "#1b1b1f" if light > 150 else "#ffffff"}
        )
    return colours


SHADES = _colours()


def credit_map(episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the coordinates of rows, cells and arrows, from the views of one question's episodes (`views.py`)."""
    columns = max((len(episode["turns"]) for episode in episodes), default=0)
    middle: dict[str, tuple[float, float]] = {}
    rows = []
    for number, episode in enumerate(episodes):
        y = TOP + number * ROW
        cells = []
        for turn in episode["turns"]:
            x = LEFT + turn["number"] * COLUMN
            if turn["anchor"]:
                middle[turn["anchor"]] = (x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2)
            cells.append({"x": x, "turn": turn})
        rows.append({"y": y, "episode": episode, "cells": cells})
    arrows = [
        {"path": _curve(middle[turn["witness"]["anchor"]], middle[turn["anchor"]]), "turn": turn}
        for episode in episodes
        for turn in episode["turns"]
        if turn["corrected"] and turn["witness"] and turn["witness"]["anchor"] in middle
    ]
    return {
        "rows": rows,
        "arrows": arrows,
        "columns": [{"x": LEFT + c * COLUMN + CELL_WIDTH / 2, "number": c + 1} for c in range(columns)],
        "width": LEFT + columns * COLUMN + 190,
        "height": TOP + len(rows) * ROW + 4,
        "end": LEFT + columns * COLUMN,
    }


def _curve(start: tuple[float, float], stop: tuple[float, float]) -> str:
    """Return an SVG path from the witness's right side around to the right side of the step that borrowed."""
    edge = CELL_WIDTH / 2
    (x0, y0), (x1, y1) = start, stop
    bulge = 8 + min(abs(y1 - y0) / ROW, 4) * 3
    x0, x1 = x0 + edge, x1 + edge + 3
    return f"M{x0:.1f} {y0:.1f} C{x0 + bulge:.1f} {y0:.1f} {x1 + bulge:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
