"""Compute the format reward, which tags alone do not earn."""

from tapo_jax.rollout.chat import parse_turn
from tapo_jax.types import Episode


def format_score(episode: Episode) -> float:
    """Return 1.0 if every turn is a thought + one call or answer, a call was executed, and an answer ends it; else 0.0.

    Where a message may have several calls, it is a thought + calls. Only executed calls count: tags that do nothing
    earn nothing. A thought that the chat template opened or that was closed by force counts as a thought.
    """
    formed = all(
        parse_turn(text.replace("<|im_end|>", ""), opening=opening, most_calls=calls).format_ok
        for text, opening, calls in _messages(episode)
    )
    return float(formed and episode.finish == "answer" and any(turn.is_step for turn in episode.turns))


def _messages(episode: Episode) -> list[tuple[str, str | None, int]]:
    """Return text, opening and number of calls of each message: one with several calls is several turns."""
    messages: list[tuple[str, str | None, int]] = []
    for turn in episode.turns:
        if turn.continues:
            text, opening, calls = messages[-1]
            messages[-1] = text + turn.text, opening, calls + 1
        else:
            messages.append((turn.text, turn.opening, 1))
    return messages
