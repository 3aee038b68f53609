"""The processes of a sweep: which run is next, on which cores, and what became of it."""

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
    """A run that is running. lock: held by this process and by the child, so that no other sweep starts the same."""

    run: Run
    process: subprocess.Popen
    lock: IO


def work(runs: Sequence[Run], *, jobs: int, cache: Path, watch: Callable[[Run, str], None]) -> None:
    """Runs what has neither a result nor failed, in the order given, `jobs` at a time, each on its share of the cores.

    watch(run, state) is told what happens: "running" (again and again), "done", "failed", "interrupted", and
    "elsewhere" for a run that another process works on. SIGTERM and Ctrl-C are passed on: the runs save a checkpoint
    and end, and the same command goes on from there. cache: for compiled programs, where the environment names none.
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
    """The cores of each of `jobs` places: all cores that this process may use, dealt out; more jobs than cores
    share."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [cores[place::jobs] or [cores[place % len(cores)]] for place in range(jobs)]


def start(run: Run, cores: Sequence[int], jobs: int, cache: Path) -> Child | None:
    """The child, or None where another process works on this run or has ended it."""
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
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            pass_fds=(lock.fileno(),),
        )  # fmt: skip
    return Child(run, process, lock)


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """What is started inside runs on these cores alone, with as many threads (where the system has such a thing)."""
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
    """Keeps the result or the failure of a child that has ended: "done", "failed" or "interrupted"."""
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
    """Why a program ended: its sentence, or what it printed last."""
    if code < 0:
        return f"The process was ended by {signal.Signals(-code).name}: see {log.name} in the run's folder."
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (sentences or lines or [f"The process ended with code {code}."])[-1]


def progress(run: Run) -> tuple[int, int]:
    """(last step, of how many) of a run that is running."""
    total: Any = run.asked.get("total_steps", 0)
    try:
        last = (run.workdir / "metrics.jsonl").read_bytes().rstrip().rsplit(b"\n", 1)[-1]
        return int(last.split(b",", 1)[0].split(b":")[1]), total
    except (OSError, IndexError, ValueError):
        return 0, total
