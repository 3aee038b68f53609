"""Measure how much punishment of tool steps was undeserved, and whether witnesses find it.

Reads the recorded tool steps of a run on Atlas, whose facts say which steps were right. Training does not use this.

A text search was right if the first passage it found is one that the question needs; an image search if the first
title is a country of the scene that the question asks about; a zoom if an image search of its crop was right (without
such a search this is unknown, and the step is left out).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tapo_jax.atlas import closed
from tapo_jax.atlas.play import parse_id
from tapo_jax.config import UserError
from tapo_jax.records import RecordedEpisode, RecordedTurn, load
from tapo_jax.types import IMAGE_SEARCH, TEXT_SEARCH, ZOOM

_WHEN = ("adv_before", "adv_after")
_FIRST = re.compile(r"1\. (.+)")


def steps_of(episode: RecordedEpisode) -> list[tuple[RecordedTurn, bool | None]]:
    """Return the valid tool steps of an episode, each with whether it was right (None: unknown).

    Raises ValueError if the question is not one of Atlas.
    """
    attribute, chain = parse_id(episode.prompt_id)
    needed, named = closed.needed(attribute, chain), closed.seen(attribute, chain)
    steps = [turn for turn in episode.turns if turn.slot >= 0]
    searched = {
        turn.call_arguments["img_idx"]: _first_title(turn) in named for turn in steps if turn.call_name == IMAGE_SEARCH
    }

    def right(turn: RecordedTurn) -> bool | None:
        if turn.call_name == TEXT_SEARCH:
            return _first_title(turn) in needed
        if turn.call_name == IMAGE_SEARCH:
            return searched[turn.call_arguments["img_idx"]]
        return searched.get(turn.result_images[0]) if turn.call_name == ZOOM and turn.result_images else None

    return [(turn, right(turn)) for turn in steps]


def _first_title(turn: RecordedTurn) -> str:
    found = _FIRST.match(turn.result or "")
    return found.group(1) if found else ""


def table(episodes: Sequence[RecordedEpisode]) -> list[dict[str, Any]]:
    """Return one dict for all tools together and one for each tool.

    punished: number of steps of failing trajectories with a negative advantage.
    undeserved: the share of them that was right.
    found: the share of these with a witness at theta.
    precision: the share of the punished steps with a witness that was right.
    right, wrong: the mean advantage of right and of wrong steps, [before, after] TAPO, over all trajectories of groups
        with an advantage, including successful ones.

    A mean of nothing is None.
    """
    known = [
        (episode.success, turn, right)
        for episode in episodes
        if episode.advantage
        for turn, right in steps_of(episode)
        if right is not None
    ]
    rows = []
    for tool in ("all", ZOOM, IMAGE_SEARCH, TEXT_SEARCH):
        steps = [step for step in known if tool in ("all", step[1].call_name)]
        punished = [(turn.correctable, right) for success, turn, right in steps if not success and turn.adv_before < 0]
        rows.append(
            {
                "tool": tool,
                "punished": len(punished),
                "undeserved": _mean([right for _, right in punished]),
                "found": _mean([witnessed for witnessed, right in punished if right]),
                "precision": _mean([right for witnessed, right in punished if witnessed]),
                **{
                    name: [_mean([getattr(turn, when) for _, turn, right in steps if right is flag]) for when in _WHEN]
                    for name, flag in (("right", True), ("wrong", False))
                },
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_truth(paths: Sequence[Path], out: Path) -> str:
    """Write truth.json into `out` and return the table as text, over all recorded steps. Raises UserError."""
    episodes = [episode for path in paths for episode in load(path)]
    try:
        rows = table(episodes)
    except ValueError as error:
        raise UserError(
            f"{error}: `report truth` reads runs with data.source 'atlas', whose facts are known."
        ) from error
    (out / "truth.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"{'':<20}{'punished steps of failures':>48}    {'mean advantage, before → after':>32}",
        f"{'tool':<20}" + "".join(f"{name:>12}" for name in ("number", "undeserved", "found", "precision"))
        + "    " + "".join(f"{name:>16}" for name in ("right steps", "wrong steps")),
    ]  # fmt: skip
    for row in rows:
        shares = [_text(row[name], ".1%") for name in ("undeserved", "found", "precision")]
        means = [" → ".join(_text(value, "+.2f") for value in row[name]) for name in ("right", "wrong")]
        cells = [f"{row['tool']:<20}{row['punished']:>12}", *(f"{share:>12}" for share in shares), "    "]
        lines.append("".join(cells) + "".join(f"{mean:>16}" for mean in means))
    return "\n".join([*lines, "", f"written to {out / 'truth.json'}"])


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
