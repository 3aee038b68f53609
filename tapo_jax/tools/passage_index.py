"""A BM25 index of passages that is saved to a folder and memory-mapped: a second start does not read the corpus."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np

from tapo_jax.config import UserError
from tapo_jax.tools.text_search import words

FORMAT = 1


class PassageIndex:
    """Searches many queries in one call.

    Not safe to call from several threads at a time: bm25s keeps scratch arrays in the index.

    bm25: its arrays may be memory-mapped.
    text: all passages, UTF-8, concatenated.
    offset: [N+1], where each passage begins, and the end.
    """

    def __init__(self, bm25: bm25s.BM25, text: np.ndarray, offset: np.ndarray):
        self._bm25, self._text, self._offset = bm25, text, offset

    def __len__(self) -> int:
        return len(self._offset) - 1

    def passage(self, number: int) -> str:
        return self._text[self._offset[number] : self._offset[number + 1]].tobytes().decode()

    def search(self, queries: Sequence[str], top_k: Sequence[int]) -> list[list[tuple[str, float]]]:
        """Return the best top_k[i] passages of queries[i] with positive scores, best first.

        Ties go to the earlier passage. Equal queries are scored once.
        """
        most: dict[str, int] = {}
        for query, k in zip(queries, top_k, strict=True):
            most[query] = max(k, most.get(query, 0))
        found = {query: self._best(query, k) for query, k in most.items()}
        return [found[query][:k] for query, k in zip(queries, top_k, strict=True)]

    def _best(self, query: str, top_k: int) -> list[tuple[str, float]]:
        known = [word for word in words(query) if word in self._bm25.vocab_dict]
        if not known:
            return []
        score_N = np.asarray(self._bm25.get_scores(known))
        hit_H = np.flatnonzero(score_N > 0)  # usually far fewer than all passages
        score_H = score_N[hit_H]
        if len(hit_H) > top_k:
            least = np.partition(score_H, -top_k)[-top_k]
            kept = score_H >= least  # includes all ties for the last rank, so that the sort below decides
            hit_H, score_H = hit_H[kept], score_H[kept]
        order = np.argsort(-score_H, kind="stable")[:top_k]
        return [(self.passage(hit_H[i]), float(score_H[i])) for i in order]


def build(passages: Sequence[str]) -> PassageIndex:
    """Build an index in memory."""
    bm25 = bm25s.BM25()
    bm25.index([words(passage) for passage in passages], show_progress=False)
    encoded = [passage.encode() for passage in passages]
    offset = np.concatenate([[0], np.cumsum([len(data) for data in encoded], dtype=np.int64)])
    return PassageIndex(bm25, np.frombuffer(b"".join(encoded), np.uint8), offset)


def save(index: PassageIndex, folder: Path, fingerprint: str) -> None:
    """Write the index atomically to a folder that does not exist yet or is empty."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        index._bm25.save(temporary, show_progress=False)
        np.save(temporary / "text.npy", index._text)
        np.save(temporary / "offset.npy", index._offset)
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
    if (made_of, made_by) != (fingerprint, FORMAT):
        raise UserError(
            f"--index is '{folder}', which was made from another corpus: remove it, or give another folder."
        )
    try:
        bm25 = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        text, offset = (np.load(folder / name, mmap_mode="r") for name in ("text.npy", "offset.npy"))
    except (OSError, ValueError) as error:
        raise UserError(f"--index is '{folder}', which cannot be read ({error}): remove it.") from error
    return PassageIndex(bm25, text, offset)
