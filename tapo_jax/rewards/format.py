"""The format reward: tags alone do not earn it."""

from tapo_jax.rollout.chat import parse_turn
from tapo_jax.types import Episode


def format_score(episode: Episode) -> float:
    """1.0 where every turn has the form think + one call or answer, a call was executed, and an answer ends it.

    Only executed calls count: writing tags that do nothing earns nothing. A thought that the chat template opened, or
    that was closed by force, is a thought.
    """
    texts = [(turn.text.replace("<|im_end|>", ""), turn.opening) for turn in episode.turns]
    formed = all(parse_turn(text, opening=opening).format_ok for text, opening in texts)
    return float(formed and episode.finish == "answer" and any(turn.is_step for turn in episode.turns))
