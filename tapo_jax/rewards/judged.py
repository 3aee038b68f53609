"""Compute rewards with a judge: exact match first; only answers that fail it are judged."""

import dataclasses

from tapo_jax.rewards.format import format_score
from tapo_jax.rewards.judge import Judge
from tapo_jax.rewards.matching import exact_match_published
from tapo_jax.rewards.scoring import accuracy
from tapo_jax.types import Episode


@dataclasses.dataclass(frozen=True)
class Scored:
    """The rewards of one episode."""

    rewards: dict[str, float]
    """Those of `scoring.score`, and exact_match and published."""
    judged: bool = True
    """False if the judge gave no verdict: statistics must leave the episode out, and its accuracy of 0 does not mean
    a wrong answer."""
    word: str = ""
    """The judge's reply, "" if exact match was enough."""


@dataclasses.dataclass(frozen=True)
class JudgedScore:
    """A thread-safe function that scores an episode. Call `close` at the end."""

    judge: Judge

    def __call__(self, episode: Episode) -> Scored:
        exact = accuracy(episode.answer, episode.prompt)
        rewards = {
            "accuracy": exact,
            "format": format_score(episode),
            "exact_match": exact,
            "published": exact_match_published(episode.answer, episode.prompt.answers),
        }
        if exact:
            return Scored(rewards)
        verdict = self.judge(episode.prompt, episode.answer)
        return Scored(rewards | {"accuracy": float(verdict.right is True)}, verdict.right is not None, verdict.word)

    def close(self) -> None:
        """Close the judge's connections and its cache."""
        self.judge.close()
