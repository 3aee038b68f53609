"""Search by vectors that were computed before: exact, over a memory-mapped array; and its fusion with BM25.

A query's vector comes from a function, in the service from an OpenAI-compatible endpoint (`embeddings.py`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tapo_jax.config import UserError
from tapo_jax.tools.passage_index import PassageIndex, Ranked, once_each

BLOCK = 1 << 14  # vectors that are compared at a time
FUSED = 100  # passages of each ranking that are fused
RANK_OFFSET = 60  # of reciprocal rank fusion, from its paper

Embed = Callable[[list[str]], np.ndarray]
"""Texts → [Q, D] float32."""


class DenseIndex:
    """Finds the passages whose vectors have the largest inner product with that of the query.

    passages: where the texts are.
    vectors: [M, D] float32 or float16, may be memory-mapped.
    number: [M], the passage of each vector; None if vector i is that of passage i.
    """

    def __init__(self, passages: PassageIndex, vectors: np.ndarray, number: np.ndarray | None, embed: Embed):
        self._passages, self._vectors, self._number, self._embed = passages, vectors, number, embed

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, queries: Sequence[str], top_k: Sequence[int]) -> list[list[tuple[str, float]]]:
        """Return the best top_k[i] passages of queries[i], best first; ties go to the earlier vector.

        A query without a character that is no space finds nothing.
        """
        return self._passages.shown(self.ranked(queries, top_k))

    def ranked(self, queries: Sequence[str], top_k: Sequence[int]) -> list[Ranked]:
        return once_each(queries, top_k, self._ranked)

    def _ranked(self, queries: list[str], top_k: list[int]) -> list[Ranked]:
        asked = [query for query in queries if query.strip()]
        found = iter(())
        if asked:
            found = iter(nearest(self._embed(asked), self._vectors, max(top_k)))
        ranked = []
        for query, k in zip(queries, top_k, strict=True):
            row, score = next(found) if query.strip() else (np.zeros(0, np.int64), np.zeros(0, np.float32))
            ranked.append(((row if self._number is None else self._number[row])[:k], score[:k]))
        return ranked


class HybridIndex:
    """Fuses the rankings of BM25 and of vectors.

    Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009): a passage's score is the sum of 1 / (60 + rank)
    over the rankings that it is in.
    """

    def __init__(self, passages: PassageIndex, dense: DenseIndex):
        self._passages, self._dense = passages, dense

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, queries: Sequence[str], top_k: Sequence[int]) -> list[list[tuple[str, float]]]:
        """Return the best top_k[i] passages of queries[i], best first; ties go to the earlier passage."""
        depth = [max(FUSED, k) for k in top_k]
        rankings = [index.ranked(queries, depth) for index in (self._passages, self._dense)]
        return self._passages.shown(
            [fuse([one[0] for one in both], k) for both, k in zip(zip(*rankings, strict=True), top_k, strict=True)]
        )


def fuse(rankings: Sequence[np.ndarray], top_k: int) -> Ranked:
    """Return the top_k best of several rankings of one query, each the numbers of passages, best first."""
    number, place = np.unique(np.concatenate(rankings), return_inverse=True)
    score = np.zeros(len(number))
    np.add.at(score, place, np.concatenate([1 / (RANK_OFFSET + 1 + np.arange(len(one))) for one in rankings]))
    order = np.argsort(-score, kind="stable")[:top_k]
    return number[order], score[order]


def nearest(query_QxD: np.ndarray, vector_MxD: np.ndarray, top_k: int) -> list[Ranked]:
    """Return (row_K, score_K) of the largest inner products of each query, best first; ties go to the earlier row."""
    rows = [np.zeros(0, np.int64)] * len(query_QxD)
    scores = [np.zeros(0, np.float32)] * len(query_QxD)
    least = np.full(len(query_QxD), -np.inf, np.float32)
    for begin in range(0, len(vector_MxD), BLOCK):
        block = np.asarray(vector_MxD[begin : begin + BLOCK], np.float32)
        product_QxB = query_QxD @ block.T
        for q in np.flatnonzero(product_QxB.max(axis=1) > least):
            new = np.flatnonzero(product_QxB[q] > least[q])
            score = np.concatenate([scores[q], product_QxB[q, new]])
            row = np.concatenate([rows[q], new + begin])
            if len(score) > 4 * top_k:  # before they are sorted
                kept = score >= np.partition(score, -top_k)[-top_k]
                row, score = row[kept], score[kept]
            order = np.argsort(-score, kind="stable")[:top_k]  # rows ascend among equals
            rows[q], scores[q] = row[order], score[order]
            if len(order) == top_k:
                least[q] = scores[q][-1]
    return list(zip(rows, scores, strict=True))


def open_vectors(path: str, ids: str, passages: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Map vectors into memory: (vector_MxD, number_M or None). Raises UserError for what does not fit the corpus.

    ids: a file of M whole numbers, the passage of each vector, counted from 0; "": vector i is of passage i.
    """
    vectors = _array("vectors", path)
    if vectors.ndim != 2 or vectors.dtype not in (np.float32, np.float16) or 0 in vectors.shape:
        raise UserError(
            f"--vectors is '{path}', an array of {vectors.dtype} and shape {vectors.shape}: "
            "give float32 or float16 of shape [vectors, dimensions]."
        )
    if not ids:
        if len(vectors) != passages:
            raise UserError(
                f"--vectors is '{path}' with {len(vectors)} vectors for {passages} passages: give one for each, "
                "or their passages' numbers as --vector_ids."
            )
        return vectors, None
    number = _array("vector_ids", ids)
    if number.shape != (len(vectors),) or number.dtype.kind not in "iu":
        raise UserError(
            f"--vector_ids is '{ids}', an array of {number.dtype} and shape {number.shape}: "
            f"give {len(vectors)} whole numbers, one for each vector."
        )
    if number.min() < 0 or number.max() >= passages or len(np.unique(number)) < len(number):
        raise UserError(f"--vector_ids is '{ids}': each must be a passage's number, 0 to {passages - 1}, once.")
    return vectors, np.asarray(number, np.int64)


def _array(flag: str, path: str) -> np.ndarray:
    try:
        with Path(path).open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise UserError(f"--{flag} is '{path}', which is no .npy file: write it with numpy.save.")
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--{flag} is '{path}', which cannot be read ({error}).") from error
