"""Notice a service that has stopped working: the share of failures among the last requests."""

import collections
from collections.abc import Mapping, Sequence

from tapo_jax.types import Episode

FAILURES = ("timeout", "service", "exception")
LEAST = 20  # requests before which nothing is judged


class Watch:
    """Remembers how the last requests to each service ended.

    services: name -> address, "" if it has none.
    max_failures: share of failures above which a service is broken.
    window: number of last requests that count.
    """

    def __init__(self, services: Mapping[str, str], *, max_failures: float, window: int):
        self._services, self._most, self._least = dict(services), max_failures, min(LEAST, window)
        self._failed = {name: collections.deque(maxlen=window) for name in services}

    def note(self, episodes: Sequence[Episode]) -> None:
        """Take in the requests of these episodes in their order; what came from a cache or a recording is none."""
        for turn in (turn for episode in episodes for turn in episode.turns):
            origin = turn.result.origin if turn.result is not None else None
            if origin is not None and origin.source == "live" and origin.service in self._failed:
                self._failed[origin.service].append(turn.result.error in FAILURES)

    def broken(self) -> str:
        """Return a sentence about the first service with too many failures, "" if there is none."""
        for name, failed in self._failed.items():
            if len(failed) >= self._least and sum(failed) > self._most * len(failed):
                at = f" at {self._services[name]}" if self._services[name] else ""
                return (
                    f"{sum(failed)} of the last {len(failed)} requests to the service '{name}'{at} failed, more than "
                    f"tools.max_failures ({self._most:g}) allows"
                )
        return ""
