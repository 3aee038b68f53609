"""Score episodes on threads: each one when it ends, while others still play."""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence

from tapo_jax.rewards.judged import Scored
from tapo_jax.types import Episode

Rewards = dict[str, float] | Scored


def assign(episode: Episode, found: Rewards) -> None:
    """Set the rewards of an episode, and the judge's verdict and word if there is one."""
    if isinstance(found, Scored):
        episode.rewards, episode.judged, episode.word = found.rewards, found.judged, found.word
    else:
        episode.rewards = found


class ScorePool:
    """Score episodes on `workers` threads.

    `wait` sets the rewards in the order of its argument, so that nothing depends on which thread was first.
    """

    def __init__(self, score: Callable[[Episode], Rewards], workers: int):
        self._score = score
        self._tasks: queue.SimpleQueue[tuple[concurrent.futures.Future[Rewards], Episode] | None] = queue.SimpleQueue()
        # Daemons: a judge that does not reply must not delay the exit of a run that is stopped.
        self._threads = [threading.Thread(target=self._work, name="score", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        self._waiting: dict[int, tuple[Episode, concurrent.futures.Future[Rewards]]] = {}
        self.waited_s = 0.0

    def submit(self, episode: Episode) -> None:
        """Start scoring an episode that has ended."""
        future: concurrent.futures.Future[Rewards] = concurrent.futures.Future()
        self._waiting[id(episode)] = episode, future
        self._tasks.put((future, episode))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, episode = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._score(episode))
                except BaseException as error:
                    future.set_exception(error)

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
                assign(episode, self._waiting[id(episode)][1].result())
        finally:
            for _, future in self._waiting.values():
                future.cancel()
            self._waiting.clear()
            self.waited_s = time.perf_counter() - began

    def close(self, *, wait: bool = True) -> None:
        """Cancel what has not begun, and end the threads. wait: until what has begun has ended."""
        for _, future in self._waiting.values():
            future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()


class ScoreStream:
    """Score episodes on `workers` threads and pass each on when it has its rewards; none is kept.

    passed: called with the index and the episode, on the thread that scored it, for one episode at a time.
    """

    def __init__(self, score: Callable[[Episode], Rewards], workers: int, passed: Callable[[int, Episode], None]):
        self._score, self._passed = score, passed
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="score")
        self._room = threading.BoundedSemaphore(2 * workers)  # so that episodes do not pile up before a slow judge
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def submit(self, index: int, episode: Episode) -> None:
        """Start scoring an episode that has ended; wait while twice as many as there are threads wait already.

        After an error of a scorer episodes are dropped.
        """
        self._room.acquire()
        if self.failed:
            self._room.release()
        else:
            self._threads.submit(self._run, index, episode)

    @property
    def failed(self) -> bool:
        """Return whether a scorer has raised an error."""
        return self._error is not None

    def _run(self, index: int, episode: Episode) -> None:
        try:
            found = self._score(episode)
            with self._lock:
                assign(episode, found)
                self._passed(index, episode)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
        finally:
            self._room.release()

    def finish(self) -> None:
        """Wait until every episode has been passed on. Raises the first error of a scorer."""
        self._threads.shutdown(wait=True)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let the scorers that run end, and drop the episodes that wait."""
        self._threads.shutdown(wait=True, cancel_futures=True)
