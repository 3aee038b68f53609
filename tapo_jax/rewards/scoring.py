"""Compute the named rewards of an episode and their weighted sum."""

from collections.abc import Mapping

from tapo_jax.rewards.format import format_score
from tapo_jax.rewards.matching import exact_match
from tapo_jax.rewards.number_range import in_range
from tapo_jax.types import Episode, Prompt


def accuracy(answer: str | None, prompt: Prompt) -> float:
    """Return 1.0 for an accepted answer, else 0.0; a question with meta "ranges" also accepts a number in a range."""
    return max(exact_match(answer, prompt.answers), in_range(answer, prompt.meta.get("ranges", ())))


def score(episode: Episode) -> dict[str, float]:
    """Return {"accuracy": …, "format": …}, each in 0..1."""
    return {"accuracy": accuracy(episode.answer, episode.prompt), "format": format_score(episode)}


def total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return Σ weight · reward. Raises KeyError for a weight whose reward does not exist."""
    return float(sum(weight * rewards[name] for name, weight in weights.items()))
