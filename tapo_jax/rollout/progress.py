"""How far a rollout is, between two of its rounds, and a line about it for whoever waits. Plain Python, no jax."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a rollout of this process is."""

    seconds: float = 0.0
    """Since it began."""
    finished: int = 0
    """Episodes that have ended, of carried groups those of earlier steps too."""
    episodes: int = 0
    """Episodes of all groups that are played."""
    drawn: int = 0
    """Tokens that were drawn."""
    steps: int = 0
    """Decoding steps, in each of which every slot could have drawn a token."""
    slots: int = 0
    in_tools: bool = False
    """Whether it now waits for tools; if not, it is about to agree with the other processes on the calls of a round."""


def unwatched(moment: Moment) -> None:
    """Look at nothing."""


class ProgressLine:
    """Say how far a rollout is, at most once in so many seconds, so that a short one says nothing.

    say: gets a line of text.
    every_s: seconds between two lines, and from the beginning of a rollout to its first; 0: no lines.
    """

    def __init__(self, say: Callable[[str], None], every_s: float):
        self._say, self._every_s, self._last = say, every_s, Moment()

    def __call__(self, moment: Moment) -> None:
        if moment.seconds < self._last.seconds:  # another rollout has begun
            self._last = Moment()
        if self._every_s and moment.seconds - self._last.seconds >= self._every_s:
            self._say(line(self._last, moment))
            self._last = moment


def line(before: Moment, now: Moment) -> str:
    """Return the state of a rollout in one line; speed and idle slots are those since `before`."""
    drawn, possible = now.drawn - before.drawn, (now.steps - before.steps) * now.slots
    parts = [
        f"rollout: {now.finished} of {now.episodes} episodes after {now.seconds:.0f} s",
        f"{drawn / (now.seconds - before.seconds):.0f} tokens/s",
    ]
    idle = [f"{100 * (1 - drawn / possible):.0f} % of the slots idle"] if possible else []
    return ", ".join(parts + idle)
