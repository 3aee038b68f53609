"""Score an episode by its accepted answers with named rewards. `learn.advantages` normalises them over groups."""

from tapo_jax.rewards.format import format_score
from tapo_jax.rewards.matching import exact_match, exact_match_published, normalise, normalise_published
from tapo_jax.rewards.number_range import in_range
from tapo_jax.rewards.scoring import accuracy, score, total

__all__ = [
    "accuracy",
    "exact_match",
    "exact_match_published",
    "format_score",
    "in_range",
    "normalise",
    "normalise_published",
    "score",
    "total",
]
