"""The search services that text_search_tool can ask, each by its own contract.

"search-r1": POST /retrieve {"queries", "topk", "return_scores"} → {"result": [[{"document": {"contents"}, "score"}]]}
    (arXiv 2503.09516; launch/retrieval_server.py). Other services differ a little in their replies; whatever can be
    understood is accepted.
"mars": POST /search {"query", "top_k", "retrieval_mode", …} → plain text, shown as it is.
"serper": POST /search {"q", "num"}, key in X-API-KEY → {"organic": [{"title", "link", "snippet"}]}
"tavily": POST /search {"query", "max_results"}, key as bearer → {"results": [{"title", "url", "content"}]}
"ddgs": the package ddgs, which asks several engines without a key.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tapo_jax.config import UserError, key_from
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.http_client import WHAT, Client, json_value
from tapo_jax.tools.patience import Failed, Patience, TryAgain, ask
from tapo_jax.tools.text_search import list_passages

KEY = "TAPO_SEARCH_KEY"
DDGS = "ddgs"

Search = Callable[[str, int, int], tuple[str, int]]
"""(query, top_k, budget in characters) -> (text, number of retries). Raises BadCall."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """The contract of one kind of HTTP service."""

    path: str
    body: Callable[[str, int], dict[str, Any]]
    """(query, top_k) -> the request."""
    passages: Callable[[Any], list[str]] | None
    """Of a reply that is JSON; None: the reply is plain text. Raises BadCall."""
    address: str = ""
    """Where the service is if the config names no endpoint."""
    variable: str = KEY
    """The environment variable of its key."""
    keyed: bool = False
    """Whether it works with a key only."""
    header: tuple[str, str] = ("Authorization", "Bearer ")
    """The header of the key, and what precedes the key in it."""


def passages_of(reply: Any) -> list[str]:
    """Return the passages of a reply of Search-R1 to one query. Raises BadCall if it cannot be understood.

    Accepted are `{"result": [hits]}` and `{"result": hits}`, where a hit is a document, `{"document": document}`, or a
    text, and a document has "contents", or "title" and "text". A hit without a text is left out.
    """
    hits = reply.get("result") if isinstance(reply, dict) else None
    if isinstance(hits, list) and len(hits) == 1 and isinstance(hits[0], list):
        hits = hits[0]
    if not isinstance(hits, list) or any(isinstance(hit, list) for hit in hits):
        raise BadCall("service", f'The {WHAT} sent a reply without a list "result".')
    return _with_text(hits, [_document(hit.get("document", hit) if isinstance(hit, dict) else hit) for hit in hits])


def pages_of(name: str, fields: tuple[str, str, str]) -> Callable[[Any], list[str]]:
    """Return a function that returns the passages of a reply {name: [page]}: title, address and text of each page.

    fields: the names of these three in a page. A page without a text is left out.
    """

    def passages(reply: Any) -> list[str]:
        hits = reply.get(name) if isinstance(reply, dict) else None
        if not isinstance(hits, list):
            raise BadCall("service", f'The {WHAT} sent a reply without a list "{name}".')
        title, address, text = fields
        return _with_text(hits, [_lines(hit, (title, address, text)) if _has(hit, text) else "" for hit in hits])

    return passages


BACKENDS: dict[str, Backend] = {
    "search-r1": Backend(
        "/retrieve", lambda query, top_k: {"queries": [query], "topk": top_k, "return_scores": True}, passages_of
    ),
    "mars": Backend("/search", lambda query, top_k: {"query": query, "top_k": top_k}, None),
    "serper": Backend(
        "/search",
        lambda query, top_k: {"q": query, "num": top_k},
        pages_of("organic", ("title", "link", "snippet")),
        address="https://google.serper.dev",
        variable="SERPER_API_KEY",
        keyed=True,
        header=("X-API-KEY", ""),
    ),
    "tavily": Backend(
        "/search",
        lambda query, top_k: {"query": query, "max_results": top_k},
        pages_of("results", ("title", "url", "content")),
        address="https://api.tavily.com",
        variable="TAVILY_API_KEY",
        keyed=True,
    ),
}
NAMES = (*BACKENDS, DDGS)
DEFAULTS = {"mars": {"retrieval_mode": "google_serper"}}


def fields_of(name: str, request: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a request to this back-end holds besides the query and the number of results."""
    return DEFAULTS.get(name, {}) | dict(request or {})


