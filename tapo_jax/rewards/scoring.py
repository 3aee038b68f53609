"""The rewards of an episode, by name, and their weighted sum."""

from collections.abc import Mapping

from tapo_jax.rewards.format import format_score
from tapo_jax.rewards.matching import exact_match
from tapo_jax.rewards.number_range import in_range
from tapo_jax.types import Episode, Prompt


def accuracy(answer: str | None, prompt: Prompt) -> float:
    """1.0 for an accepted answer; a question with meta "ranges" takes a number in one of them too."""
    return max(exact_match(answer, prompt.answers), in_range(answer, prompt.meta.get("ranges", ())))


def score(episode: Episode) -> dict[str, float]:
    """{"accuracy": …, "format": …}, each in 0..1."""
    return {"accuracy": accuracy(episode.answer, episode.prompt), "format": format_score(episode)}


def total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Σ weight · reward. Raises KeyError for a weight whose reward does not exist."""
    return float(sum(weight * rewards[name] for name, weight in weights.items()))
