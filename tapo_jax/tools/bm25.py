"""BM25 weights of many passages as arrays: those of bm25s, bit for bit, for much less time and memory.

And without jax, which bm25s imports and starts where it is installed: the retrieval service may run on a host whose
accelerators belong to a run.
"""

from collections.abc import Sequence

import numpy as np

K1, B = 1.5, 0.75  # of bm25s, whose method is Lucene's

Counts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(word_E, passage_E, times_E): how often a word is in a passage, sorted by word and then passage."""


def count(word_T: np.ndarray, length_N: np.ndarray, first: int) -> Counts:
    """Count the words of consecutive passages.

    word_T: the words of the passages, one passage after the other.
    length_N: how many words each passage has.
    first: the number of the first of these passages.
    """
    passage_T = np.repeat(np.arange(first, first + len(length_N)), length_N)
    key, times = np.unique(word_T.astype(np.int64) << 32 | passage_T, return_counts=True)
    return (key >> 32).astype(np.int32), (key & 0xFFFFFFFF).astype(np.int32), times.astype(np.int32)


def weigh(pieces: Sequence[Counts], length_N: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (data_E, passage_E, start_W+1): what each word adds to the score of each passage that has it.

    The entries of word w are at start[w]:start[w + 1], passages ascending.

    pieces: counts of consecutive parts of all passages.
    """
    found_W = sum(np.bincount(word, minlength=words) for word, _, _ in pieces)
    passages, mean = len(length_N), length_N.mean()
    rarity_W = np.log(1 + (passages - found_W + 0.5) / (found_W + 0.5)).astype(np.float32)
    start = np.concatenate([[0], np.cumsum(found_W)])
    free_W = start[:-1].copy()  # where the next entry of each word goes
    data, passage = np.empty(start[-1], np.float32), np.empty(start[-1], np.int32)
    for word, where, times in pieces:
        begin = np.flatnonzero(np.diff(word, prepend=-1))  # of the entries of each word in this piece
        size = np.diff(begin, append=len(word))
        place = np.repeat(free_W[word[begin]] - begin, size) + np.arange(len(word))
        free_W[word[begin]] += size
        passage[place] = where
        often = times.astype(np.float32)
        data[place] = rarity_W[word] * (often / (K1 * ((1 - B) + B * length_N[where] / mean) + often))
    return data, passage, start
