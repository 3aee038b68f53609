"""An episode and its accepted answers -> named rewards. No normalising over groups: that is `advantages.py`."""

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

from tapo_jax.rollout.chat import parse_turn
from tapo_jax.types import Episode

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# A minus sign stands before a number and not between two ("1700-1800"); commas stand between thousands.
_NUMBER = re.compile(r"(?<![\w.,])[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\d+", re.ASCII)
_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def normalise(text: str) -> str:
    """Lower case, accents and punctuation and articles removed, white space collapsed."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or text
    return " ".join(_ARTICLES.sub(" ", plain.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str | None, accepted: Sequence[str]) -> float:
    """1.0 where the normalised answer equals one of the normalised accepted answers, and is not empty."""
    if answer is None or not normalise(answer):
        return 0.0
    return float(normalise(answer) in {normalise(text) for text in accepted})


def in_range(answer: str | None, ranges: Sequence[Sequence[float]]) -> float:
    """1.0 where the answer has exactly one number and it lies in one of the (low, high) ranges: InfoSeek's rule for
    numeric questions. "1,889 m" has one number, "10 or 12" two."""
    numbers = _NUMBER.findall(answer or "")
    if len(numbers) != 1:
        return 0.0
    value = float(numbers[0].replace(",", "").replace("\N{MINUS SIGN}", "-"))
    return float(any(low <= value <= high for low, high in ranges))


def format_score(episode: Episode) -> float:
    """1.0 where every turn has the form think + one call or answer, at least one call was executed, and an answer ends
    it. Only executed calls count: writing tags that do nothing earns nothing. A thought that the chat template opened,
    or that was closed by force, is a thought."""
    formed = all(
        parse_turn(turn.text.replace("<|im_end|>", ""), opening=turn.opening).format_ok for turn in episode.turns
    )
    return float(formed and episode.finish == "answer" and any(turn.is_step for turn in episode.turns))


def score(episode: Episode) -> dict[str, float]:
    """{"accuracy": …, "format": …}, each in 0..1. A question with meta "ranges" takes a number in one of them too."""
    prompt = episode.prompt
    right = max(exact_match(episode.answer, prompt.answers), in_range(episode.answer, prompt.meta.get("ranges", ())))
    return {"accuracy": right, "format": format_score(episode)}


def total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Σ weight · reward. Raises KeyError for a weight whose reward does not exist."""
    return float(sum(weight * rewards[name] for name, weight in weights.items()))
