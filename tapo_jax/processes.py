"""Connect the processes of a run and exchange small host values between them."""

import contextlib
import fcntl
import glob
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tapo_jax.config import UserError


def join() -> None:
    """Connect the processes of a pod or cluster; do nothing on one machine. Call this before any other jax call.

    The hosts of a TPU slice find each other automatically. Elsewhere each process reads three environment variables:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises UserError if only
    some of them are set or a value is invalid.
    """
    if jax.distributed.is_initialized():
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if len(given) == len(names):
        address, count, rank = given.values()
        if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count)) or ":" not in address:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is '{address}', JAX_NUM_PROCESSES '{count}' and JAX_PROCESS_ID '{rank}': "
                "give host:port, the number of processes and a number from 0 that is smaller."
            )
        jax.distributed.initialize(address, int(count), int(rank))
    elif given:
        missing = " and ".join(name for name in names if name not in given)
        raise UserError(f"{' and '.join(given)} is set in the environment but {missing} is not: set all three or none.")
    elif on_tpu_slice():
        jax.distributed.initialize()


def on_tpu_slice() -> bool:
    """Return whether this machine is one of the hosts of a TPU slice that this program is going to use."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    alone = workers != "" and "," not in workers  # a notebook runtime names its only host
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and not alone


def any_of(flag: bool) -> bool:
    """Return whether the flag is set in any process. Every process must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def largest(*numbers: int) -> tuple[int, ...]:
    """Return each number's max over the processes. Every process must call this."""
    if jax.process_count() == 1:
        return numbers
    return tuple(int(n) for n in multihost_utils.process_allgather(np.array(numbers, np.int32)).max(axis=0))


def gather(value: Any) -> list[Any]:
    """Return each process's value (it must be JSON-serialisable) in process order. Every process must call this."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    (size,) = largest(len(text))
    padded = np.full(size, ord(" "), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def raise_together(error: Exception | None) -> None:
    """Raise in every process if one of them has an error, so that none waits for a process that has ended.

    A process with an error raises its own; the others raise UserError with the first one's sentence. Every process must
    call this.
    """
    if any_of(error is not None):
        said = gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        process, text = next((process, text) for process, text in enumerate(said) if text is not None)
        raise UserError(f"Process {process} of {len(said)} ended the run: {text}")


def mean_over(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each number over the processes; a name that a process lacks counts as 0.

    Every process must call this.
    """
    each = gather(dict(values))
    names = dict.fromkeys(name for one in each for name in one)
    return {name: sum(one.get(name, 0.0) for one in each) / len(each) for name in names}


@contextlib.contextmanager
def alone_in(workdir: Path, *, lock: str = "train.lock", flag: str = "--workdir") -> Iterator[None]:
    """Lock the work directory of a run. It is a lock of the system, which a process that dies releases.

    lock: the name of the file. flag: the flag that names the folder.

    Process 0 holds it for all, and every process must call this. Raises UserError in every process if another run holds
    the lock. On a file system without locks nothing is locked.
    """
    taken, held = False, None
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        held = open(workdir / lock, "w")  # noqa: SIM115 - open until the run ends
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # some shared file systems have no locks
            pass
    try:
        if any_of(taken):
            raise UserError(
                f"Another run is working in {workdir}: give another {flag}, or wait until that run has ended."
            )
        yield
    finally:
        if held is not None:
            held.close()


class StopRequest:
    """Catch SIGTERM (a preemption) and Ctrl-C within a `with` block, so that the loop can end where nothing is lost.

    `requested` becomes True at the first signal; a second one has its previous effect. Outside of the main thread no
    signal is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
