"""Run the processes of a sweep: which run is next, on which cores, and how it ended."""

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tapo_jax.config import UserError
from tapo_jax.processes import StopRequest
from tapo_jax.sweep import runs as sweep
from tapo_jax.sweep.runs import Run

POLL_S = 0.2


@dataclasses.dataclass
class Child:
    """A run in progress."""

    run: Run
    process: subprocess.Popen
    lock: IO
    """Held by this process and by the child, so that no other sweep starts the same run."""


def work(runs: Sequence[Run], *, jobs: int, cache: Path, watch: Callable[[Run, str], None]) -> None:
    """Run what has neither a result nor failed, in the given order, `jobs` at a time, each on its share of the cores.

    cache: folder of compiled programs, unless the environment names one.
    watch: called as watch(run, state) with "running" (repeatedly), "done", "failed", "interrupted", and "elsewhere" for
        a run that another process works on.

    SIGTERM and Ctrl-C are passed on: the runs save a checkpoint and end, and the same command resumes from there.
    """
    shares = core_shares(jobs)
    waiting = deque(run for run in runs if sweep.state(run) == "waiting")
    children: list[Child | None] = [None] * jobs
    with StopRequest() as stop:
        told = False
        try:
            while any(children) or (waiting and not stop.requested):
                for place, child in enumerate(children):
                    if child is not None and child.process.poll() is not None:
                        watch(child.run, settle(child, len(shares[place]), stopping=stop.requested))
                        children[place] = None
                    while children[place] is None and waiting and not stop.requested:
                        children[place] = start(waiting[0], shares[place], jobs, cache)
                        run = waiting.popleft()
                        if children[place] is None:
                            state = sweep.state(run)
                            watch(run, "elsewhere" if state == "waiting" else state)
                if stop.requested and not told:
                    told = True
                    for child in filter(None, children):
                        child.process.terminate()
                for child in filter(None, children):
                    watch(child.run, "running")
                time.sleep(POLL_S if any(children) else 0)
        finally:
            for child in filter(None, children):
                child.process.kill()
                child.process.wait()
                child.lock.close()


def core_shares(jobs: int) -> list[list[int]]:
    """Return the cores of each of `jobs` workers: those that this process may use, split up; shared if too few."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [cores[place::jobs] or [cores[place % len(cores)]] for place in range(jobs)]


def start(run: Run, cores: Sequence[int], jobs: int, cache: Path) -> Child | None:
    """Start a run; return None if another process works on it or has ended it."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    lock = open(run.workdir / "lock", "w")  # noqa: SIM115 - held until the child has ended
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    if sweep.state(run) != "waiting":
        lock.close()
        return None
    sweep.begin(run)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    if jobs > 1:
        threads = str(len(cores))
        environment |= {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}"}
    with on_cores(cores), open(run.workdir / "log.txt", "a") as log:
        process = subprocess.Popen(
            [*run.command, f"--workdir={run.workdir}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment | os.environ,
            start_new_session=True,  # Ctrl-C reaches only this process, which passes it on
            pass_fds=(lock.fileno(),),
        )  # fmt: skip
    return Child(run, process, lock)


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Make processes started inside use only these cores, with as many threads (if the system supports affinity)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def settle(child: Child, cores: int, *, stopping: bool) -> str:
    """Save the result or the failure of a child that has ended; return "done", "failed" or "interrupted"."""
    run, code = child.run, child.process.returncode
    try:
        if code == 0:
            try:
                sweep.keep_result(run, cores)
                return "done"
            except UserError as error:
                sentence = str(error)
        else:
            sentence = last_words(run.workdir / "log.txt", code)
        if stopping:
            return "interrupted"
        sweep.keep_failure(run, sentence)
        return "failed"
    finally:
        child.lock.close()


def last_words(log: Path, code: int) -> str:
    """Return why a program ended: its error message, or the last line that it printed."""
    if code < 0:
        return f"The process was ended by {signal.Signals(-code).name}: see {log.name} in the run's folder."
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (sentences or lines or [f"The process ended with code {code}."])[-1]


def progress(run: Run) -> tuple[int, int]:
    """Return (last step, total steps) of a run in progress."""
    total: Any = run.asked.get("total_steps", 0)
    try:
        last = (run.workdir / "metrics.jsonl").read_bytes().rstrip().rsplit(b"\n", 1)[-1]
        return int(last.split(b",", 1)[0].split(b":")[1]), total
    except (OSError, IndexError, ValueError):
        return 0, total
