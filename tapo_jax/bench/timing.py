"""Time calls for the benchmarks: warm-up, then the median of repeated calls."""

import time

import jax
import numpy as np


def timed(function, *args, repeats: int) -> tuple[float, float]:
    """Return (median, minimum) seconds of function(*args) until its arrays are ready, after one uncounted call."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), float(np.min(seconds))


def memory_mib(compiled) -> float:
    """Return the arguments, results and temporaries of a compiled program on one device, in MiB."""
    memory = compiled.memory_analysis()
    parts = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return parts / 2**20


def nbytes(tree) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def matmul_flops(repeats: int) -> float:
    """Measure the flops a second of a float32 matrix product here, by which shares of a train step are computed."""
    n = 1024
    x = jax.numpy.ones((n, n))
    return 2 * n**3 / timed(jax.jit(jax.numpy.matmul), x, x, repeats=repeats)[0]
