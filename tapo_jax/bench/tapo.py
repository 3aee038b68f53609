"""Time TAPO from encoded calls to token advantages, against plain Python loops over the same arrays.

There are two mixes of calls: only text searches, and a search agent's (70 % text searches; the rest zooms and image
searches). The share is that of an update of a 4B model on the same tokens: 6 · parameters flops a token at this
machine's measured matmul speed. CPU seconds count every thread and do not depend on what else the machine does; the
factor "faster" compares wall-clock times.
"""

import dataclasses
import time

import jax
import numpy as np

from tapo_jax import tapo
from tapo_jax.bench import tapo_loops, timing
from tapo_jax.types import Region, Text

PARAMETERS = 4e9
SIZES = {"paper": (128, 8, 8, 1), "large": (1024, 16, 16, 16)}  # P, G, K, chunks
MIXES = {"text": 1.0, "search": 0.7}  # share of text searches


def add_arguments(parser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--tokens", type=int, default=2048, help="length T of a row")
    parser.add_argument("--loop-prompts", type=int, default=128, help="prompts that the loop runs at most")


def run(args) -> list[dict]:
    speed = timing.matmul_flops(args.repeats)
    return [measure(size, mix, args, speed) for size in args.sizes for mix in args.mixes]


def measure(size: str, mix: str, args, speed: float) -> dict:
    P, G, K, chunks = SIZES[size]
    start = time.perf_counter()
    steps = tapo.encode_steps(random_calls(P, G, K, MIXES[mix]), steps=K, regions=1, texts=1, numbers=0)
    encode = time.perf_counter() - start
    rng = np.random.default_rng(1)
    success = rng.random((P, G)) < 0.4
    advantage = np.where(success, 0.9, -0.6).astype(np.float32)
    step = rng.integers(-1, K, (P * G, args.tokens)).astype(np.int32)

    def kernel(steps, success, advantage, step):
        result = tapo.transfer(steps, success, advantage, dataclasses.replace(tapo.PUBLISHED, chunks=chunks))
        return result.advantage_PxS, tapo.token_advantages(advantage, result.advantage_PxS, step)

    arrays = jax.device_put((steps, success, advantage, step))
    compiled = jax.jit(kernel).lower(*arrays).compile()
    cpu = time.process_time()
    median, fastest = timing.timed(compiled, *arrays, repeats=args.repeats)
    cpu = (time.process_time() - cpu) / (args.repeats + 1)
    step_advantage, token_advantage = (np.asarray(x) for x in compiled(*arrays))

    # The loops would take a quarter of an hour on the large batch: they run some prompts, and their time is scaled.
    looped = min(args.loop_prompts, P, 8 if size == "large" else P)
    slots = tapo_loops.as_lists(jax.tree.map(lambda x: x[:looped], steps))
    lists = [x[:looped].tolist() for x in (success, advantage.astype(float), step.reshape(P, G, -1))]
    start, loop_cpu = time.perf_counter(), time.process_time()
    different, published = 0, tapo.PUBLISHED
    for p, group in enumerate(slots):
        numbers = published.theta, published.alpha_min, published.beta
        corrected = tapo_loops.transfer(group, lists[0][p], lists[1][p], *numbers)
        tokens = tapo_loops.token_rows(lists[1][p], corrected, K, lists[2][p])
        different += int((np.abs(np.array(corrected) - step_advantage[p]) > 1e-5).sum())
        if not different and not np.allclose(tokens, token_advantage.reshape(P, G, -1)[p], atol=1e-5):
            raise AssertionError(f"kernel and loop disagree on the tokens of prompt {p}")
    loop = (time.perf_counter() - start) * P / looped
    loop_cpu = (time.process_time() - loop_cpu) * P / looped
    S, words, levels = G * K, steps.text_PxSxXxF.shape[-1] // 32, int(steps.text_PxSxXxF.max())
    return {
        "batch": f"{P}x{G}x{K}",
        "calls": mix,
        "kernel_ms": median * 1e3,
        "fastest_ms": fastest * 1e3,
        "cpu_ms": cpu * 1e3,
        "loop_s": loop,
        "loop_cpu_s": loop_cpu,
        "faster": loop / median,
        "differ": different,  # a float32 and a float64 similarity on two sides of a threshold
        "memory_mib": timing.memory_mib(compiled),
        "gflop": operations(P, S, G, words, levels) / 1e9,
        "min_mib": (timing.nbytes(arrays) + token_advantage.nbytes + step_advantage.nbytes) / 2**20,
        "encode_ms": encode * 1e3,
        "share_of_update": median / (6 * PARAMETERS * P * G * args.tokens / speed),
    }


def operations(P: int, S: int, G: int, words: int, levels: int) -> float:
    """Count the operations of the kernel.

    For each pair of slots: an AND, a population count and an addition for each word and level, 30 for the region, 10
    for masks and gates, 15 for three rounds of clustering, 10 for the choice, 2·G for the members.
    """
    return P * S * S * (3 * words * levels + 65 + 2 * G)


def random_calls(P: int, G: int, K: int, texts: float):
    """Draw calls: each prompt has its own dozen words and its own image, around which rollouts search and zoom."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = np.array(["".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(400)])
    groups = []
    for p in range(P):
        topic = rng.choice(words, 12, replace=False)
        draw, corner = rng.random((G, K)), rng.uniform(0, 0.3, (G, K, 2)).astype(np.float32)
        query = [[" ".join(topic[np.argsort(row)[:5]]) for row in rollout] for rollout in rng.random((G, K, 12))]
        groups.append(
            [[_call(draw[g, k], texts, query[g][k], p, corner[g, k].tolist()) for k in range(K)] for g in range(G)]
        )
    return groups


def _call(draw: float, texts: float, query: str, root: int, corner: list[float]):
    if draw < texts:
        return ("text_search_tool", (Text(query),))
    region = Region(root, (*corner, corner[0] + 0.6, corner[1] + 0.6))
    return ("image_zoom_in_tool" if draw < (1 + texts) / 2 else "image_search_tool", (region,))
