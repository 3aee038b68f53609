"""A BM25 index of passages that is saved to a folder and memory-mapped: a second start does not read the corpus."""

import itertools
import json
import os
import shutil
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from tapo_jax.config import UserError
from tapo_jax.tools import bm25
from tapo_jax.tools.postings import Postings, largest
from tapo_jax.tools.words import words

FORMAT = 2
ARRAYS = ("data", "passage", "start", "most", "text", "offset")  # the files of an index, besides its words
PIECE = 1 << 22  # words that are counted at a time

Ranked = tuple[np.ndarray, np.ndarray]
"""(passage_K, score_K) of a query, best first."""


class PassageIndex:
    """Searches many queries in one call.

    Not safe to call from several threads at a time: the postings keep a scratch array.

    vocabulary: the number of each word.
    arrays: may be memory-mapped. Those of `postings.Postings`; `text`, all passages, UTF-8, concatenated; `offset`,
        [N+1], where each passage begins, and the end.
    """

    def __init__(self, vocabulary: dict[str, int], arrays: dict[str, np.ndarray]):
        self.vocabulary, self.arrays = vocabulary, arrays
        self._offset = arrays["offset"].view(np.ndarray)
        self._text = memoryview(arrays["text"])  # a slice of a memmap takes ten times as long
        self.postings = Postings(
            arrays["data"], arrays["passage"], arrays["start"], arrays["most"], len(self._offset) - 1
        )

    def __len__(self) -> int:
        return len(self._offset) - 1

    def passage(self, number: int) -> str:
        return str(self._text[self._offset[number] : self._offset[number + 1]], "utf-8")

    def search(self, queries: Sequence[str], top_k: Sequence[int]) -> list[list[tuple[str, float]]]:
        """Return the best top_k[i] passages of queries[i] with positive scores, best first.

        Ties go to the earlier passage. Equal queries are scored once.
        """
        return self.shown(self.ranked(queries, top_k))

    def ranked(self, queries: Sequence[str], top_k: Sequence[int]) -> list[Ranked]:
        """Return what `search` does, as the numbers of passages and their scores."""
        return once_each(queries, top_k, lambda some, k: [self._best(*one) for one in zip(some, k, strict=True)])

    def shown(self, ranked: Sequence[Ranked]) -> list[list[tuple[str, float]]]:
        return [[(self.passage(n), float(s)) for n, s in zip(*one, strict=True)] for one in ranked]

    def known(self, query: str) -> list[int]:
        """Return the words of a query that the index has, in the query's order."""
        return [self.vocabulary[word] for word in words(query) if word in self.vocabulary]

    def _best(self, query: str, top_k: int) -> Ranked:
        return self.postings.best(self.known(query), top_k)


def once_each(
    queries: Sequence[str],
    top_k: Sequence[int],
    search: Callable[[list[str], list[int]], list[Ranked]],
) -> list[Ranked]:
    """Search equal queries once, for the most passages that any of them wants."""
    most: dict[str, int] = {}
    for query, k in zip(queries, top_k, strict=True):
        most[query] = max(k, most.get(query, 0))
    found = dict(zip(most, search(list(most), list(most.values())), strict=True)) if most else {}
    return [(found[query][0][:k], found[query][1][:k]) for query, k in zip(queries, top_k, strict=True)]


def build(passages: Iterable[str]) -> PassageIndex:
    """Build an index in memory. The passages are gone through once, and have a word among them."""
    text, offset = bytearray(), array("q", [0])
    vocabulary: defaultdict[str, int] = defaultdict(itertools.count().__next__)  # the next number for a new word
    pieces, length, word, first = [], array("i"), array("i"), 0
    for passage in passages:
        text += passage.encode()
        offset.append(len(text))
        before = len(word)
        word.extend(map(vocabulary.__getitem__, words(passage)))
        length.append(len(word) - before)
        if len(word) >= PIECE:
            pieces.append(bm25.count(np.array(word), np.array(length[first:]), first))
            word, first = array("i"), len(length)
    pieces.append(bm25.count(np.array(word), np.array(length[first:]), first))
    data, where, start = bm25.weigh(pieces, np.array(length), len(vocabulary))
    found = {"data": data, "passage": where, "start": start, "most": largest(data, start)}
    return PassageIndex(dict(vocabulary), found | {"text": np.frombuffer(text, np.uint8), "offset": np.array(offset)})


def save(index: PassageIndex, folder: Path, fingerprint: str) -> None:
    """Write the index atomically to a folder that does not exist yet or is empty."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name in ARRAYS:
            np.save(temporary / f"{name}.npy", index.arrays[name])
        (temporary / "words.json").write_text(json.dumps(list(index.vocabulary)))
        about = {"format": FORMAT, "fingerprint": fingerprint, "passages": len(index)}
        (temporary / "about.json").write_text(json.dumps(about))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path, fingerprint: str) -> PassageIndex:
    """Map a saved index into memory. Raises UserError if the folder holds none, or one of another corpus."""
    try:
        about = json.loads((folder / "about.json").read_text())
        made_of, made_by = about["fingerprint"], about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--index is '{folder}', which holds no index: give an empty or a new folder.") from error
    if made_by != FORMAT:
        raise UserError(f"--index is '{folder}', which another version of this program made: remove it.")
    if made_of != fingerprint:
        raise UserError(
            f"--index is '{folder}', which was made from another corpus: remove it, or give another folder."
        )
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        vocabulary = {word: number for number, word in enumerate(json.loads((folder / "words.json").read_text()))}
    except (OSError, ValueError) as error:
        raise UserError(f"--index is '{folder}', which cannot be read ({error}): remove it.") from error
    return PassageIndex(vocabulary, arrays)
