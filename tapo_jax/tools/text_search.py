"""text_search_tool: BM25 search in a corpus of passages."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np

from tapo_jax.tools.base import function_schema
from tapo_jax.tools.words import words
from tapo_jax.types import TEXT_SEARCH, Image, ToolResult

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index that it builds
SCHEMA = function_schema(
    TEXT_SEARCH,
    "Search an encyclopedia for passages of text.",
    {"query": {"type": "string", "description": "What to look for, in words.", "x-kind": "text"}},
    ("query",),
)


def list_passages(passages: Sequence[str], budget: int) -> str:
    """List the passages with numbers, cut to `budget` characters in total."""
    if not passages:
        return "No passage matches."
    return "\n".join(f"{n}. {passage}" for n, passage in enumerate(passages, start=1))[:budget]


class TextSearch:
    """Searches passages, each "Title\\ntext"; returns the best top_k, cut to `budget` characters in total."""

    name = TEXT_SEARCH
    schema = SCHEMA

    def __init__(self, passages: Sequence[str], *, top_k: int, budget: int):
        self._passages, self._top_k, self._budget = list(passages), top_k, budget
        self._index = bm25s.BM25()
        self._index.index([words(passage) for passage in passages], show_progress=False)
        self._lock = threading.Lock()  # bm25s keeps scratch arrays in the index

    def search(self, query: str, top_k: int | None = None) -> list[tuple[str, float]]:
        """Return the best `top_k` passages with positive scores, best first; ties go to the earlier passage."""
        known = [word for word in words(query) if word in self._index.vocab_dict]
        if not known:
            return []
        with self._lock:
            scores = np.asarray(self._index.get_scores(known))
        order = np.argsort(-scores, kind="stable")[: self._top_k if top_k is None else top_k]
        return [(self._passages[i], float(scores[i])) for i in order if scores[i] > 0]

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        found = self.search(arguments["query"])
        return ToolResult(text=list_passages([passage for passage, _ in found], self._budget))
