"""Write recorded episodes as one self-contained HTML page: what the policy did turn by turn, and what TAPO changed.

The page (`page.html`) loads nothing: images are data URIs, each kept once, and its Content-Security-Policy allows
only its own style and script, named by their hashes. What the policy, a tool or a data set wrote reaches the page as
escaped text; everything else in it is a number or a name of our own. Imports no jax.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from tapo_jax import records
from tapo_jax.config import UserError
from tapo_jax.records import RecordedEpisode, write_whole
from tapo_jax.viewer.credit_map import SHADES
from tapo_jax.viewer.views import Group, Views

MAX_GROUPS = 48  # max questions on a page


def write_page(
    paths: Sequence[Path], out: Path, *, max_groups: int = MAX_GROUPS, told: Callable[[str], None] | None = None
) -> None:
    """Write the page of these recorded steps (`records.save`), grouped by step and question.

    If they hold more than max_groups questions, each step shows an equal share: those with the most corrected steps.
    A file that is no recording is left out, and `told` gets the sentence about it; without `told`, it raises UserError.
    """
    share = max(1, max_groups // max(len(paths), 1))
    groups: list[Group] = []
    total = 0
    for path in paths:
        try:
            found = _grouped(records.load(path))
        except UserError as error:
            if told is None:
                raise
            told(str(error))
            continue
        total += len(found)
        groups += sorted(found, key=lambda group: -sum(turn.corrected for e in group for turn in e.turns))[:share]
    groups.sort(key=lambda group: (group[0].step, group[0].prompt))
    write_whole(out, render(groups, title=out.resolve().parent.name, total=total))


def render(groups: Sequence[Group], *, title: str, total: int) -> str:
    """Return the page as text.

    groups: the episodes of one question at one step each.
    title: heading of the page.
    total: number of groups from which these were chosen.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["csp_hash"] = _csp_hash
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    episodes = [episode for group in groups for episode in group]
    advantages = [abs(value) for e in episodes for turn in e.turns for value in (turn.adv_before, turn.adv_after)]
    page = Views(scale=max(filter(math.isfinite, advantages), default=0.0) or 1.0)
    page.learn(episodes)
    views = [page.group(group) for group in groups]
    _open_one(views)
    return environment.get_template("page.html").render(
        title=title,
        total=total,
        groups=views,
        pictures=page.pictures,
        shades=SHADES,
        scale=page.scale,
        summary=_summary(episodes),
        steps=sorted({episode.step for episode in episodes}),
    )


def _grouped(episodes: Sequence[RecordedEpisode]) -> list[Group]:
    groups: dict[tuple[int, int], list[RecordedEpisode]] = {}
    for episode in episodes:
        groups.setdefault((episode.step, episode.prompt), []).append(episode)
    return list(groups.values())


def _open_one(views: Sequence[dict[str, Any]]) -> None:
    """Open the first corrected episode and the one that it borrowed from, so that the page begins with an example."""
    for view in views:
        for episode in view["episodes"]:
            borrowed = [turn["witness"]["anchor"] for turn in episode["turns"] if turn["corrected"] and turn["witness"]]
            if borrowed:
                episode["open"] = True
                for other in view["episodes"]:
                    other["open"] |= any(turn["anchor"] == borrowed[0] for turn in other["turns"])
                return


def _summary(episodes: Sequence[RecordedEpisode]) -> dict[str, Any]:
    failing = [turn for e in episodes if e.judged and not e.success for turn in e.turns if turn.slot >= 0]
    return {
        "episodes": len(episodes),
        "right": sum(e.success for e in episodes),
        "failing_steps": len(failing),
        "correctable": sum(turn.correctable for turn in failing),
        "corrected": sum(turn.corrected for turn in failing),
    }


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
