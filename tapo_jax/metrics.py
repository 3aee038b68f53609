"""Write a run's metrics: one JSON line per step, TensorBoard, a progress bar. Only process 0 writes.

Everything else reads `metrics.jsonl`: {"step": 12, "reward/mean": 0.61, …}. A number that is not finite is written as
null, so that every JSON reader can read the file and no max can hide it.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from tapo_jax import processes
from tapo_jax.models import flops
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.inputs import PixelStore
from tapo_jax.records import parse_metrics, write_whole
from tapo_jax.types import Episode

_compiles = [0]


def _on_event(event: str, _seconds: float, **_: Any) -> None:
    _compiles[0] += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compile_count() -> int:
    """Return how many programs XLA compiled or read from its cache in this process since this module was imported."""
    return _compiles[0]


def profiling(step: int, window: Sequence[int], folder: Path) -> contextlib.AbstractContextManager:
    """Trace what a step does with the profiler (TensorBoard and Perfetto read the trace) if it is in the window.

    window: the first and the last step, or one step, or nothing.
    folder: each process writes its traces to a subfolder of it.
    """
    if not window or not window[0] <= step <= window[-1]:
        return contextlib.nullcontext()
    return jax.profiler.trace(folder / f"process_{jax.process_index()}" / f"step_{step:06d}")


class Clock:
    """Sum seconds by name: `with clock("rollout"): …`; `take()` returns {"time/rollout": …} and resets the sums.

    enter: called with the name when one begins, and with that of the outer one, or "", when it ends.

    The attribute `step` is the step of training that is timed.
    """

    def __init__(self, enter: Callable[[str], None] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self.step = 0
        self._open = [""]
        self._enter = enter or (lambda name: None)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._open.append(name)
        self._enter(name)
        try:
            yield
        finally:
            self._open.pop()
            self._enter(self._open[-1])
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


def throughput(
    values: Mapping[str, float],
    episodes: Sequence[Episode],
    config: Qwen3VLConfig,
    pixels: PixelStore,
    *,
    train_vision: bool,
    lora: bool,
) -> dict[str, float]:
    """Return perf/… of one step from its time/….

    tokens_per_s: tokens that the policy wrote in all processes, per second of the whole step.
    rollout_tokens_per_s: the same per second of the rollout.
    tflops: operations of the updates per second and device, in 10¹².
    mfu: their share of the device's peak, if the peak is known.
    """
    grids = [pixels.grid(image) for episode in episodes for image in episode.images]
    lengths = [len(episode.token_T) for episode in episodes]
    done = flops.update(config, lengths, [t * h * w for t, h, w in grids], train_vision=train_vision, lora=lora)
    each = done / values["time/update"] / jax.local_device_count()
    written = sum(int(episode.mask_T.sum()) for episode in episodes) * jax.process_count()
    chip = flops.chip(jax.local_devices()[0].device_kind)
    perf = {"perf/tokens_per_s": written / values["time/step"], "perf/tflops": each / 1e12}
    perf["perf/rollout_tokens_per_s"] = written / values["time/rollout"]
    return perf if chip is None else perf | {"perf/mfu": each / chip.flops}


class MetricWriter:
    """Write the metrics of steps. Lines of steps after `resumed_step` (None: a fresh start) are removed."""

    def __init__(self, workdir: Path, *, total_steps: int, resumed_step: int | None, tensorboard: bool) -> None:
        self._main = jax.process_index() == 0
        if not self._main:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        last = -1 if resumed_step is None else resumed_step
        before = self.path.read_bytes() if self.path.exists() else b""
        lines, damaged = parse_metrics(before)
        if damaged:
            write_whole(workdir / "metrics.damaged.jsonl", before)
        kept = [line for line in lines if line["step"] <= last]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open until close()
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=last + 1) if tensorboard else None
        self._bar = tqdm(total=total_steps, initial=max(last, 0), unit="step", dynamic_ncols=True)
        for number, reason in damaged:
            self.say(
                f"{self.path}, line {number} is left out: {reason}; the file as it was is kept as metrics.damaged.jsonl"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._main:
            return
        line = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix_str(summary(values), refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line for the user above the progress bar."""
        if self._main:
            self._bar.write(text)

    def close(self) -> None:
        if not self._main:
            return
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def summary(values: Mapping[str, float]) -> str:
    """Return a step in one line: reward 0.610  accuracy 0.420  1200 tok/s  rollout 61% tool_wait 3% … update 30%."""
    parts = []
    for label, name in (("reward", "reward/mean"), ("accuracy", "reward/accuracy"), ("held-out", "eval/accuracy")):
        if name in values:
            parts.append(f"{label} {values[name]:.3f}")
    if "perf/tokens_per_s" in values:
        parts.append(f"{values['perf/tokens_per_s']:.0f} tok/s")
    total = values.get("time/step", 0.0)
    if total > 0:
        names = ("rollout", "tool_wait", "prefill", "decode", "logprobs", "update")
        shares = [f"{name} {100 * values['time/' + name] / total:.0f}%" for name in names if "time/" + name in values]
        parts.append(" ".join(shares))
    return "  ".join(parts)


def _json_number(value: Any) -> float | int | None:
    number = value.item() if isinstance(value, np.generic | np.ndarray) else value
    return number if math.isfinite(number) else None


def reward_means(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the means of the named rewards over the judged episodes of all processes, and the unjudged share.

    Every process must call this.
    """
    judged = [episode for episode in episodes if episode.judged]
    sums = {name: float(np.sum([e.rewards[name] for e in judged])) for name in episodes[0].rewards}
    sums = processes.mean_over(sums | {"": len(judged)})
    count = sums.pop("")
    means = {f"reward/{name}": value / count if count else np.nan for name, value in sums.items()}
    return means | {"reward/unjudged": 1 - count / len(episodes)}
