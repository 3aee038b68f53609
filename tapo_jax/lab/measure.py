"""Compute numbers of simulated runs, N seeds each, and intervals of their differences."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tapo_jax.lab.simulate import Runs
from tapo_jax.report import statistics

COLLAPSED = 0.1  # a policy that looks up less often than this has lost its tools


def mean_accuracy(runs: Runs) -> np.ndarray:
    """Return the mean accuracy over all updates of each run, [N]: the area under its curve."""
    return runs.accuracy[:, 1:].mean(axis=1)


def updates_to(runs: Runs, level: float) -> np.ndarray:
    """Return the first update after which a run's accuracy is at least `level`, [N]; infinity if it never is."""
    reached_NxU = runs.accuracy >= level
    return np.where(reached_NxU.any(axis=1), reached_NxU.argmax(axis=1), np.inf)


def collapsed(runs: Runs) -> np.ndarray:
    """Return whether a run ended without its tools, [N]."""
    return runs.lookup[:, -1] < COLLAPSED


def at_best_rate(by_rate: Mapping[float, Runs], score: Callable[[Runs], np.ndarray]) -> tuple[float, Runs]:
    """Return (best learning rate over all seeds, Runs at the best rate for each seed).

    The rate of the even seeds is the one with the highest mean score on the odd seeds, and vice versa: a rate that is
    chosen on the seeds that it is judged by would look better than it is.
    """
    rates = list(by_rate)
    score_RxN = np.array([score(by_rate[rate]) for rate in rates])
    chosen = {parity: by_rate[rates[int(score_RxN[:, 1 - parity :: 2].mean(axis=1).argmax())]] for parity in (0, 1)}
    merged = {}
    for field in dataclasses.fields(Runs):
        parts = [getattr(chosen[parity], field.name)[parity::2] for parity in (0, 1)]
        merged[field.name] = np.empty_like(getattr(by_rate[rates[0]], field.name))
        merged[field.name][0::2], merged[field.name][1::2] = parts
    return rates[int(score_RxN.mean(axis=1).argmax())], Runs(**merged)


def difference(value_N: np.ndarray, base_N: np.ndarray) -> dict[str, Any]:
    """Return mean and 95 % interval (Student's t) of the differences paired by seed."""
    difference_N = np.asarray(value_N, float) - np.asarray(base_N, float)
    low, high = statistics.student(difference_N)
    return {"mean": round(float(difference_N.mean()), 4), "interval": [round(low, 4), round(high, 4)]}


def saved_updates(update_N: np.ndarray, base_N: np.ndarray, resamples: int = 2000) -> dict[str, Any] | None:
    """Return 1 - median / median of the base, with a bootstrap interval; None if a median is infinite."""
    if not np.isfinite(np.median(update_N)) or not np.isfinite(np.median(base_N)) or np.median(base_N) == 0:
        return None
    index_RxN = np.random.default_rng(0).integers(0, len(update_N), (resamples, len(update_N)))
    with np.errstate(invalid="ignore"):
        share_R = 1 - np.median(update_N[index_RxN], axis=1) / np.median(base_N[index_RxN], axis=1)
    low, high = np.quantile(np.where(np.isnan(share_R), -np.inf, share_R), [0.025, 0.975], method="nearest")
    low, high = np.maximum([low, high], -9.0)  # a resampled median can be infinite
    saved = float(1 - np.median(update_N) / np.median(base_N))
    return {"mean": round(saved, 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def versus(base: Runs, tapo: Runs) -> dict[str, Any]:
    """Compare TAPO with its base: mean accuracy over training, updates to a level, tools lost, what TAPO corrected.

    The level is half of the mean progress of the better one. `saved` is None if a median run does not reach it.
    `corrected` and `right` are of TAPO's first ten batches.
    """
    last = max(float(runs.accuracy[:, -1].mean()) for runs in (base, tapo))
    level = (float(base.accuracy[:, 0].mean()) + last) / 2
    right_NxU = np.where(tapo.corrected > 0, tapo.right, np.nan)[:, :10]
    return {
        "level": round(level, 3),
        "updates": [median(updates_to(runs, level)) for runs in (base, tapo)],
        "saved": saved_updates(updates_to(tapo, level), updates_to(base, level)),
        "gain": difference(mean_accuracy(tapo), mean_accuracy(base)),
        "collapsed": [round(float(collapsed(runs).mean()), 3) for runs in (base, tapo)],
        "final": [round(float(runs.accuracy[:, -1].mean()), 3) for runs in (base, tapo)],
        "corrected": round(float(np.nan_to_num(tapo.corrected[:, :10]).mean()), 3),
        "right": None if np.isnan(right_NxU).all() else round(float(np.nanmean(right_NxU)), 3),
    }


def median(value_N: np.ndarray) -> float | None:
    """Return the median in a form that JSON can hold: None if it is infinite."""
    value = float(np.median(value_N))
    return value if np.isfinite(value) else None


def curve(value_NxU: np.ndarray, points: int = 60) -> dict[str, list[float]]:
    """Return the mean over seeds and its 95 % interval (Student's t) at some updates."""
    at_X = np.unique(np.linspace(0, value_NxU.shape[1] - 1, points).round().astype(int))
    interval_Xx2 = [statistics.student(value_NxU[:, at]) for at in at_X]
    return {
        "update": at_X.tolist(),
        "mean": [round(float(value_NxU[:, at].mean()), 4) for at in at_X],
        "low": [round(low, 4) for low, _ in interval_Xx2],
        "high": [round(high, 4) for _, high in interval_Xx2],
    }
