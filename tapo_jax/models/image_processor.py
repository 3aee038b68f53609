"""Turn an image's pixels into the flattened patches that the vision tower reads. numpy and Pillow only."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tapo_jax.config import UserError
from tapo_jax.models.model_files import read_json

MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """The fields of preprocessor_config.json. min_pixels and max_pixels bound height · width after resizing."""

    patch: int = 16
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_dir(cls, path: str | Path) -> "ImageProcessor":
        """Read a model directory: processor_config.json as transformers 5 writes it, or preprocessor_config.json.

        Raises FileNotFoundError without either, UserError if a field is missing."""
        file, raw = _read(Path(path))
        size = raw.get("size") or {}
        needed = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
        missing = [name for name in needed if name not in raw]
        for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if not raw.get(bound) and edge not in size:
                missing.append(f"size.{edge}")
        if missing:
            raise UserError(f"{file} has no {missing[0]}: give the file of a Qwen3-VL model.")
        return cls(
            patch=raw["patch_size"],
            merge=raw["merge_size"],
            temporal=raw["temporal_patch_size"],
            min_pixels=raw.get("min_pixels") or size["shortest_edge"],
            max_pixels=raw.get("max_pixels") or size["longest_edge"],
            mean=tuple(raw["image_mean"]),
            std=tuple(raw["image_std"]),
            rescale=raw.get("rescale_factor", 1 / 255),
            resample=raw.get("resample", Image.Resampling.BICUBIC),
        )

    @property
    def block(self) -> int:
        """Return the side of an image token in pixels."""
        return self.patch * self.merge

    @property
    def max_patches(self) -> int:
        """Return the number of patches of the largest image: the whole blocks within max_pixels."""
        return self.max_pixels // self.block**2 * self.merge**2

    def limited(self, max_pixels: int) -> "ImageProcessor":
        """Return the same processor with images of at most `max_pixels`, rounded down to whole blocks.

        The processor's own bound still holds.

        Raises UserError if the bound is below the smallest image of the model, min_pixels.
        """
        most = min(max_pixels, self.max_pixels) // self.block**2 * self.block**2
        if most < self.min_pixels or most == 0:
            least = -(-max(self.min_pixels, 1) // self.block**2) * self.block**2
            raise UserError(
                f"rollout.max_pixels is {max_pixels}, which is {most} in blocks of {self.block} x {self.block} pixels: "
                f"the model's images have at least {least}."
            )
        return dataclasses.replace(self, max_pixels=most)

    def to_hf(self) -> dict:
        """Return the dictionary of a preprocessor_config.json that transformers and `from_dir` read."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen3VLProcessor",
            "patch_size": self.patch,
            "merge_size": self.merge,
            "temporal_patch_size": self.temporal,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "rescale_factor": self.rescale,
            "resample": int(self.resample),
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
        }

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing: multiples of patch · merge, about the same aspect ratio.

        The bounds on the number of pixels win over the aspect ratio; neither side gets below one block.
        Raises ValueError for an image more than 200 times as long as wide, or without pixels.
        """
        if min(height, width) < 1:
            raise ValueError(f"an image of {height} x {width} has no pixels")
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"an image of {height} x {width} is more than {MAX_ASPECT} times as long as wide")
        block = self.block
        # Python's round: half to even, as in the published processor.
        tall, wide = round(height / block) * block, round(width / block) * block
        if tall * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            tall = max(block, math.floor(height / shrink / block) * block)
            wide = max(block, math.floor(width / shrink / block) * block)
        elif tall * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            tall, wide = math.ceil(height * grow / block) * block, math.ceil(width * grow / block) * block
        return tall, wide

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the patches (frames, rows, columns) of an image of this size; an image is one frame."""
        tall, wide = self.size(height, width)
        return 1, tall // self.patch, wide // self.patch

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Return the number of placeholders for an image of this grid in the token sequence."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def __call__(self, image_HxWx3: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Return (pixels_NxF float32, grid).

        F runs over channel, frame (the image repeated), row and column of the patch."""
        if image_HxWx3.dtype != np.uint8 or image_HxWx3.ndim != 3 or image_HxWx3.shape[2] != 3:
            raise ValueError(f"expected uint8 [H, W, 3], got {image_HxWx3.dtype} {list(image_HxWx3.shape)}")
        tall, wide = self.size(*image_HxWx3.shape[:2])
        resized = Image.fromarray(image_HxWx3).resize((wide, tall), resample=self.resample)
        # Round as the published processor does: scale in float64, keep float32, then normalise in float32.
        scaled_HxWx3 = (np.asarray(resized).astype(np.float64) * self.rescale).astype(np.float32)
        normal_HxWx3 = (scaled_HxWx3 - np.float32(self.mean)) / np.float32(self.std)
        rows, columns = tall // self.patch, wide // self.patch
        block_shape = (rows // self.merge, self.merge, self.patch, columns // self.merge, self.merge, self.patch, 3)
        patches = normal_HxWx3.reshape(block_shape).transpose(0, 3, 1, 4, 6, 2, 5)
        frames = np.repeat(patches[:, :, :, :, :, None], self.temporal, axis=5)
        return np.ascontiguousarray(frames.reshape(rows * columns, -1)), (1, rows, columns)


def _read(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that holds the image processor, and its fields. As in transformers, the newer file wins."""
    new, old = directory / "processor_config.json", directory / "preprocessor_config.json"
    if new.is_file():
        raw = read_json(new).get("image_processor")
        if isinstance(raw, dict):
            return new, raw
    if not old.is_file():
        raise FileNotFoundError(f"{directory} has no preprocessor_config.json and no image_processor in {new.name}")
    return old, read_json(old)
