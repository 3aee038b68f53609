"""Ask a service that may be slow, busy or broken: a rate limit, retries with growing waits, and equal calls joined."""

import concurrent.futures
import dataclasses
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tapo_jax.tools.arguments import BadCall

T = TypeVar("T")
BACK_OFF_S = (0.25, 8.0)  # the first wait and the longest, before jitter


class TryAgain(Exception):
    """The error of a try that may go better next time. The message completes "The service …".

    wait_s: the least seconds to wait, if the service named them.
    """

    def __init__(self, message: str, *, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


class Pace:
    """Spreads requests out in time. Safe to use from many threads.

    per_second: max requests a second of this process; 0: no limit.
    """

    def __init__(self, per_second: float):
        self._gap_s = 1 / per_second if per_second else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, deadline: float) -> None:
        """Wait for this request's turn. Raises TimeoutError at once if the turn comes later than the deadline."""
        if not self._gap_s:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            if turn >= deadline:
                raise TimeoutError
            self._next = turn + self._gap_s
        time.sleep(turn - now)


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long and how often a service is asked."""

    timeout_s: float
    """Of a whole call: all requests and the waits between them."""
    retries: int = 0
    """Further requests after one that raised TryAgain."""
    pace: Pace = dataclasses.field(default_factory=lambda: Pace(0.0))


def ask(request: Callable[[float], T], patience: Patience, *, what: str) -> tuple[T, int]:
    """Call `request(deadline)` until it gives a value; return the value and the number of retries.

    The waits double from BACK_OFF_S[0] to BACK_OFF_S[1], each with jitter, and are at least what the service asked for.
    If a wait would end after the time limit, the call fails at once.

    request: raises TryAgain, TimeoutError, or BadCall if another try is of no use.
    what: names the service in messages, such as "search service".

    Raises BadCall of kind "timeout" or "service"; its attribute `retries` is the number of retries.
    """
    deadline, tries = time.monotonic() + patience.timeout_s, patience.retries + 1
    for number in range(tries):
        try:
            patience.pace.wait(deadline)
            return request(deadline), number
        except TimeoutError:
            raise Failed("timeout", f"The {what} gave no result in {patience.timeout_s:g} seconds.", number) from None
        except BadCall as error:
            raise Failed(error.kind, str(error), number) from error
        except TryAgain as error:
            reason, asked_s = str(error), error.wait_s
        wait_s = max(min(BACK_OFF_S[0] * 2**number, BACK_OFF_S[1]) * random.uniform(0.5, 1.0), asked_s)
        if number + 1 == tries or time.monotonic() + wait_s >= deadline:
            break
        time.sleep(wait_s)
    raise Failed("service", f"The {what} {reason}.", number)


class Failed(BadCall):
    """The error of a service that was asked."""

    def __init__(self, kind: str, message: str, retries: int = 0):
        super().__init__(kind, message)
        self.retries = retries


class Joined:
    """Joins equal calls: while one is under way, the others wait for its outcome. Safe to use from many threads."""

    def __init__(self) -> None:
        self._flying: dict[str, concurrent.futures.Future[Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, key: str, call: Callable[[], T]) -> tuple[T, bool]:
        """Return what `call` returns, or raises, and whether another thread's call with the same key gave it."""
        mine: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            other = self._flying.setdefault(key, mine)
        if other is not mine:
            return other.result(), True
        try:
            value = call()
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(value)
            return value, False
        finally:
            with self._lock:
                del self._flying[key]
