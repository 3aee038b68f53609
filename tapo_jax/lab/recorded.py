"""Measure a run's policy from its recorded episodes, in the laboratory's terms. Imports no jax.

An episode looked something up if it called the deciding tool: the one that most successful episodes called last.
Without it an answer is a guess.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapo_jax import records
from tapo_jax.config import UserError
from tapo_jax.records import RecordedEpisode, RecordedTurn
from tapo_jax.report import truth

SPREADS = np.linspace(0, 3, 61)


@dataclasses.dataclass(frozen=True)
class Share:
    """`part` of `whole`."""

    part: int
    whole: int

    @property
    def value(self) -> float:
        """Return the share with half a count added to both outcomes, so that few counts give no certainty."""
        return (self.part + 0.5) / (self.whole + 1)

    def __str__(self) -> str:
        return f"{self.part / self.whole:.2f} ({self.part} of {self.whole})" if self.whole else "unknown (0 of 0)"


@dataclasses.dataclass(frozen=True)
class Measured:
    """The numbers of a policy."""

    steps: tuple[int, ...]
    episodes: int
    group: int
    groups: int
    groups_without_success: int
    deciding_tool: str
    chain: tuple[str, ...]
    """The tool calls of a usual successful look-up, in order."""
    lookup: Share
    """q."""
    guess: Share
    """p_g."""
    tools: Share
    """p_t."""
    skill: dict[str, Share]
    """By tool, over the calls before which no call was wrong."""
    known: bool
    """Whether facts say which steps were right; otherwise a step counts as right if it has a witness or succeeded, in
    groups with a success."""
    harmless: float
    """Success with a wrong step, relative to success without."""
    witnessed: Share
    """Failing steps with a witness."""
    found: Share
    """Right failing steps with a witness."""
    right: Share
    """Right steps among the failing ones with a witness, if known."""
    distance: tuple[float, ...]
    """1 − similarity of right failing steps to their witness, quantiles .1, .5, .9."""
    spread: float
    overlap: float

    @property
    def headroom(self) -> dict[str, float]:
        """Return 1 - skill of each tool."""
        return {tool: 1 - share.value for tool, share in self.skill.items()}


def read(run: Path, least: int) -> list[RecordedEpisode]:
    """Return the episodes of a run's first recorded steps, at least `least` if there are so many. Raises UserError."""
    paths = sorted((run / "episodes").glob("step_*.npz"))
    if not paths:
        raise UserError(
            f"{run} has no recorded episodes (episodes/step_*.npz): give the folder of a training run; "
            "log.episodes_every says how often a step is recorded."
        )
    episodes: list[RecordedEpisode] = []
    for path in paths:
        if len(episodes) < least:
            try:
                episodes += [episode for episode in records.load(path) if episode.judged]
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): remove the damaged file.") from error
    if not any(turn.slot >= 0 for episode in episodes for turn in episode.turns):
        raise UserError(
            f"The recordings of {run} hold no tool step with TAPO's similarities: either no tool was called, or it is "
            "the folder of an evaluation. Give the folder of a training run whose policy calls tools."
        )
    return episodes


