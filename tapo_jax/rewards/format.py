"""Compute the format reward, which tags alone do not earn."""

from tapo_jax.rollout.chat import parse_turn
from tapo_jax.types import Episode


def format_score(episode: Episode) -> float:
    """Return 1.0 if every turn is a thought + one call or answer, a call was executed, and an answer ends it; else 0.0.

    Only executed calls count: tags that do nothing earn nothing. A thought that the chat template opened or that was
    closed by force counts as a thought.
    """
    texts = [(turn.text.replace("<|im_end|>", ""), turn.opening) for turn in episode.turns]
    formed = all(parse_turn(text, opening=opening).format_ok for text, opening in texts)
    return float(formed and episode.finish == "answer" and any(turn.is_step for turn in episode.turns))
