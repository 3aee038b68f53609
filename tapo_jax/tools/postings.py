"""The best passages of a BM25 index without scoring every passage that has a frequent word in it.

This is MaxScore (Turtle and Flood, Query evaluation: strategies and optimizations, 1995) over arrays: a query's words
are added from the one that can count most to the one that can count least. When the words that are left cannot lift
a new passage into the best, only the passages found so far are looked up in their postings. The result is exact.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

_SLACK = 1e-4  # relative; float32 sums in another order differ by less


class Postings:
    """Which words are in which passages, and what they add to a score.

    Not safe to call from several threads at a time: it keeps a scratch array.

    data: [E] float32, what the word adds to the score of the passage; positive.
    passage: [E], the passages of word w at start[w]:start[w + 1], ascending.
    start: [W + 1].
    most: [W] float32, the largest entry of each word.
    passages: how many there are.
    """

    def __init__(self, data: np.ndarray, passage: np.ndarray, start: np.ndarray, most: np.ndarray, passages: int):
        # Plain arrays over the same memory: a slice of a memmap takes longer than a short list of postings.
        self._data, self._passage, self._start, self._most = (
            array.view(np.ndarray) for array in (data, passage, start, most)
        )
        self._score_N = np.zeros(passages, np.float32)

    def best(self, query: Sequence[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (passage_K, score_K) of the at most top_k best, best first; ties go to the earlier passage.

        A word that is in the query twice counts twice. The scores have the bits of a float32 sum in the query's order.
        """
        words = [word for word in query if self._start[word] < self._start[word + 1]]
        if not words:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        counted = sorted(Counter(words).items(), key=lambda item: -self._most[item[0]] * item[1])
        found, score, rest = self._find(counted, top_k)
        found, score = self._narrow(found, score, rest, top_k)
        return self._rank(found, words, top_k)

    def _entries(self, word: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self._start[word], self._start[word + 1])
        return self._passage[part], self._data[part]

    def _find(self, counted: list[tuple[int, int]], top_k: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Return every passage that can be among the best, its score so far, and the words that are not in it."""
        left = [float(self._most[word]) * count for word, count in counted]
        touched: list[np.ndarray] = []
        number = 0
        for number, (word, count) in enumerate(counted):
            where, adds = self._entries(word)
            before = self._score_N[where]
            touched.append(where if number == 0 else where[before == 0])
            self._score_N[where] = before + (adds if count == 1 else adds * np.float32(count))
            rest = sum(left[number + 1 :])
            if rest == 0:
                break
            if sum(map(len, touched)) >= top_k:
                score = self._score_N[np.concatenate(touched)]
                least = float(np.partition(score, -top_k)[-top_k])
                if rest < least * (1 - _SLACK):
                    break
        found = np.concatenate(touched)
        score = self._score_N[found]
        self._score_N[found] = 0
        return found, score, counted[number + 1 :]

    def _narrow(
        self, found: np.ndarray, score: np.ndarray, rest: list[tuple[int, int]], top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the words that are left to passages that can still be among the best, and drop the others."""
        left = sum(float(self._most[word]) * count for word, count in rest)
        for number in range(len(rest) + 1):
            if len(found) > top_k:
                least = float(np.partition(score, -top_k)[-top_k])
                kept = score >= (least - left) - _SLACK * least
                found, score = found[kept], score[kept]
            if number == len(rest):
                break
            word, count = rest[number]
            score = score + np.float32(count) * self._look_up(word, found)
            left = sum(float(self._most[word]) * count for word, count in rest[number + 1 :])
        return found, score

    def _look_up(self, word: int, passage: np.ndarray) -> np.ndarray:
        """Return what a word adds to the score of each of some passages."""
        where, adds = self._entries(word)
        place = np.minimum(np.searchsorted(where, passage), len(where) - 1)
        return np.where(where[place] == passage, adds[place], np.float32(0))

    def _rank(self, found: np.ndarray, words: list[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        added = {word: self._look_up(word, found) for word in set(words)}
        score = np.zeros(len(found), np.float32)
        for word in words:
            score += added[word]
        order = np.lexsort((found, -score))[:top_k]
        return found[order], score[order]


def largest(data: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return [W], the largest entry of each word; 0 for a word without one."""
    most = np.zeros(len(start) - 1, np.float32)
    has = np.flatnonzero(np.diff(start))
    if len(has):
        most[has] = np.maximum.reduceat(data, start[has])
    return most
