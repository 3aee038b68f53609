"""text_search_tool over HTTP, for a corpus that does not fit one machine. The address comes from the config, never from
the policy.

The contract is Search-R1's (arXiv 2503.09516): POST {"queries": […], "topk": k, "return_scores": true} to
ENDPOINT/retrieve gives {"result": [[{"document": {"contents": "Title\\ntext"}, "score": …}, …]]}.
"""

from collections.abc import Sequence
from typing import Any

import httpx

from tapo_jax.tools.text_search import SCHEMA, list_passages
from tapo_jax.types import Image, ToolResult


class RemoteTextSearch:
    """endpoint: "http://host:port". A failing service raises, which the tool runner retries and then reports to the
    policy."""

    name = "text_search_tool"
    schema = SCHEMA

    def __init__(self, endpoint: str, *, top_k: int, budget: int, timeout_s: float):
        self._client = httpx.Client(base_url=endpoint, timeout=timeout_s)
        self._top_k, self._budget = top_k, budget

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        body = {"queries": [arguments["query"]], "topk": self._top_k, "return_scores": True}
        response = self._client.post("/retrieve", json=body)
        response.raise_for_status()
        found = response.json()["result"][0][: self._top_k]
        return ToolResult(text=list_passages([str(hit["document"]["contents"]) for hit in found], self._budget))
