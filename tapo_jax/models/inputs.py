"""Conversations -> arrays of a few fixed shapes, in numpy. The sampler's extensions and the trainer's batches are
filled by the same function, so that both read the same ids, positions and patches.

Shapes come from lists of allowed sizes (buckets): after each has been seen once nothing compiles again.
"""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from tapo_jax.batch import ModelInputs
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.positions import rope_positions, vision_inputs
from tapo_jax.types import Image


def bucket(size: int, buckets: Sequence[int]) -> int:
    """Return the smallest of ascending sizes that holds `size`. Raises ValueError where none does."""
    for allowed in buckets:
        if size <= allowed:
            return allowed
    raise ValueError(f"size {size} is larger than the largest bucket of {tuple(buckets)}")


def most_patches(max_image_tokens: int, max_length: int, merge: int) -> int:
    """Patches that a conversation can have: merge² for each image token, of which there are at most max_image_tokens,
    or max_length where that is 0."""
    return (max_image_tokens or max_length) * merge**2


class PixelStore:
    """Patches of images: each distinct image is processed once, for the sampler and the trainer together.

    Keeps the most recently used patches up to `max_bytes`. dtype: of the patches, that of the model's computation: it
    would round them first of all anyway.
    """

    def __init__(self, processor: ImageProcessor, max_bytes: int = 1 << 30, dtype: np.dtype | type = np.float32):
        self.processor, self.dtype = processor, dtype
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: collections.OrderedDict[bytes, tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()

    def __call__(self, image: Image) -> tuple[np.ndarray, np.ndarray]:
        """(pixels_NxF, grid_thw int32 [3])."""
        key = hashlib.blake2b(image.pixels.tobytes(), digest_size=16, salt=_salt(image.pixels.shape)).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        pixels_NxF, grid = self.processor(image.pixels)
        value = (pixels_NxF.astype(self.dtype, copy=False), np.asarray(grid, np.int32))
        self._kept[key] = value
        self._bytes += value[0].nbytes
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            _, (oldest_NxF, _) = self._kept.popitem(last=False)
            self._bytes -= oldest_NxF.nbytes
        return value

    @property
    def max_patches(self) -> int:
        """Patches of the largest image."""
        return self.processor.max_patches

    def tokens(self, image: Image) -> int:
        """Placeholders of an image, without processing it."""
        return self.processor.tokens(self.grid(image))

    def grid(self, image: Image) -> tuple[int, int, int]:
        """Raises ValueError for an image too long for the bound on pixels: its short side cannot get below one
        block."""
        height, width = image.pixels.shape[:2]
        grid = self.processor.grid(height, width)
        if math.prod(grid) > self.max_patches:
            raise ValueError(
                f"an image of {height} x {width} is too long for a bound of {self.processor.max_pixels} pixels"
            )
        return grid


def _salt(shape: tuple[int, ...]) -> bytes:
    """Two images of the same bytes and another shape are different images."""
    return np.array(shape[:2], np.int32).tobytes()


@dataclasses.dataclass(frozen=True)
class Row:
    """Consecutive tokens of one conversation and all the images among them.

    token_T int32, position_Tx3 int32; pixels: [n_i, F] of each image; grids: its (t, h, w).
    """

    token_T: np.ndarray
    position_Tx3: np.ndarray
    pixels: tuple[np.ndarray, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()

    @property
    def patches(self) -> int:
        return sum(len(pixels_nxF) for pixels_nxF in self.pixels)


def make_row(
    token_T: np.ndarray, images: Sequence[Image], config: Qwen3VLConfig, pixels: PixelStore, start: int = 0
) -> tuple[Row, int]:
    """A row and the position of the token that follows it. `start`: the position of token_T[0]."""
    processed = [pixels(image) for image in images]
    grid_Ix3 = np.array([grid for _, grid in processed], np.int32).reshape(-1, 3)
    position_Tx3, after = rope_positions(token_T, grid_Ix3, config, start)
    grids = tuple(tuple(int(n) for n in grid) for grid in grid_Ix3)
    return Row(np.asarray(token_T, np.int32), position_Tx3, tuple(patches for patches, _ in processed), grids), int(
        after
    )


def model_inputs(
    rows: Sequence[Row | None],
    *,
    length: int,
    patches: int,
    config: Qwen3VLConfig,
    dtype: np.dtype | type = np.float32,
) -> ModelInputs:
    """Numpy ModelInputs of len(rows) rows × `length` tokens × `patches` patches (0: no image fields). None: a row of
    padding. dtype: of the pixels.

    Raises ValueError where a row does not fit, or where its placeholders are not as many as its image features.
    """
    B, N, F = len(rows), patches, config.vision.patch_features
    text = {
        "token_BxT": np.zeros((B, length), np.int32),
        "segment_BxT": np.zeros((B, length), np.int32),
        "position_BxTx3": np.zeros((B, length, 3), np.int32),
    }
    vision = {
        "feature_BxT": np.full((B, length), -1, np.int32),
        "pixels_BxNxF": np.zeros((B, N, F), dtype),
        "patch_image_BxN": np.zeros((B, N), np.int32),
        "patch_rowcol_BxNx2": np.zeros((B, N, 2), np.int32),
        "patch_corner_BxNx4": np.zeros((B, N, 4), np.int32),
        "patch_weight_BxNx4": np.zeros((B, N, 4), np.float32),
    }
    for b, row in enumerate(rows):
        if row is None:
            continue
        count = len(row.token_T)
        if count > length or row.patches > N:
            raise ValueError(f"a row of {count} tokens and {row.patches} patches does not fit {length} × {N}")
        text["token_BxT"][b, :count] = row.token_T
        text["segment_BxT"][b, :count] = 1
        text["position_BxTx3"][b, :count] = row.position_Tx3
        place_T = row.token_T == config.image_token
        if place_T.sum() * config.vision.merge**2 != row.patches:
            raise ValueError(
                f"{place_T.sum()} image placeholders for {row.patches} patches: they do not belong together"
            )
        if row.patches:
            vision["feature_BxT"][b, :count] = np.where(place_T, np.cumsum(place_T) - 1, -1)
            vision["pixels_BxNxF"][b, : row.patches] = np.concatenate(row.pixels)
            for name, value in vision_inputs(np.array(row.grids, np.int32), config).items():
                vision[name.replace("_N", "_BxN")][b, : row.patches] = value
    return ModelInputs(**text, **(vision if N else {}))
