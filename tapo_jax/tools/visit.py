"""visit: read a page of the public web as text."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.base import function_schema
from tapo_jax.tools.page_reader import Page, normal_url, read_page
from tapo_jax.tools.patience import Pace, Patience, ask
from tapo_jax.tools.search_store import Asked, Kept
from tapo_jax.types import VISIT, Image, ToolResult

SCHEMA = function_schema(
    VISIT,
    "Read a page of the web as text.",
    {"url": {"type": "string", "description": "Where the page is: http:// or https://.", "x-kind": "identity"}},
    ("url",),
)
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]+)")


class Visit:
    """Gives the main text of a page, cut to `budget` characters.

    For TAPO two visits are equal if their URLs are, in one spelling; different pages have nothing in common.

    timeout_s: of a whole call; the reader stops a little before the tool runner would.
    per_second: max visits a second; 0: no limit.
    kept: a cache or a recording, around the reading.
    read: reads a page, as `page_reader.read_page`; None for a replay.

    Raises UserError if the package that finds the text of a page is not installed.
    """

    name = VISIT
    schema = SCHEMA
    service = VISIT

    def __init__(
        self,
        *,
        budget: int,
        timeout_s: float,
        per_second: float = 0.0,
        kept: Kept | None = None,
        read: Callable[..., Page] | None = read_page,
    ):
        self._budget, self._kept, self._read = budget, kept or Kept(), read
        self._patience = Patience(0.9 * timeout_s, 0, Pace(per_second))
        self._extract = None if read is None else _extractor()

    def compared(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by which calls are compared: the URL in its one spelling. Raises BadCall."""
        return arguments | {"url": str(normal_url(arguments["url"]))}

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        url = str(normal_url(arguments["url"]))
        return self._kept.result(Asked(VISIT, "", url, 0, self._budget), lambda: self._visit(url))

    def _visit(self, url: str) -> tuple[str, int]:
        if self._read is None:
            raise BadCall("page", "Nothing is visited in a replay.")
        page, retries = ask(
            lambda end: self._read(normal_url(url), end - time.monotonic()), self._patience, what="page"
        )
        text = self._extract(page).strip()
        if not text:
            raise BadCall("page", "The page has no text.")
        cut = f"{text[: self._budget]}\n[Cut: {self._budget} of {len(text)} characters are shown.]"
        return text if len(text) <= self._budget else cut, retries


def _extractor() -> Callable[[Page], str]:
    """Return a function that returns the text of a page: its title and main text for HTML, else all of it."""
    try:
        import trafilatura  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError("tools.names has 'visit', which needs more: pip install 'tapo_jax[web]'.") from error

    def extract(page: Page) -> str:
        if "html" not in page.content_type:
            charset = _CHARSET.search(page.content_type)
            return _decoded(page.data, charset[1] if charset else "utf-8")
        try:
            found = trafilatura.bare_extraction(page.data, with_metadata=True, include_comments=False)
            title, text = ("", "") if found is None else (found.title or "", found.text or "")
            text = text or trafilatura.html2txt(page.data)
        except Exception as error:  # what a hostile page does to a parser
            raise BadCall("page", f"The page cannot be read ({type(error).__name__}).") from error
        return _decoded(f"{title}\n{text}".encode("utf-8", "replace"), "utf-8")

    return extract


def _decoded(data: bytes, charset: str) -> str:
    try:
        return data.decode(charset, "replace")
    except LookupError:
        return data.decode("utf-8", "replace")
