"""Time the text search over a generated corpus: making and loading its index, memory, seconds of a query."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tapo_jax.data import corpus
from tapo_jax.tools import dense_index
from tapo_jax.tools.passage_index import PassageIndex, Ranked

WORDS_OF_A_PASSAGE = 100
WORDS_OF_A_QUERY = 6
VOCABULARY = 1_000_000
BATCH = 64  # queries of a timed call


def add_arguments(parser) -> None:
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=0, help="of vectors, one for each passage; 0: none")
    parser.add_argument(
        "--folder", default="", help="where the corpus and its index are kept; default: a temporary one"
    )


def run(args) -> list[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{args.passages}_passages"
        file, asked, index = (folder / f"{name}{end}" for end in (".jsonl", ".queries.json", ".index"))
        if not asked.exists():
            asked.write_text(json.dumps(write_corpus(file, args.passages, BATCH * 16)))
        made_s = 0.0
        if not index.exists():
            start = time.perf_counter()
            corpus.open_index(str(file), str(index))
            made_s = time.perf_counter() - start
        command = [sys.executable, "-c", "from tapo_jax.bench import search; search.measure()"]
        command += [str(file), str(index), str(asked), str(args.repeats), str(args.dimensions)]
        begin = time.time()  # a process of its own, whose memory is that of a service
        rows = json.loads(subprocess.run([*command, str(begin)], stdout=subprocess.PIPE, check=True).stdout)
        return [{"passages": args.passages, "made_s": made_s, **row} for row in rows]


def measure() -> None:
    """Load a saved index and search; the arguments are those of `run`'s child. Prints rows as JSON."""
    file, folder, asked, repeats, dimensions, begin = sys.argv[1:]
    index = corpus.open_index(file, folder)
    start = {"start_s": time.time() - float(begin), "start_cpu_s": time.process_time()}
    queries = json.loads(Path(asked).read_text())
    rows = []
    for top_k in (3, 100):
        best = timed(index.ranked, queries, top_k, int(repeats))
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before all passages are scored
        every = timed(lambda some, k: score_all(index, some, k[0]), queries, top_k, int(repeats))
        for name, (cpu_ms, ms, found) in (("best passages", best), ("all passages", every)):
            rows.append(
                {
                    "scored": name,
                    "top_k": top_k,
                    **start,
                    "peak_mib": peak_mib,
                    "cpu_ms": cpu_ms,
                    "ms": ms,
                    "speed_up": every[0] / cpu_ms,
                    "equal": all(map(equal, found, every[2])),
                }
            )
    if int(dimensions):
        cpu_ms, ms, _ = time_vectors(index, queries, int(dimensions), int(repeats))
        rows.append({**rows[0], "scored": f"{dimensions} dimensions", "cpu_ms": cpu_ms, "ms": ms} | NOT_FOR_VECTORS)
    print(json.dumps(rows))


NOT_FOR_VECTORS = {"speed_up": float("nan"), "equal": ""}


def timed(
    search: Callable[[list[str], list[int]], list[Ranked]], queries: list[str], top_k: int, repeats: int
) -> tuple[float, float, list[Ranked]]:
    """Return medians of (CPU milliseconds, milliseconds) a query over batches, and the first batch's passages."""
    search(queries[-BATCH:], [top_k] * BATCH)
    seconds, first = [], None
    for number in range(repeats):
        place = number * BATCH % (len(queries) - BATCH)
        wall, cpu = time.perf_counter(), time.process_time()
        found = search(queries[place : place + BATCH], [top_k] * BATCH)
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
        first = first or found
    cpu_s, wall_s = np.median(seconds, axis=0)
    return 1e3 * cpu_s / BATCH, 1e3 * wall_s / BATCH, first or []


def time_vectors(index: PassageIndex, queries: list[str], dimensions: int, repeats: int) -> tuple[float, float, list]:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((len(index), dimensions), np.float32)
    dense = dense_index.DenseIndex(
        index, vectors, None, lambda texts: draw.standard_normal((len(texts), dimensions), np.float32)
    )
    return timed(dense.ranked, queries, 3, min(repeats, 3))


def score_all(index: PassageIndex, queries: list[str], top_k: int) -> list[Ranked]:
    """Search as bm25s does: a score for every passage, then the best of them."""
    data, passage, start = (index.arrays[name] for name in ("data", "passage", "start"))
    ranked = []
    for query in queries:
        score_N = np.zeros(len(index), np.float32)
        for word in index.known(query):
            part = slice(start[word], start[word + 1])
            np.add.at(score_N, passage[part], data[part])
        least = np.partition(score_N, -top_k)[-top_k] if top_k < len(score_N) else 0
        number = np.flatnonzero(score_N >= max(least, np.finfo(np.float32).tiny))
        number = number[np.argsort(-score_N[number], kind="stable")[:top_k]]
        ranked.append((number, score_N[number]))
    return ranked


def equal(one: Ranked, other: Ranked) -> bool:
    return all(map(np.array_equal, one, other))


def spelling(rank: int) -> str:
    """Return a word for a rank; frequent ones are short."""
    letters = ""
    rank += 1
    while rank:
        rank, letter = divmod(rank - 1, 26)
        letters += chr(97 + letter)
    return letters


def draw_passages(number: int) -> Iterator[np.ndarray]:
    """Yield the ranks of each passage's words, by the law of Zipf and Mandelbrot: p(rank) ~ 1 / (rank + 2.7).

    The most frequent word is 2 % of the text.
    """
    draw = np.random.default_rng(0)
    share = np.cumsum(1 / (np.arange(VOCABULARY) + 3.7))
    for begin in range(0, number, 10_000):
        size = min(10_000, number - begin), WORDS_OF_A_PASSAGE
        yield from np.searchsorted(share, share[-1] * draw.random(size))


def write_corpus(file: Path, number: int, queries: int) -> list[str]:
    """Write a corpus as JSON lines; return queries, each of some words of one of its passages."""
    word = [spelling(rank) for rank in range(VOCABULARY)]
    draw = np.random.default_rng(1)
    every = max(number // queries, 1)
    found = []
    with open(file, "w") as out:
        for n, ranks in enumerate(draw_passages(number)):
            out.write(json.dumps({"contents": f"Page {n}\n" + " ".join(word[rank] for rank in ranks)}) + "\n")
            if n % every == 0:
                found.append(" ".join(word[rank] for rank in draw.choice(ranks, WORDS_OF_A_QUERY, replace=False)))
    while len(found) < queries:
        found.append(found[len(found) % number])
    return [found[place] for place in draw.permutation(len(found))]