def settings(run: Path) -> dict[str, Any]:
    """Return config.json of a run as nested dicts; empty if there is none."""
    path = run / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measure(episodes: Sequence[RecordedEpisode], theta: float) -> Measured:
    """Measure the policy that played the episodes. theta: that of the run, for the noise of similarities."""
    groups: dict[Any, list[RecordedEpisode]] = {}
    for episode in episodes:
        groups.setdefault((episode.step, episode.prompt), []).append(episode)
    successful = {key for key, group in groups.items() if any(episode.success for episode in group)}
    known = all(_is_known(episode) for episode in episodes)
    calls = [_calls(episode) for episode in episodes if _calls(episode)]
    good = [_calls(episode) for episode in episodes if episode.success and _calls(episode)] or calls
    deciding = collections.Counter(chain[-1] for chain in good).most_common(1)[0][0]
    chain = collections.Counter(tuple(chain) for chain in good if chain[-1] == deciding).most_common(1)[0][0]
    looked = [deciding in _calls(episode) for episode in episodes]

    judged = episodes if known else [e for e in episodes if (e.step, e.prompt) in successful]
    judge: Callable[[RecordedEpisode], list[tuple[RecordedTurn, bool | None]]] = (
        truth.steps_of if known else _by_witness
    )
    judged_steps = [(episode, judge(episode)) for episode in judged]
    failing = [
        (turn, right)
        for episode, steps in judged_steps
        if not episode.success and (episode.step, episode.prompt) in successful
        for turn, right in steps
    ]
    right_sims = [turn.sim for turn, right in failing if right and turn.sim > 0]
    wrong_sims = [turn.sim for turn, right in failing if right is False]
    witnesses = np.mean([sum(e.success for e in groups[key]) for key in successful]) if successful else 0
    found = _share([turn.correctable for turn, right in failing if right])
    return Measured(
        steps=tuple(sorted({episode.step for episode in episodes})),
        episodes=len(episodes),
        group=max(len(group) for group in groups.values()),
        groups=len(groups),
        groups_without_success=len(groups) - len(successful),
        deciding_tool=deciding,
        chain=chain,
        lookup=_share(looked),
        guess=_share([e.success for e, flag in zip(episodes, looked, strict=True) if not flag]),
        tools=_share([e.success for e, flag in zip(episodes, looked, strict=True) if flag]),
        skill={tool: _skill(judged_steps, tool) for tool in dict.fromkeys(chain)},
        known=known,
        harmless=_harmless(judged_steps, deciding) if known else 0.0,
        witnessed=_share([turn.correctable for turn, _ in failing]),
        found=found,
        right=_share([right for turn, right in failing if turn.correctable and right is not None]),
        distance=tuple(1 - np.quantile(right_sims, [0.9, 0.5, 0.1])) if right_sims else (),
        spread=_spread(found, theta, round(float(witnesses))) if known else 0.0,
        overlap=float(np.median(wrong_sims)) if wrong_sims else 0.0,
    )


def _share(flags: Sequence[Any]) -> Share:
    return Share(int(sum(map(bool, flags))), len(flags))


def _calls(episode: RecordedEpisode) -> list[str]:
    return [turn.call_name for turn in episode.turns if turn.slot >= 0]


def _is_known(episode: RecordedEpisode) -> bool:
    try:
        truth.steps_of(episode)
    except ValueError:
        return False
    return True


def _by_witness(episode: RecordedEpisode) -> list[tuple[RecordedTurn, bool | None]]:
    return [(turn, episode.success or turn.correctable) for turn in episode.turns if turn.slot >= 0]


def _skill(judged_steps: Sequence[Any], tool: str) -> Share:
    """Return the share of right calls of a tool, over those before which no call of the episode was wrong.

    The wrong ones among these are what TAPO can still teach.
    """
    rights = []
    for _, steps in judged_steps:
        for turn, right in steps:
            if turn.call_name == tool and right is not None:
                rights.append(right)
            if right is False:
                break
    return _share(rights)


def _harmless(judged_steps: Sequence[Any], deciding: str) -> float:
    """Return the success of look-ups with a wrong step relative to that of look-ups without one."""
    flags: dict[bool, list[bool]] = {True: [], False: []}
    for episode, steps in judged_steps:
        if deciding in [turn.call_name for turn, _ in steps]:
            flags[any(right is False for _, right in steps)].append(episode.success)
    with_wrong, without = _share(flags[True]), _share(flags[False])
    return min(1.0, (with_wrong.part / max(1, with_wrong.whole)) / without.value)


def _spread(found: Share, theta: float, witnesses: int) -> float:
    """Return the spread at which as many right steps find one of `witnesses` calls at theta, by simulation."""
    if not found.whole or not witnesses:
        return 0.0
    draw = np.random.default_rng(0)
    own_N, other_NxW = draw.random(4000), draw.random((4000, witnesses))
    nearest_N = np.abs(own_N[:, None] - other_NxW).min(axis=1)
    found_X = np.array([(1 - spread * nearest_N >= theta).mean() for spread in SPREADS])
    return float(SPREADS[np.abs(found_X - found.part / found.whole).argmin()])
