"""How much punishment was undeserved, and whether witnesses find it: the recorded tool steps of a run on Atlas, whose
facts say which steps were right. Nothing in training reads this.

A text search was right where the first passage it found is one that the question needs; an image search where the first
title is the country asked about; a zoom where an image search of what it cut was right (where nobody searched that, it
is not known, and the step is left out).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.data.atlas_world import parse_id
from tapo_jax.records import RecordedEpisode, RecordedTurn, load

ZOOM, IMAGE, TEXT = "image_zoom_in_tool", "image_search_tool", "text_search_tool"
_FIRST = re.compile(r"1\. (.+)")


def steps_of(episode: RecordedEpisode) -> list[tuple[RecordedTurn, bool | None]]:
    """The valid tool steps of an episode, each with whether it was right; None where that is not known. Raises
    ValueError where the question is not one of Atlas."""
    attribute, chain = parse_id(episode.prompt_id)
    needed = {f"{name}, neighbours" for name in chain[:-1]} | {f"{chain[-1]}, {attribute}"}
    steps = [turn for turn in episode.turns if turn.slot >= 0]
    searched = {
        turn.call_arguments["img_idx"]: _first_title(turn) == chain[0] for turn in steps if turn.call_name == IMAGE
    }

    def right(turn: RecordedTurn) -> bool | None:
        if turn.call_name == TEXT:
            return _first_title(turn) in needed
        if turn.call_name == IMAGE:
            return searched[turn.call_arguments["img_idx"]]
        return searched.get(turn.result_images[0]) if turn.call_name == ZOOM and turn.result_images else None

    return [(turn, right(turn)) for turn in steps]


def _first_title(turn: RecordedTurn) -> str:
    found = _FIRST.match(turn.result or "")
    return found.group(1) if found else ""


def table(episodes: Sequence[RecordedEpisode]) -> list[dict[str, Any]]:
    """One dict for all tools and one for each: `punished`, the steps of failing trajectories with a negative advantage;
    `undeserved`, the share of them that was right; `found`, the share of these with a witness at theta; `precision`,
    the share of the steps with a witness that was right. A share of nothing is None."""
    punished = [
        (turn, right)
        for episode in episodes
        if not episode.success
        for turn, right in steps_of(episode)
        if right is not None and turn.adv_before < 0
    ]
    rows = []
    for tool in ("all", ZOOM, IMAGE, TEXT):
        steps = [(turn.correctable, right) for turn, right in punished if tool in ("all", turn.call_name)]
        rows.append({
            "tool": tool,
            "punished": len(steps),
            "undeserved": _share([right for _, right in steps]),
            "found": _share([witnessed for witnessed, right in steps if right]),
            "precision": _share([right for witnessed, right in steps if witnessed]),
        })
    return rows


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def write_truth(paths: Sequence[Path], out: Path) -> str:
    """Writes truth.json into `out` and returns the table as text, over all recorded steps. Raises UserError."""
    episodes = [episode for path in paths for episode in load(path)]
    try:
        rows = table(episodes)
    except ValueError as error:
        raise UserError(f"{error}: `report truth` reads runs with data.name 'atlas', whose facts are known.") from error
    (out / "truth.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    names = ("punished", "undeserved", "found", "precision")
    lines = [f"{'tool':<20}" + "".join(f"{name:>12}" for name in names)]
    for row in rows:
        shares = [f"{'–' if row[name] is None else f'{row[name]:.1%}':>12}" for name in names[1:]]
        lines.append(f"{row['tool']:<20}{row['punished']:>12}" + "".join(shares))
    return "\n".join([*lines, "", f"written to {out / 'truth.json'}"])
