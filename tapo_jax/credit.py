"""How much credit a run misplaced: steps of failing episodes that a successful episode of the same question made too.

The paper's first figure (arXiv 2606.05784) for anyone's recorded episodes: `python -m tapo_jax.report credit RUN`.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from tapo_jax import tapo
from tapo_jax.tapo.encode import Call, most_parameters
from tapo_jax.types import Episode, Number, Region, Text

GRID = tuple(round(0.3 + 0.05 * i, 2) for i in range(15))  # 0.3 … 1.0
BLOCK = 16  # groups compared at once


def calls(episode: Episode) -> list[Call]:
    """The episode's tool steps in order, as `encode_steps` takes them."""
    return [(turn.call.name, turn.call.parameters) for turn in episode.turns if turn.is_step]


def table(
    groups: Sequence[Sequence[Episode]], thresholds: Sequence[float] = GRID, text: str = "dice", features: int = 256
) -> list[dict]:
    """One dict a threshold: correctable_actions and correctable_trajectories (fractions), and the counts behind them.

    groups: the episodes of each question; groups of different sizes and questions asked in several steps are fine.
    """
    sim, group, episode = [], [], []
    for number, members, nearest_GxK in _nearest_witnesses(groups, text, features):
        for index, member in enumerate(members):
            if not member.success:
                values = nearest_GxK[index, : len(calls(member))].tolist()
                sim.extend(values)
                group.extend([number] * len(values))
                episode.extend([index] * len(values))
    failing = sum(not member.success for members in groups for member in members)
    return from_similarities(np.array(sim), np.array(group), np.array(episode), failing, thresholds)


def _nearest_witnesses(groups: Sequence[Sequence[Episode]], text: str, features: int):
    """(number of the group, its episodes, nearest_GxK: the similarity of each step to the nearest of a success, or 0).

    Blocks of groups filled up to one shape, so that one compiled program serves the whole run.
    """
    rollouts = [[calls(member) for member in members] for members in groups]
    G = max((len(members) for members in groups), default=0)
    K = max((len(rollout) for members in rollouts for rollout in members), default=0)
    if K == 0:
        return
    kinds = {"regions": Region, "texts": Text, "numbers": Number}
    slots = {name: most_parameters(rollouts, kind) for name, kind in kinds.items()}
    similarity = jax.jit(tapo.pairwise_similarity, static_argnames="text")
    for start in range(0, len(groups), BLOCK):
        part = [[*members, *[[]] * (G - len(members))] for members in rollouts[start : start + BLOCK]]
        part += [[[]] * G] * (BLOCK - len(part))
        steps = tapo.encode_steps(part, steps=K, features=features, **slots)
        sim_PxSxS = np.asarray(similarity(steps, text=text))
        for p, members in enumerate(groups[start : start + BLOCK]):
            success_S = np.repeat([member.success for member in members] + [False] * (G - len(members)), K)
            witness_S = steps.valid_PxS[p] & success_S
            yield start + p, members, np.where(witness_S[None, :], sim_PxSxS[p], 0).max(axis=1).reshape(G, K)


def from_similarities(
    sim_N, group_N, episode_N, failing_trajectories: int, thresholds: Sequence[float] = GRID
) -> list[dict]:
    """The table from the failing steps themselves: sim_N of each to its nearest witness, and its group and episode.

    failing_trajectories: all of them, those without a step included.
    """
    rows = []
    for threshold in thresholds:
        near_N = sim_N >= np.float32(threshold)
        found = {(g, e) for g, e, near in zip(group_N, episode_N, near_N, strict=True) if near}
        rows.append({
            "threshold": threshold,
            "correctable_actions": int(near_N.sum()) / max(len(sim_N), 1),
            "correctable_trajectories": len(found) / max(failing_trajectories, 1),
            "actions": int(near_N.sum()),
            "failing_actions": len(sim_N),
            "trajectories": len(found),
            "failing_trajectories": failing_trajectories,
        })
    return rows


def text_table(rows: list[dict]) -> str:
    """The rows as aligned text."""
    lines = [f"{'threshold':>9}  {'correctable actions':>24}  {'correctable trajectories':>24}"]
    for row in rows:
        actions = f"{row['correctable_actions']:.1%} ({row['actions']}/{row['failing_actions']})"
        trajectories = f"{row['correctable_trajectories']:.1%} ({row['trajectories']}/{row['failing_trajectories']})"
        lines.append(f"{row['threshold']:>9.2f}  {actions:>24}  {trajectories:>24}")
    return "\n".join(lines)


def plot(rows: list[dict], path: str | Path, title: str = "Credit misassignment") -> None:
    """Both fractions against the threshold, as an image file."""
    from matplotlib.figure import Figure  # only this function needs it

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    threshold = [row["threshold"] for row in rows]
    labels = {"correctable_trajectories": "failing trajectories with one", "correctable_actions": "failing steps"}
    for name, label in labels.items():
        axes.plot(threshold, [100 * row[name] for row in rows], marker="o", markersize=3, label=label)
    axes.set(xlabel="similarity to a step of a successful rollout ≥", ylabel="%", ylim=(0, 100), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
