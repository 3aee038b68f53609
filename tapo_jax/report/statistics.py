"""Compute intervals of means over few seeds, of shares of questions, and of differences of paired shares."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

RESAMPLES = 10_000
Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def bootstrap(value_N: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of the mean; None for fewer than two values. Equal for equal values.

    Thousands of values are resampled in parts, so that memory stays small.
    """
    value_N = np.asarray(value_N, float)
    if len(value_N) < 2:
        return None
    rng, rows = np.random.default_rng(0), max(1, 10_000_000 // len(value_N))
    parts = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    mean_R = [value_N[rng.integers(0, len(value_N), (part, len(value_N)))].mean(axis=1) for part in parts]
    low, high = np.quantile(np.concatenate(mean_R), [0.025, 0.975])
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


def wilson(right: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927): all p with |p̂ − p| ≤ z·sqrt(p(1−p)/n); (0, 1) if n is 0."""
    if count == 0:
        return 0.0, 1.0
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of_questions(mean_Q: Sequence[float], samples: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean over questions, each with the mean of its samples in 0..1.

    It is Wilson's with as many observations as have the variance that is seen between questions: one a question at
    least, and where all answers or none are right; one a sample at most. With one sample it is Wilson's itself.
    """
    count = len(mean_Q)
    if count == 0:
        return 0.0, 1.0
    share, seen = float(np.mean(mean_Q)), float(np.var(mean_Q, ddof=1)) if count > 1 else 1.0
    free = share * (1 - share)
    each = 1.0 if free == 0 else samples if seen == 0 else min(max(free / seen, 1.0), samples)
    worth = count * each
    return wilson(share * worth, worth)


def paired_shares(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference second − first of two shares of the same questions.

    both, first, second, neither: questions that both answered rightly, only the first did, only the second, neither.
    The method is Newcombe's square-and-add with Wilson intervals (1998, number 10 without continuity correction). It
    is not empty where the two never differ.
    """
    count = both + first + second + neither
    if count == 0:
        return -1.0, 1.0
    a, b = (both + second) / count, (both + first) / count
    (low_a, high_a), (low_b, high_b) = wilson(both + second, count), wilson(both + first, count)
    margins = (both + second) * (first + neither) * (both + first) * (second + neither)
    alike = (both * neither - first * second) / math.sqrt(margins) if margins else 0.0

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up * up - 2 * alike * up * down + down * down))

    return a - b - reach(a - low_a, high_b - b), a - b + reach(high_a - a, b - low_b)


def mcnemar(first: int, second: int) -> float:
    """Return the exact p-value that the two differ, from the questions that only one answered rightly."""
    return float(scipy.stats.binomtest(first, first + second).pvalue) if first + second else 1.0


def pass_at(right: int, count: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right: 1 − C(n − c, k) / C(n, k).

    right, count: c right samples of n ≥ k (Chen et al. 2021, arXiv 2107.03374).
    """
    if not 0 <= right <= count or not 1 <= k <= count:
        raise ValueError(f"{right} right of {count} samples give no pass@{k}")
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)
