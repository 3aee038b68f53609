"""Measure how much credit a run misplaced, from its recorded episodes.

This is the share of failing tool steps, and of failing trajectories, with a step that a successful sample of the same
question made too, at each threshold of similarity: the first figure of the paper (arXiv 2606.05784) for one's own
agent.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapo_jax import records
from tapo_jax.config import UserError
from tapo_jax.records import RecordedEpisode
from tapo_jax.report.plots import BLUE, INK, RED, new_figure, title

GRID = tuple(round(0.3 + 0.05 * i, 2) for i in range(15))  # 0.3 … 1.0


def write_credit(paths: Sequence[Path], out: Path) -> str:
    """Write credit.json and credit.png into `out` and return the table of all recorded steps together.

    Raises UserError.
    """
    by_step: dict[int, list[RecordedEpisode]] = {}
    for path in paths:
        for episode in records.load(path):
            if episode.judged:
                by_step.setdefault(episode.step, []).append(episode)
    everything = [episode for episodes in by_step.values() for episode in episodes]
    rows = table(everything)
    each = {step: table(episodes) for step, episodes in sorted(by_step.items())}
    (out / "credit.json").write_text(json.dumps({"all": rows, "steps": each}, indent=1) + "\n", encoding="utf-8")
    _plot(rows, each, out / "credit.png")
    success = sum(e.success for e in everything)
    text = f"{len(everything)} episodes of {len(by_step)} recorded steps, {success} of them right"
    return f"{text}\n\n{text_table(rows)}\n\nwritten to {out / 'credit.json'} and credit.png"


def table(episodes: Sequence[RecordedEpisode], thresholds: Sequence[float] = GRID) -> list[dict[str, Any]]:
    """Return the rows of `from_similarities`. A step's similarity is the recorded one, to its nearest witness.

    Raises UserError if tool steps were recorded without it.
    """
    called = any(turn.result is not None and turn.error is None for episode in episodes for turn in episode.turns)
    if called and not any(turn.slot >= 0 for episode in episodes for turn in episode.turns):
        raise UserError(
            "These episodes were recorded without TAPO's similarities: give the folder of a training run, whose steps "
            "are recorded with them."
        )
    groups = {key: number for number, key in enumerate(dict.fromkeys((e.step, e.prompt) for e in episodes))}
    steps = [
        (turn.sim, groups[episode.step, episode.prompt], episode.sample)
        for episode in episodes
        for turn in episode.turns
        if turn.slot >= 0 and not episode.success
    ]
    sim_N, group_N, sample_N = (
        np.array([step[i] for step in steps], kind) for i, kind in enumerate((np.float32, int, int))
    )
    return from_similarities(sim_N, group_N, sample_N, sum(not e.success for e in episodes), thresholds)


def from_similarities(
    sim_N, group_N, episode_N, failing_trajectories: int, thresholds: Sequence[float] = GRID
) -> list[dict]:
    """Return the table from the similarity of each failing step to its nearest witness, its group and its episode.

    failing_trajectories: number of all of them, including those without a step.
    """
    rows = []
    for threshold in thresholds:
        near_N = sim_N >= np.float32(threshold)
        found = {(g, e) for g, e, near in zip(group_N, episode_N, near_N, strict=True) if near}
        rows.append(
            {
                "threshold": threshold,
                "correctable_actions": int(near_N.sum()) / max(len(sim_N), 1),
                "correctable_trajectories": len(found) / max(failing_trajectories, 1),
                "actions": int(near_N.sum()),
                "failing_actions": len(sim_N),
                "trajectories": len(found),
                "failing_trajectories": failing_trajectories,
            }
        )
    return rows


def text_table(rows: list[dict]) -> str:
    """Return the rows as aligned text."""
    lines = [f"{'threshold':>9}  {'correctable actions':>24}  {'correctable trajectories':>24}"]
    for row in rows:
        actions = f"{row['correctable_actions']:.1%} ({row['actions']}/{row['failing_actions']})"
        trajectories = f"{row['correctable_trajectories']:.1%} ({row['trajectories']}/{row['failing_trajectories']})"
        lines.append(f"{row['threshold']:>9.2f}  {actions:>24}  {trajectories:>24}")
    return "\n".join(lines)


def _plot(rows: Sequence[dict[str, Any]], each: dict[int, list[dict[str, Any]]], out: Path) -> None:
    figure = new_figure(1, 2, height=3.4)
    for axes, unit in zip(figure.axes, ("actions", "trajectories"), strict=True):
        title(axes, f"correctable share of failing {unit}")
        for number, (step, found) in enumerate(each.items()):
            _line(
                axes,
                found,
                unit,
                color=BLUE,
                alpha=0.15 + 0.7 * (number + 1) / len(each),
                linewidth=1.2,
                label=f"step {step}",
            )
        _line(axes, rows, unit, color=INK, marker="o", markersize=3.5, linewidth=2.2, label="all")
        axes.axhline(0.5, color=RED, linewidth=0.9, linestyle=":")
        axes.set_ylim(0, 1)
        axes.set_xlabel("similarity to a step of a successful sample of at least")
    figure.axes[1].legend(fontsize=8, frameon=False, ncols=1 + len(each) // 10, labelcolor=INK)
    figure.savefig(out, dpi=150)


def _line(axes: Any, rows: Sequence[dict[str, Any]], unit: str, **style: Any) -> None:
    axes.plot([row["threshold"] for row in rows], [row[f"correctable_{unit}"] for row in rows], **style)
