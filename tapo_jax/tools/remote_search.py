"""text_search_tool by a service, for a corpus that does not fit one machine, or for the web.

The address comes from the config, never from the policy. What a service is asked, and how it answers, is in
`backends.py`.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.backends import BACKENDS, fields_of, make_search
from tapo_jax.tools.patience import Pace, Patience
from tapo_jax.tools.search_store import Asked, Kept
from tapo_jax.tools.text_search import SCHEMA
from tapo_jax.types import TEXT_SEARCH, Image, ToolResult

PROBES = 3  # tries of the first search of a run
_PROBE = "encyclopedia"


class RemoteTextSearch:
    """Asks a service for top_k passages, and cuts them to `budget` characters in total.

    endpoint: its address; "": that of the back-end itself.
    backend: one of `backends.NAMES`.
    asked: whether requests are sent; False for a replay.
    timeout_s: of a whole call; the client stops a little before the tool runner would.
    retries: further attempts.
    per_second: max requests a second; 0: no limit.
    request: further fields of every request.
    kept: a cache or a recording, around the request.
    """

    name = TEXT_SEARCH
    schema = SCHEMA

    def __init__(
        self,
        endpoint: str,
        *,
        backend: str = "search-r1",
        asked: bool = True,
        top_k: int,
        budget: int,
        timeout_s: float,
        retries: int = 1,
        per_second: float = 0.0,
        request: Mapping[str, Any] | None = None,
        kept: Kept | None = None,
    ):
        patience = Patience(0.9 * timeout_s, retries, Pace(per_second))
        self.service, self.address, self._search = backend, "", None
        if asked:
            self._search, self.address = make_search(backend, endpoint, patience, request=request)
        self._request = json.dumps(fields_of(backend, request), sort_keys=True, default=str)
        self._top_k, self._budget, self._kept = top_k, budget, kept or Kept()

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        query = tidy(arguments["query"])
        asked = Asked(self.service, self.address, folded(query), self._top_k, self._budget, self._request)
        return self._kept.result(asked, lambda: self._ask(query))

    def probe(self) -> None:
        """Search once, to see that the service answers. Raises UserError if it does not after PROBES tries."""
        if self._search is None:
            return
        for left in reversed(range(PROBES)):
            try:
                self._ask(_PROBE)
                return
            except BadCall as error:
                if not left:
                    raise UserError(self._unserved(str(error).rstrip("."))) from error

    def _unserved(self, reason: str) -> str:
        at = f" at {self.address}" if self.address else ""
        keyed = self.service in BACKENDS and BACKENDS[self.service].variable
        key = f" and the key in the environment variable {keyed}" if keyed else ""
        return (
            f"A first search of the service '{self.service}'{at} failed: {reason}; check tools.endpoint, "
            f"tools.backend{key}, and that the service runs."
        )

    def _ask(self, query: str) -> tuple[str, int]:
        if self._search is None:
            raise BadCall("service", "There is no search service.")
        return self._search(query, self._top_k, self._budget)


def tidy(query: str) -> str:
    """Return the query as it is sent: as it was written, in single spaces. Half surrogates become question marks."""
    return " ".join(query.split()).encode("utf-8", "replace").decode()


def folded(query: str) -> str:
    """Return the one spelling by which a query is known: composed characters, lower case."""
    return unicodedata.normalize("NFC", query).lower()
