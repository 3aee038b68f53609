"""Connect the processes of a run and exchange small host values between them."""

import contextlib
import dataclasses
import fcntl
import glob
import importlib.util
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np
from jax.experimental import multihost_utils

from tapo_jax.config import UserError
from tapo_jax.records import write_whole


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


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process was doing at a time of its own clock."""

    count: int = 0
    """Places that it has come to. All processes come to the same places in the same order."""
    doing: str = ""
    """What it does, at the newest one."""
    step: int = 0
    """Of training."""
    age_s: float = 0.0
    """How long it has been doing that."""
    host: str = ""
    number: int = 0
    """Of the beat: it grows as long as the process lives."""


class Heartbeat:
    """Say which process the others wait for.

    Each process notes the places that it comes to (`come`) and what else it does (`note`). A thread of each writes the
    newest note to a small file, and that of process 0 reads the files: nothing here waits for another process.

    folder: of the files; all processes have to share it.
    late_s: seconds that processes may wait for others before that is said, and between two such lines; 0: nothing is
        written.
    say: gets a line of text, in process 0.

    Alone, a process writes nothing.
    """

    def __init__(self, folder: Path, late_s: float, say: Callable[[str], None]):
        self._folder, self._late_s, self._say = folder, late_s, say
        self._index, self._processes = jax.process_index(), jax.process_count()
        self.step = 0
        """The step of training, as it is said."""
        self._now = (0, "start", time.monotonic())  # replaced as a whole: two threads read it
        self._seen: dict[int, tuple[Beat, float]] = {}  # the newest beat of each process, and when it came
        self._said, self._number = -float("inf"), 0
        self._ended = threading.Event()

    def come(self, place: str) -> None:
        """Note a place that every process comes to, and no process leaves before the others if it exchanges values."""
        self._now = (self._now[0] + 1, place, time.monotonic())

    def note(self, doing: str) -> None:
        """Note what this process does now at the place where it is."""
        self._now = (self._now[0], doing, time.monotonic())

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Write and read within the `with` block, if there are several processes."""
        if self._processes == 1 or not self._late_s:
            yield
            return
        if self._index == 0:  # what is left of a run that was killed is no sign of this one
            for path in self._folder.glob("process_*.json"):
                path.unlink(missing_ok=True)
        thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            with contextlib.suppress(OSError):  # the last one removes the folder
                self._path(self._index).unlink(missing_ok=True)
                self._folder.rmdir()

    def _run(self) -> None:
        while not self._ended.wait(min(self._late_s / 4, 10.0)):
            with contextlib.suppress(OSError):  # a full disk is the run's to report
                self._write()
            if self._index == 0:
                self._look(time.monotonic())

    def _path(self, process: int) -> Path:
        return self._folder / f"process_{process:05d}.json"

    def _write(self) -> None:
        self._number += 1
        write_whole(self._path(self._index), json.dumps(dataclasses.asdict(self._beat(time.monotonic()))))

    def _beat(self, now: float) -> Beat:
        count, doing, since = self._now
        return Beat(count, doing, self.step, now - since, socket.gethostname(), self._number)

    def _read(self, process: int) -> Beat | None:
        """Return the newest beat of another process, None if it is not there."""
        try:
            found = json.loads(self._path(process).read_text())
            return Beat(**{name: kind(found[name]) for name, kind in get_type_hints(Beat).items()})
        except (OSError, ValueError, TypeError, LookupError):
            return None

    def _look(self, now: float) -> None:
        """Read all beats, and say who is late if the others have waited for long."""
        for process in range(1, self._processes):
            beat = self._read(process)
            if beat is not None and (process not in self._seen or beat.number != self._seen[process][0].number):
                self._seen[process] = beat, now
        self._seen[0] = self._beat(now), now
        front = max(beat.count for beat, _ in self._seen.values())
        waited = max(beat.age_s + now - came for beat, came in self._seen.values() if beat.count == front)
        late = [process for process in range(self._processes) if self._count(process) < front]
        if late and min(waited, now - self._said) >= self._late_s:
            self._said = now
            those = "; ".join(self._about(process, now) for process in late)
            self._say(f"waiting for {len(late)} of {self._processes} processes for {waited:.0f} s: {those}")

    def _count(self, process: int) -> int:
        return self._seen[process][0].count if process in self._seen else -1

    def _about(self, process: int, now: float) -> str:
        """Return what is known of a process."""
        if process not in self._seen:
            return f"process {process} has given no sign in {self._folder}"
        beat, came = self._seen[process]
        silent = f", last sign {now - came:.0f} s ago" if now - came >= self._late_s else ""
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - (beat.age_s + now - came)))
        return f"process {process} ({beat.host}): {beat.doing} of step {beat.step} since {since}{silent}"
