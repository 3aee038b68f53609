"""Recorded episodes -> one self-contained HTML page: what the policy did turn by turn, and what TAPO made of it.

The page (`viewer.html`) loads nothing: images are data URIs, each kept once; its Content-Security-Policy allows only its own style
and script, named by their hashes. What the policy, a tool or a data set wrote reaches the page as escaped text, numbers and
class names only. Imports no jax.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image as PillowImage

from tapo_jax import records
from tapo_jax.chat import parse_turn
from tapo_jax.records import RecordedEpisode, RecordedTurn
from tapo_jax.viewer_map import SHADES, credit_map, shade

MAX_GROUPS = 48  # questions on a page
MAX_SIDE = 512  # pixels; a larger image is made smaller on the page
_ICONS = {"image_zoom_in_tool": "Z", "image_search_tool": "I", "text_search_tool": "T"}


def write_page(paths: Sequence[Path], out: Path, *, max_groups: int = MAX_GROUPS) -> None:
    """Writes the page of these recorded steps (`records.save`), grouped by step and question.

    Where they hold more than max_groups questions, each step shows an equal share: those with the most corrected steps.
    Raises OSError, ValueError or KeyError where a file is no recording.
    """
    share = max(1, max_groups // max(len(paths), 1))
    groups, total = [], 0
    for path in paths:
        found = _grouped(records.load(path))
        total += len(found)
        groups += sorted(sorted(found, key=_corrected, reverse=True)[:share], key=_key)
    groups.sort(key=_key)
    page = render(groups, title=out.resolve().parent.name, total=total)
    temporary = out.with_suffix(".tmp")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    os.replace(temporary, out)


def render(groups: Sequence[Sequence[RecordedEpisode]], *, title: str, total: int) -> str:
    """The page as text. groups: the episodes of one question at one step each; total: questions that there were to choose from."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tapo_jax", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["csp_hash"] = _csp_hash
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    episodes = [episode for group in groups for episode in group]
    pictures = Pictures()
    scale = max((abs(value) for episode in episodes for value in _advantages(episode)), default=0.0) or 1.0
    views = [_group(group, pictures, scale) for group in groups]
    _open_first(views)
    return environment.get_template("viewer.html").render(
        title=title, total=total, groups=views, pictures=pictures.pictures, shades=SHADES, scale=scale, summary=_summary(episodes),
        steps=sorted({episode.step for episode in episodes}),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of the page: its element's number, its shape in pixels, and its bytes as a data URI."""

    number: int
    width: int
    height: int
    uri: str


class Pictures:
    """The distinct images of a page."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self._of: dict[bytes, Picture] = {}

    def add(self, data: bytes) -> Picture:
        if data not in self._of:
            image, kind = PillowImage.open(io.BytesIO(data)), "png"
            if max(image.size) > MAX_SIDE:
                image = image.convert("RGB")
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                buffer = io.BytesIO()
                image.save(buffer, format="JPEG", quality=85)
                data, kind = self._kept(data, buffer.getvalue()), "jpeg"
            uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            self._of[data] = Picture(len(self.pictures), *image.size, uri)
            self.pictures.append(self._of[data])
        return self._of[data]
