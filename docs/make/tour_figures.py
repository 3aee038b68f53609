"""Draw the pictures of docs/tour.md: the token strip of one episode, and the slots of a rollout over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.patches as shapes
import numpy as np
from credit_figure import NAMES
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from player import Bar, Player

from tapo_jax import tapo
from tapo_jax.learn.advantages import group_advantages
from tapo_jax.learn.batches import pack, tool_steps
from tapo_jax.types import Episode

QUESTIONS, GROUP = 4, 4
NARROWEST_MS = 3  # a copy takes a fraction of a millisecond and could not be seen
WHO = ["#ffffff", "#d9d9d9", "#9ecae1", "#fdd0a2", "#3182bd"]  # nothing, prompt, image, tool result, policy
KINDS = {
    "extend": ("#e6842a", "extend: new tokens into the cache"),
    "copy": ("#f2c48d", "copy of a prompt (drawn wider)"),
    "decode": ("#3182bd", "decode: a chunk of tokens"),
    "tool": ("#63a35c", "tool on a thread"),
}


def draw_episode(player: Player, out: Path) -> None:
    """Write the token strip of a failing episode that borrowed credit: a token's writer, mask, step, advantages."""
    for step in range(1, 9):
        episodes = player.play(QUESTIONS, GROUP, step)
        transfer, advantage_PxG = transferred(player, episodes)
        corrected_PxG = transfer.corrected_PxS.reshape(QUESTIONS, GROUP, -1).sum(axis=2)
        if corrected_PxG.any():
            row = int(corrected_PxG.argmax())
            break
    else:
        raise ValueError("no failure borrowed credit from a success in eight steps: choose another seed.")
    episode, T = episodes[row], len(episodes[row].token_T)
    config = player.agent.players.sampler.config
    batch = pack(
        episodes,
        config,
        player.agent.players.pixels,
        steps=transfer.advantage_PxS.shape[1] // GROUP,
        length=player.config.rollout.max_length,
        patches=player.config.rollout.max_length * config.vision.merge**2,
    )
    before_T = np.full(T, advantage_PxG.flat[row])
    after_BxT = np.asarray(tapo.token_advantages(advantage_PxG, transfer.advantage_PxS, batch.step_BxT))
    mask_T, step_T = batch.mask_BxT[row, :T], batch.step_BxT[row, :T]
    in_image_T = batch.inputs.feature_BxT[row, :T] >= 0
    first = episode.turns[0].start
    who_T = np.select([mask_T, in_image_T, np.arange(T) < first], [4, 2, 1], 3)
    figure = Figure(figsize=(10, 3.9), dpi=105, layout="constrained")
    axes = figure.subplots(5, 1, sharex=True)
    bound = float(np.abs(before_T).max())
    rows = (
        ("who wrote it", who_T, ListedColormap(WHO), 0, 4),
        ("mask: in the loss", mask_T.astype(float), "Blues", 0, 1.6),
        ("tool step k", np.where(step_T >= 0, step_T + 1, 0), "Greens", 0, 6),
        ("advantage, GRPO", np.where(mask_T, before_T, np.nan), "RdBu", -1.4 * bound, 1.4 * bound),
        ("advantage, TAPO", np.where(mask_T, after_BxT[row, :T], np.nan), "RdBu", -1.4 * bound, 1.4 * bound),
    )
    for axis, (name, value_T, colours, low, high) in zip(axes, rows, strict=True):
        axis.imshow(value_T[None], aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axis.set_yticks([0], [name])
        axis.tick_params(length=0)
    for k, turn in enumerate(tool_steps(episode, 99)):
        middle = (turn.start + turn.stop) / 2
        axes[2].text(
            middle, 0, f"{k}\n{NAMES.get(turn.call.name, turn.call.name)}", ha="center", va="center", fontsize=8
        )
        for axis, value in ((axes[3], before_T[0]), (axes[4], after_BxT[row, turn.start])):
            axis.text(middle, 0, f"{value:+.2f}".replace("-", "\N{MINUS SIGN}"), ha="center", va="center", fontsize=8)
    axes[-1].set_xlabel(f"token of the row (T = {T}); white in the last two rows: not in the loss")
    labels = ("the question", "image", "tool result", "the policy")
    handles = [shapes.Patch(color=colour, label=label) for colour, label in zip(WHO[1:], labels, strict=True)]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(out)


def transferred(player: Player, episodes: Sequence[Episode]) -> tuple[Any, np.ndarray]:
    """Compute TAPO's decision on the group advantages of these episodes, as the train step does."""
    K = max(len(episode.turns) for episode in episodes)
    reward_PxG = np.array([e.reward for e in episodes], np.float32).reshape(QUESTIONS, GROUP)
    success_PxG = np.array([e.success for e in episodes]).reshape(QUESTIONS, GROUP)
    calls = [[(t.call.name, t.call.parameters) for t in tool_steps(e, K)] for e in episodes]
    groups = [calls[start : start + GROUP] for start in range(0, len(calls), GROUP)]
    advantage_PxG = np.asarray(group_advantages(reward_PxG))
    transfer = tapo.transfer(tapo.encode_steps(groups, steps=K), success_PxG, advantage_PxG)
    return transfer, advantage_PxG


def draw_round(bars: Sequence[Bar], slots: int, out: Path) -> None:
    """Write the Gantt chart of a rollout: a row for every slot, a bar for each of its operations."""
    start = min(bar.start for bar in bars)
    figure = Figure(figsize=(10, 3.8), dpi=105, layout="constrained")
    axes = figure.subplots()
    for kind, (colour, _) in KINDS.items():
        chosen = [bar for bar in bars if bar.kind == kind]
        height = 0.36 if kind == "tool" else 0.8
        axes.barh(
            [bar.slot for bar in chosen],
            [max(1e3 * (bar.stop - bar.start), NARROWEST_MS) for bar in chosen],
            left=[1e3 * (bar.start - start) for bar in chosen],
            height=height,
            color=colour,
            edgecolor="white",
            linewidth=0.4,
            zorder=2 if kind == "tool" else 1,
        )
    for slot in range(slots):
        mine = sorted((bar for bar in bars if bar.slot == slot), key=lambda bar: bar.start)
        for previous, bar in zip([None, *mine], mine, strict=False):
            if previous is None or previous.episode != bar.episode:
                at = 1e3 * (bar.start - start)
                axes.plot([at, at], [slot - 0.48, slot + 0.48], color="black", linewidth=1.4, zorder=3)
    axes.set_yticks(range(slots), [f"slot {slot}" for slot in range(slots)])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds; a black mark: the slot takes another episode")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [shapes.Patch(color=colour, label=label) for colour, label in KINDS.values()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(out)
