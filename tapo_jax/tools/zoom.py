"""image_zoom_in_tool: crops a box of an image. The crop knows its root image and its box in it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from tapo_jax.tools.base import BadCall, compose, function_schema
from tapo_jax.types import ZOOM, Image, ToolResult


class ZoomTool:
    """Crops a region of an image.

    size: the long side of the returned crop, in pixels, for small pictures that are enlarged always alike. 0: the crop
        keeps its own pixels. What the policy sees is then sized once, by its image processor: as it is where that fits,
        enlarged only to the processor's least number of pixels, reduced only to its greatest (rollout.max_pixels).
    min_pixels: a box with a shorter side is an error.
    """

    name = ZOOM

    def __init__(self, *, size: int = 0, min_pixels: int = 4):
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
        pixels_HxWx3 = image.pixels[y1:y2, x1:x2]
        if self._size:
            pixels_HxWx3 = _resized(pixels_HxWx3, self._size)
        zoomed = Image(pixels_HxWx3, image.root, compose(box, image))
        return ToolResult(text=_named(len(images)), images=(zoomed,), text_from=_named)


def _resized(pixels_HxWx3: np.ndarray, size: int) -> np.ndarray:
    """Resize to a long side of `size` pixels."""
    height, width = pixels_HxWx3.shape[:2]
    scale = size / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(PIL.Image.fromarray(pixels_HxWx3).resize(shape, PIL.Image.Resampling.BICUBIC))


def _named(number: int) -> str:
    return f"Image {number}."
