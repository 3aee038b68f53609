"""Rewards with a judge: exact match first, and only what fails it is judged."""

import dataclasses
from collections.abc import Callable

from tapo_jax.rewards.format import format_score
from tapo_jax.rewards.judge import Judge
from tapo_jax.rewards.matching import exact_match_published
from tapo_jax.rewards.scoring import accuracy
from tapo_jax.types import Episode


@dataclasses.dataclass(frozen=True)
class Scored:
    """rewards: those of `scoring.score`, with exact_match and published beside them.

    judged: False where the judge gave no verdict; the episode must leave all statistics then, and its accuracy of 0 is
    no wrong answer. word: what the judge said, "" where exact match was enough.
    """

    rewards: dict[str, float]
    judged: bool = True
    word: str = ""


def make_score(judge: Judge) -> Callable[[Episode], Scored]:
    """A thread-safe scorer of episodes."""

    def score(episode: Episode) -> Scored:
        exact = accuracy(episode.answer, episode.prompt)
        rewards = {
            "accuracy": exact,
            "format": format_score(episode),
            "exact_match": exact,
            "published": exact_match_published(episode.answer, episode.prompt.answers),
        }
        if exact:
            return Scored(rewards)
        verdict = judge(episode.prompt, episode.answer)
        return Scored(rewards | {"accuracy": float(verdict.right is True)}, verdict.right is not None, verdict.word)

    return score
