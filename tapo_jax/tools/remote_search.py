"""text_search_tool over HTTP, for a corpus that does not fit one machine.

The address comes from the config, never from the policy.

The contract is Search-R1's (arXiv 2503.09516): POST {"queries": […], "topk": k, "return_scores": true} to
ENDPOINT/retrieve returns {"result": [[{"document": {"contents": "Title\\ntext"}, "score": …}, …]]}. Other services
differ a little in their replies; whatever can be understood is accepted.
"""

import os
import unicodedata
from collections.abc import Sequence
from typing import Any

from tapo_jax.tools.base import BadCall
from tapo_jax.tools.http_client import Client
from tapo_jax.tools.search_store import Asked, Kept
from tapo_jax.tools.text_search import SCHEMA, list_passages
from tapo_jax.types import TEXT_SEARCH, Image, ToolResult

BACKEND = "search-r1"
KEY = "TAPO_SEARCH_KEY"  # the environment variable of the service's key, if it has one


class RemoteTextSearch:
    """Asks the service at `endpoint` for top_k passages, and cuts them to `budget` characters in total.

    endpoint: "" for a replay, which sends no request.
    timeout_s: of a whole call; the client stops a little before the tool runner would.
    retries: further attempts.
    kept: a cache or a recording, around the request.
    """

    name = TEXT_SEARCH
    schema = SCHEMA

    def __init__(
        self,
        endpoint: str,
        *,
        top_k: int,
        budget: int,
        timeout_s: float,
        retries: int = 1,
        kept: Kept | None = None,
    ):
        key = os.environ.get(KEY, "")
        self._client = Client(endpoint, timeout_s=0.9 * timeout_s, retries=retries, key=key) if endpoint else None
        self._endpoint = self._client.endpoint if self._client else ""
        self._top_k, self._budget, self._kept = top_k, budget, kept or Kept()

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        query = normalised(arguments["query"])
        asked = Asked(BACKEND, self._endpoint, query, self._top_k, self._budget)
        return ToolResult(text=self._kept.text(asked, lambda: self._search(query)))

    def _search(self, query: str) -> str:
        if self._client is None:
            raise BadCall("service", "There is no search service.")
        body = {"queries": [query], "topk": self._top_k, "return_scores": True}
        found = passages_of(self._client.post("/retrieve", body))[: self._top_k]
        return list_passages(found, self._budget)


def normalised(query: str) -> str:
    """Return the normalised query that is sent: composed characters, lower case, single spaces.

    The reply depends on nothing else, so equivalent spellings are one request. Half surrogates become question marks.
    """
    return " ".join(unicodedata.normalize("NFC", query).lower().split()).encode("utf-8", "replace").decode()


def passages_of(reply: Any) -> list[str]:
    """Return the passages of a reply to one query. Raises BadCall if it cannot be understood.

    Accepted are `{"result": [hits]}` and `{"result": hits}`, where a hit is a document, `{"document": document}`, or a
    text, and a document has "contents", or "title" and "text". A hit without a text is left out.
    """
    hits = reply.get("result") if isinstance(reply, dict) else None
    if isinstance(hits, list) and len(hits) == 1 and isinstance(hits[0], list):
        hits = hits[0]
    if not isinstance(hits, list) or any(isinstance(hit, list) for hit in hits):
        raise BadCall("service", 'The search service sent a reply without a list "result".')
    found = [text for text in map(_passage, hits) if text]
    if hits and not found:
        raise BadCall("service", "The search service sent results without a text.")
    return found


def _passage(hit: Any) -> str:
    document = hit.get("document", hit) if isinstance(hit, dict) else hit
    if isinstance(document, dict):
        contents = document.get("contents")
        parts = [contents] if isinstance(contents, str) else [document.get("title"), document.get("text")]
        document = "\n".join(part for part in parts if isinstance(part, str) and part.strip())
    if not isinstance(document, str) or not document.strip():
        return ""
    return document.encode("utf-8", "replace").decode()
