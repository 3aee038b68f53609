"""Score episodes on threads: each one when it ends, while others still play."""

import concurrent.futures
import time
from collections.abc import Callable, Sequence

from tapo_jax.rewards.judged import Scored
from tapo_jax.types import Episode

Rewards = dict[str, float] | Scored


class ScorePool:
    """Score episodes on `workers` threads.

    `wait` sets the rewards in the order of its argument, so that nothing depends on which thread was first.
    """

    def __init__(self, score: Callable[[Episode], Rewards], workers: int):
        self._score = score
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="score")
        self._waiting: dict[int, tuple[Episode, concurrent.futures.Future[Rewards]]] = {}
        self.waited_s = 0.0

    def submit(self, episode: Episode) -> None:
        """Start scoring an episode that has ended."""
        self._waiting[id(episode)] = episode, self._threads.submit(self._score, episode)

    def wait(self, episodes: Sequence[Episode]) -> None:
        """Set the rewards of all episodes, including those never submitted.

        Raises the error of the first episode, in order, whose scorer raised one. `waited_s` is then the seconds that
        this call waited: the time that scoring added to the step.
        """
        began = time.perf_counter()
        for episode in episodes:
            if id(episode) not in self._waiting:
                self.submit(episode)
        try:
            for episode in episodes:
                found = self._waiting[id(episode)][1].result()
                if isinstance(found, Scored):
                    episode.rewards, episode.judged = found.rewards, found.judged
                else:
                    episode.rewards = found
        finally:
            for _, future in self._waiting.values():
                future.cancel()
            self._waiting.clear()
            self.waited_s = time.perf_counter() - began

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
