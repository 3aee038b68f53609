"""Draw TAPO in one figure: two rollouts of one question, coloured by their advantages before and after TAPO.

Positions, colours and the arrow are those of the viewer's credit map (`tapo_jax/viewer/credit_map.py`), from a recorded
step of a run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.patches as shapes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve

from tapo_jax import records
from tapo_jax.records import RecordedEpisode
from tapo_jax.types import IMAGE_SEARCH, TEXT_SEARCH, ZOOM
from tapo_jax.viewer.credit_map import CELL_HEIGHT, CELL_WIDTH, LEFT, SHADES
from tapo_jax.viewer.views import Views

GOLD = "#c98a00"
SHADE = {shade["level"]: shade for shade in SHADES}
NAMES = {ZOOM: "zoom", IMAGE_SEARCH: "image search", TEXT_SEARCH: "text search"}


def choose(paths: Sequence[Path]) -> tuple[RecordedEpisode, RecordedEpisode]:
    """Find a (successful, failing) pair of one question in which the failure borrowed most from that success.

    All successes of the question have the same advantage, so that Adv of every cluster is that number. Raises
    ValueError if the recordings have no such pair.
    """
    found = []
    for path in paths:
        episodes = records.load(path)
        for failing in episodes:
            group = [e for e in episodes if e.prompt == failing.prompt]
            advantages = {round(e.advantage, 4) for e in group if e.success}
            borrowed = [turn for turn in failing.turns if turn.corrected and turn.witness]
            others = [turn for turn in failing.turns if turn.slot >= 0 and not turn.corrected]
            if len(advantages) == 1 and borrowed and others:
                witness = next(e for e in group if e.sample == borrowed[0].witness[1])
                same = all(turn.witness[1] == witness.sample for turn in borrowed)
                found.append((same, len(borrowed), -len(others), max(turn.sim for turn in borrowed), witness, failing))
    if not found:
        raise ValueError("no recorded failure borrowed credit from a success: give a run with more episodes.")
    return max(found, key=lambda item: item[:4])[4:]


def draw(paths: Sequence[Path], out: Path) -> None:
    """Write the figure of the best example among the recorded steps of one run."""
    pair = choose(paths)
    beta = json.loads((paths[0].parents[1] / "config.json").read_text(encoding="utf-8"))["tapo"]["beta"]
    views = Views(scale=max(abs(e.advantage) for e in pair))
    views.learn(pair)
    group = views.group(pair)
    figure = Figure(figsize=(8.4, 4.3), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1)
    panel(above, group["map"], "before", beta, "GRPO: one advantage for every token of a rollout")
    title = "TAPO: the steps of a failure that a success took too get part of their punishment back"
    panel(below, group["map"], "after", beta, title)
    figure.suptitle(f"{pair[0].question}    Accepted: {', '.join(pair[0].answers)}", fontsize=10, x=0.01, ha="left")
    figure.savefig(out)


def panel(axes: Axes, credit: dict[str, Any], which: str, beta: float, title: str) -> None:
    """Draw the rows and cells of a credit map; with which="after", its first arrow too."""
    for row in credit["rows"]:
        episode = row["episode"]
        verdict = "right" if episode["success"] else "wrong"
        axes.text(LEFT - 12, row["y"] + CELL_HEIGHT / 2, f"rollout {episode['sample']}", ha="right", va="center")
        axes.text(
            credit["end"] - 12, row["y"] + CELL_HEIGHT / 2, f"answer: {episode['answer']} ({verdict})", va="center"
        )
        for cell in row["cells"]:
            turn = cell["turn"]
            shade = SHADE[turn[f"{which}_shade"]]
            edge = GOLD if which == "after" and turn["corrected"] else "#999999"
            box = shapes.Rectangle(
                (cell["x"], row["y"]), CELL_WIDTH, CELL_HEIGHT, facecolor=shade["fill"], edgecolor=edge, linewidth=1.2
            )
            axes.add_patch(box)
            middle = cell["x"] + CELL_WIDTH / 2
            value = f"{turn[which]:+.2f}".replace("-", "\N{MINUS SIGN}")
            label = NAMES.get(turn["tool"], turn["tool"]) if turn["tool"] else "answer"
            axes.text(middle, row["y"] + 6, label, ha="center", va="center", fontsize=7, color=shade["ink"])
            axes.text(middle, row["y"] + 14, value, ha="center", va="center", fontsize=8, color=shade["ink"])
    if which == "after" and credit["arrows"]:
        arrow(axes, credit, beta)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, credit["end"] + 112)
    axes.set_ylim(credit["rows"][-1]["y"] + CELL_HEIGHT + 8, credit["rows"][0]["y"] - 6)
    axes.set_axis_off()


def arrow(axes: Axes, credit: dict[str, Any], beta: float) -> None:
    """Draw the arrow from the witness to the first step that borrowed, and the credit that the step got."""
    first = credit["arrows"][0]
    numbers = [float(number) for number in first["path"].replace("M", "").replace("C", "").split()]
    points = list(zip(numbers[::2], numbers[1::2], strict=True))
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(shapes.FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=11, color=GOLD, linewidth=1.8))
    turn = first["turn"]
    witness = next(e["advantage"] for e in (row["episode"] for row in credit["rows"]) if e["success"])
    credit_given = turn["sim"] * turn["support"] * witness
    text = (
        f"sim {turn['sim']:.2f} × support {turn['support']:.2f} × Adv {witness:.2f} = {credit_given:.2f}       "
        f"{turn['before']:.2f} + {beta:g} · {credit_given:.2f} = {turn['after']:.2f}"
    )
    axes.text(
        points[0][0] + 12,
        (points[0][1] + points[-1][1]) / 2,
        text.replace("-", "\N{MINUS SIGN}"),
        va="center",
        fontsize=8.5,
        color=GOLD,
    )