def address_of(name: str, endpoint: str) -> str:
    """Return the address of a service. Raises UserError if it has none, or needs none and has one."""
    if name == DDGS:
        if endpoint:
            raise UserError(f"tools.backend is '{DDGS}', which has no address: leave tools.endpoint empty.")
        return ""
    if not endpoint and not BACKENDS[name].address:
        raise UserError(f"tools.backend is '{name}' and tools.endpoint is empty: give \"http://host:port\".")
    return endpoint or BACKENDS[name].address


def key_of(name: str) -> str:
    """Return the key of a back-end from its environment variable. Raises UserError if it is missing or no header."""
    backend = BACKENDS[name]
    key = key_from(backend.variable)
    if backend.keyed and not key:
        raise UserError(f"tools.backend is '{name}': set the environment variable {backend.variable} to your key.")
    return key


def make_search(
    name: str, endpoint: str, patience: Patience, *, request: Mapping[str, Any] | None = None
) -> tuple[Search, str]:
    """Return the search of a back-end and its address. Raises UserError for a mistake in the setting or the key.

    request: further fields of every request.
    """
    address, more = address_of(name, endpoint), fields_of(name, request)
    if name == DDGS:
        return _ddgs(patience, more), address
    backend, key = BACKENDS[name], key_of(name)
    headers = {backend.header[0]: backend.header[1] + key} if key else {}
    client = Client(address, patience, headers=headers, secret=key)
    return posted(backend, client, more), client.endpoint


def posted(backend: Backend, client: Client, more: Mapping[str, Any]) -> Search:
    """Return the search of an HTTP service. more: further fields of every request."""

    def search(query: str, top_k: int, budget: int) -> tuple[str, int]:
        body = {**more, **backend.body(query, top_k)}
        if backend.passages is None:
            text, retries = client.post(backend.path, body, plain_text)
            return text[:budget], retries
        reply, retries = client.post(backend.path, body)
        try:
            return list_passages(backend.passages(reply)[:top_k], budget), retries
        except BadCall as error:
            raise Failed(error.kind, str(error), retries) from error

    return search


def plain_text(data: bytes, content_type: str) -> str:
    """Return the text of a reply that is plain text. Raises BadCall for a page, bytes that are no text, or nothing."""
    if content_type.startswith("text/html"):
        raise BadCall("service", f"The {WHAT} sent a page and no text.")
    if content_type.startswith("application/json"):
        value = json_value(data, content_type)
        data = value.encode("utf-8", "replace") if isinstance(value, str) else data
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadCall("service", f"The {WHAT} sent something that is no text.") from error
    if not text.strip():
        raise BadCall("service", f"The {WHAT} sent nothing.")
    return text


def _ddgs(patience: Patience, more: Mapping[str, Any]) -> Search:
    try:
        import ddgs  # noqa: PLC0415 - an extra
        from ddgs import exceptions  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError("tools.backend is 'ddgs': install it with pip install 'tapo_jax[web]'.") from error

    def search(query: str, top_k: int, budget: int) -> tuple[str, int]:
        def request(deadline: float) -> list[dict[str, Any]]:
            try:
                engines = ddgs.DDGS(timeout=max(1, int(patience.timeout_s / 2)))
                return engines.text(query, **{**more, "max_results": top_k})
            except exceptions.TimeoutException as error:
                raise TimeoutError from error
            except exceptions.RatelimitException as error:
                raise TryAgain("refused because it is asked too often") from error
            except exceptions.DDGSException as error:
                if "No results" in str(error):
                    return []
                raise TryAgain("cannot be reached (DDGSException)") from error

        hits, retries = ask(request, patience, what=WHAT)
        return list_passages([_lines(hit, ("title", "href", "body")) for hit in hits], budget), retries

    return search


def _with_text(hits: list[Any], passages: list[str]) -> list[str]:
    """Return the passages that are not empty. Raises BadCall if there are hits and none has a text."""
    found = [text for text in passages if text]
    if hits and not found:
        raise BadCall("service", f"The {WHAT} sent results without a text.")
    return found


def _document(document: Any) -> str:
    if isinstance(document, dict):
        contents = document.get("contents")
        document = contents if isinstance(contents, str) else _lines(document, ("title", "text"))
    if not isinstance(document, str) or not document.strip():
        return ""
    return document.encode("utf-8", "replace").decode()


def _has(hit: Any, field: str) -> bool:
    return isinstance(hit, dict) and isinstance(hit.get(field), str) and bool(hit[field].strip())


def _lines(hit: dict[str, Any], fields: tuple[str, ...]) -> str:
    """Return the texts of these fields, one a line."""
    parts = [hit[field] for field in fields if _has(hit, field)]
    return "\n".join(parts).encode("utf-8", "replace").decode()
