"""image_zoom_in_tool: crops a box of an image and enlarges it. The crop knows its root image and its box in it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from tapo_jax.tools.base import BadCall, compose, function_schema
from tapo_jax.types import ZOOM, Image, ToolResult


class ZoomTool:
    """Crops and enlarges a region of an image.

    size: the long side of the returned crop, in pixels.
    min_pixels: a box with a shorter side is an error.
    """

    name = ZOOM

    def __init__(self, *, size: int, min_pixels: int = 4):
        self._size, self._min_pixels = size, min_pixels
        self.schema = function_schema(
            self.name,
            "Zoom in on a region of an image of this conversation.",
            {
                "bbox_2d": {
                    "type": "array",
                    "items": {"type": "number"},
                    "description": "The region as [x1, y1, x2, y2], relative, from 0 to 1000.",
                    "x-kind": "region",
                },
                "label": {"type": "string", "description": "What the region shows.", "x-kind": "none"},
                "img_idx": {"type": "integer", "description": "The image's number, counted from 0.", "x-kind": "image"},
            },
            ("bbox_2d", "img_idx"),
        )

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        image = images[arguments["img_idx"]]
        box = [value / 1000 for value in arguments["bbox_2d"]]
        height, width = image.pixels.shape[:2]
        x1, y1 = int(np.floor(box[0] * width)), int(np.floor(box[1] * height))
        x2, y2 = int(np.ceil(box[2] * width)), int(np.ceil(box[3] * height))
        if x2 - x1 < self._min_pixels or y2 - y1 < self._min_pixels:
            raise BadCall("bad_box", f"The region has {x2 - x1} x {y2 - y1} pixels, which is too small to enlarge.")
        scale = self._size / max(x2 - x1, y2 - y1)
        shape = (max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale)))
        crop = PIL.Image.fromarray(image.pixels[y1:y2, x1:x2]).resize(shape, PIL.Image.Resampling.BICUBIC)
        zoomed = Image(np.asarray(crop), image.root, compose(box, image))
        return ToolResult(text=_named(len(images)), images=(zoomed,), text_from=_named)


def _named(number: int) -> str:
    return f"Image {number}."
