"""Split a message that has several calls: each call gets the tokens that wrote it. Plain Python, no jax."""

from collections.abc import Callable, Sequence

from tapo_jax.types import Turn


def split(turn: Turn, ends: Sequence[int], token: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[Turn]:
    """Return a message with several calls as one turn for each, which together have its tokens and its text.

    A call's tokens begin where the call before it ends; the first has the thought, the last the stop token. A token
    that writes both belongs to the call that ends with it.

    turn: the whole message.
    ends: where each call ends in `turn.text`, in characters, in order.
    token: the ids of the episode.
    decode: from ids to text.
    """
    cuts = [0]  # in tokens
    marks = [0]  # in characters
    for end in ends[:-1]:
        cut, mark = _tokens_to(end, cuts[-1], token[turn.start : turn.stop], decode)
        cuts.append(cut)
        marks.append(max(mark, marks[-1]))
    cuts.append(turn.stop - turn.start)
    marks.append(len(turn.text))
    return [
        Turn(
            start=turn.start + cuts[i],
            stop=turn.start + cuts[i + 1],
            text=turn.text[marks[i] : marks[i + 1]],
            opening=turn.opening if i == 0 else "",
            forced=_inside(turn.forced, turn.start + cuts[i], turn.start + cuts[i + 1]),
            continues=turn.continues or i > 0,
        )
        for i in range(len(ends))
    ]


def _tokens_to(end: int, first: int, token: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[int, int]:
    """Return the fewest tokens, more than `first`, whose text has `end` characters, and how many it has."""
    low, high = first + 1, len(token)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(decode(token[:middle])) >= end else (middle + 1, high)
    return low, len(decode(token[:low]))


def _inside(forced: tuple[int, int] | None, start: int, stop: int) -> tuple[int, int] | None:
    return forced if forced is not None and start <= forced[0] < stop else None
