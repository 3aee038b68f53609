"""Compute intervals of a mean over few seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

RESAMPLES = 10_000


def bootstrap(value_N: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of the mean over seeds; None for fewer than two. Equal for equal values."""
    value_N = np.asarray(value_N, float)
    if len(value_N) < 2:
        return None
    index_RxN = np.random.default_rng(0).integers(0, len(value_N), (resamples, len(value_N)))
    low, high = np.quantile(value_N[index_RxN].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def student(value_N: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean from Student's t; None for fewer than two values.

    With few seeds it is wider, and more honest, than the bootstrap.
    """
    value_N = np.asarray(value_N, float)
    if len(value_N) < 2:
        return None
    half = float(scipy.stats.t.ppf(0.975, len(value_N) - 1) * value_N.std(ddof=1) / np.sqrt(len(value_N)))
    return float(value_N.mean() - half), float(value_N.mean() + half)


def mean_of(value_N: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(value_N)), "interval": bootstrap(value_N), "values": [float(v) for v in value_N]}
