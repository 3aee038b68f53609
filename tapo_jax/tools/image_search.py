"""image_search_tool: perceptual nearest neighbours of an image of the conversation among titled pictures.

A picture is described by its silhouette: the dominant shape, cropped to its bounding box and resized to a fixed grid.
So a crop with a margin is found, and one that cuts the shape is not. A shape that is small in its picture is not
separated from the others in it, so a whole scene has to be zoomed into.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from tapo_jax.tools.base import function_schema
from tapo_jax.types import IMAGE_SEARCH, Image, ToolResult, root_image

GRID = 24
SPAN = 0.45  # fraction of a picture's side: a smaller shape is not separated from what surrounds it


def silhouette(pixels_HxWx3: np.ndarray, *, contrast: int = 60) -> np.ndarray:
    """Return float32 [GRID²+1] of unit length: the coverage of each cell, and the aspect ratio.

    The background is the median colour of the image's border; the shape is what has the most frequent other colour (in
    64 bins) or one near it. An image of one colour gives zeros.
    """
    pixels = pixels_HxWx3.astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    differs_HxW = np.abs(pixels - np.median(border, axis=0)).sum(-1) > contrast
    if not differs_HxW.any():
        return np.zeros(GRID * GRID + 1, np.float32)
    bins_N = pixels[differs_HxW] // 64 @ np.array([16, 4, 1])
    most = pixels[differs_HxW][bins_N == np.bincount(bins_N).argmax()].mean(0)
    cut = _trim(differs_HxW & (np.abs(pixels - most).sum(-1) < 2 * contrast))
    if max(cut.shape[0] / pixels.shape[0], cut.shape[1] / pixels.shape[1]) < SPAN:
        cut = _trim(differs_HxW)
    grid = PIL.Image.fromarray(cut.astype(np.uint8) * 255).resize((GRID, GRID), PIL.Image.Resampling.BOX)
    cover = np.asarray(grid, np.float32).ravel() / 255
    cover -= cover.mean()
    norm = np.linalg.norm(cover)
    cover = cover / norm if norm > 1e-6 else cover
    feature = np.append(cover, np.float32(0.7 * np.log(cut.shape[1] / cut.shape[0])))
    return (feature / max(np.linalg.norm(feature), 1e-6)).astype(np.float32)


def _trim(shape_HxW: np.ndarray) -> np.ndarray:
    """Crop to its bounding box."""
    rows, columns = np.flatnonzero(shape_HxW.any(1)), np.flatnonzero(shape_HxW.any(0))
    return shape_HxW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


class ImageSearch:
    """Finds the pictures most like an image of the conversation.

    titles, pictures: the index; each picture is uint8 [H, W, 3].
    top_k: number of results.
    thumbnails: number of results whose picture is returned too.
    """

    name = IMAGE_SEARCH

    def __init__(self, titles: Sequence[str], pictures: Sequence[np.ndarray], *, top_k: int, thumbnails: int = 0):
        self._titles, self._pictures = list(titles), list(pictures)
        self._top_k, self._thumbnails = top_k, thumbnails
        self._feature_NxF = np.stack([silhouette(picture) for picture in pictures])
        self.schema = function_schema(
            self.name,
            "Find pictures that look like an image of this conversation.",
            {"img_idx": {"type": "integer", "description": "The image's number, counted from 0.", "x-kind": "image"}},
            ("img_idx",),
        )

    def search(self, pixels_HxWx3: np.ndarray) -> list[tuple[int, float]]:
        """Return (index, cosine) of the top_k nearest pictures, nearest first."""
        score_N = self._feature_NxF @ silhouette(pixels_HxWx3)
        return [(int(i), float(score_N[i])) for i in np.argsort(-score_N, kind="stable")[: self._top_k]]

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        found = self.search(images[arguments["img_idx"]].pixels)
        text = "\n".join(f"{n}. {self._titles[i]}" for n, (i, _) in enumerate(found, start=1))
        shown = tuple(root_image(self._pictures[i]) for i, _ in found[: self._thumbnails])
        return ToolResult(text=text, images=shown)
