"""image_search_tool as in the published training sets: replays the recorded search for the image of the question.

The recording belongs to the question (`Prompt.meta["image_search"]`), so the tool sees the prompt. Its schema has no
argument (SenseNova-MARS), or `img_idx`, which may name only the question's own images: no search was recorded for a
crop or a thumbnail.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tapo_jax.config import BadImage
from tapo_jax.tools.base import BadCall, function_schema
from tapo_jax.types import IMAGE_SEARCH, Image, Prompt, ToolResult, root_image

_DESCRIPTION = "Search the web for pages whose pictures look like the image of the question."
_IMG_IDX = {"type": "integer", "description": "The image's number, counted from 0.", "x-kind": "image"}


@dataclasses.dataclass(frozen=True)
class Recording:
    """The result of a search. The numbers of titles and thumbnails may differ."""

    titles: tuple[str, ...] = ()
    """Best first."""
    thumbnails: tuple[Callable[[], np.ndarray] | None, ...] = ()
    """In the order of the titles; each returns uint8 [H, W, 3] when called. None if one is missing."""
    summary: str = ""
    """Summary of the pages."""


class RecordedImageSearch:
    """Replays the search that was recorded for the question.

    argument: whether the policy names the image.
    results: max number of titles with thumbnails that are returned.
    """

    name = IMAGE_SEARCH
    needs_prompt = True

    def __init__(self, *, argument: bool = False, results: int = 5):
        self._results = results
        properties = {"img_idx": _IMG_IDX} if argument else {}
        self.schema = function_schema(self.name, _DESCRIPTION, properties, tuple(properties))

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image], prompt: Prompt) -> ToolResult:
        number = int(arguments.get("img_idx", 0))
        if number >= len(prompt.images):
            own = f"images 0 to {len(prompt.images) - 1}" if len(prompt.images) > 1 else "image 0"
            raise BadCall("bad_image", f"Only {own} can be searched for: image {number} is not part of the question.")
        recording = prompt.meta.get("image_search")
        parts = () if recording is None else tuple(_joined(self._lines(recording)))
        return ToolResult(parts=parts or ("No similar image was found.",))

    def _lines(self, recording: Recording) -> Iterator[str | Image]:
        """Yield title 1, thumbnail 1, title 2, …, the summary. A thumbnail that cannot be shown is left out."""
        count = min(self._results, max(len(recording.titles), len(recording.thumbnails)))
        for n in range(count):
            title = recording.titles[n] if n < len(recording.titles) else ""
            picture = recording.thumbnails[n] if n < len(recording.thumbnails) else None
            try:
                thumbnail = None if picture is None else root_image(picture())
            except BadImage:
                thumbnail = None
            if title or thumbnail is not None:
                yield f"Title {n + 1}: {title}" if title else f"Result {n + 1}:"
            if thumbnail is not None:
                yield f"Thumbnail {n + 1}:"
                yield thumbnail
        if recording.summary:
            yield f"Summary: {recording.summary}"


def _joined(lines: Iterable[str | Image]) -> Iterator[str | Image]:
    """Put each line of text and each image on its own line: the parts are shown one after another as they are."""
    text, between = "", ""
    for line in lines:
        if isinstance(line, str):
            text += between + line
        else:
            yield text + between
            yield line
            text = ""
        between = "\n"
    if text:
        yield text
