"""Turn conversations into arrays of a few fixed shapes, in numpy.

The sampler's extensions and the trainer's batches are filled by the same function, so that both read the same ids,
positions and patches. Shapes come from lists of allowed sizes (buckets): once each has occurred, nothing is
recompiled.
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
    """Return the smallest of ascending sizes that holds `size`. Raises ValueError if none does."""
    for allowed in buckets:
        if size <= allowed:
            return allowed
    raise ValueError(f"size {size} is larger than the largest bucket of {tuple(buckets)}")


def most_patches(max_image_tokens: int, max_length: int, merge: int) -> int:
    """Return the max number of patches of a conversation: merge² for each of its image tokens.

    It has at most max_image_tokens of them, or max_length if that is 0."""
    return (max_image_tokens or max_length) * merge**2


class PixelStore:
    """A store of images' patches: each distinct image is processed once, for the sampler and the trainer together.

    processor: makes the patches.
    max_bytes: the most recently used patches are kept up to this size.
    dtype: dtype of the patches: that of the model's computation, which would round them first anyway.
    """

    def __init__(self, processor: ImageProcessor, max_bytes: int = 1 << 30, dtype: np.dtype | type = np.float32):
        self.processor, self.dtype = processor, dtype
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: collections.OrderedDict[bytes, tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()

    def __call__(self, image: Image) -> tuple[np.ndarray, np.ndarray]:
        """Return (pixels_NxF, grid_thw int32 [3]) of an image."""
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
        """Return the number of patches of the largest image."""
        return self.processor.max_patches

    def tokens(self, image: Image) -> int:
        """Return the number of placeholders of an image, without processing it."""
        return self.processor.tokens(self.grid(image))

    def grid(self, image: Image) -> tuple[int, int, int]:
        """Return the patch grid of an image.

        Raises ValueError if the image is too long for the bound on pixels: its short side cannot get below one
        block."""
        height, width = image.pixels.shape[:2]
        grid = self.processor.grid(height, width)
        if math.prod(grid) > self.max_patches:
            raise ValueError(
                f"an image of {height} x {width} is too long for a bound of {self.processor.max_pixels} pixels"
            )
        return grid


def _salt(shape: tuple[int, ...]) -> bytes:
    """Return the shape as bytes: two images of the same bytes and different shapes are different images."""
    return np.array(shape[:2], np.int32).tobytes()


@dataclasses.dataclass(frozen=True)
class Row:
    """Consecutive tokens of one conversation and all the images among them."""

    token_T: np.ndarray
    """int32."""
    position_Tx3: np.ndarray
    """int32, M-RoPE positions."""
    pixels: tuple[np.ndarray, ...] = ()
    """Patches [n_i, F] of each image."""
    grids: tuple[tuple[int, int, int], ...] = ()
    """Patch grid (t, h, w) of each image."""

    @property
    def patches(self) -> int:
        return sum(len(pixels_nxF) for pixels_nxF in self.pixels)


def make_row(
    token_T: np.ndarray, images: Sequence[Image], config: Qwen3VLConfig, pixels: PixelStore, start: int = 0
) -> tuple[Row, int]:
    """Return a row and the position of the token that follows it.

    token_T: ids.
    images: the images whose placeholders are among them.
    config: the model's config.
    pixels: where the images' patches come from.
    start: the position of token_T[0].
    """
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
    """Return ModelInputs of numpy arrays for the given rows.

    rows: None is a row of padding.
    length: tokens of a row, padding included.
    patches: patches of a row, padding included; 0 leaves the image fields out.
    config: the model's config.
    dtype: dtype of the pixels.

    Raises ValueError if a row does not fit, or has more or fewer placeholders than image features.
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
