"""Shared parts of both sides of the model benchmark: sizes, inputs, and how memory is measured."""

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tapo_jax.models.config import Qwen3VLConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the work."""

    config: Qwen3VLConfig
    rows: int
    """Rows of the forward pass and the train step."""
    tokens: int
    """Tokens of such a row."""
    slots: int
    """Rows of the prefill and of decoding."""
    prompt: int
    """Tokens of a prompt."""
    chunk: int
    """Decoding steps."""
    patches: int
    """Patches of each row's image, a square number."""
    dtype: str
    remat: str
    """Rematerialisation of the train step."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of one step."""

    seconds: float
    cpu: float
    """CPU seconds of all threads."""
    mib: float | None
    """Max memory that it adds, None if unknown."""
    value: Any
    """The result by which the two sides are compared."""
    tokens: int = 0
    flops: float = 0.0
    """The model's own count."""


def conversations(
    config: Qwen3VLConfig, rows: int, tokens: int, patches: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (token_BxT, pixels_NxF of all rows, grid_Bx3): a row is an image between its marks, then random text."""
    rng = np.random.default_rng(0)
    side, places = int(patches**0.5), patches // config.vision.merge**2
    token_BxT = rng.integers(16, min(config.vocab, 100_000), (rows, tokens)).astype(np.int32)
    token_BxT[:, : places + 2] = [config.vision_start, *[config.image_token] * places, config.vision_end]
    pixels_NxF = rng.standard_normal((rows * patches, config.vision.patch_features), np.float32)
    return token_BxT, pixels_NxF, np.array([[1, side, side]] * rows, np.int32)


def written_mask(token_BxT: np.ndarray, patches: int, config: Qwen3VLConfig) -> np.ndarray:
    """Return a mask that takes the text after the image as written by the policy."""
    mask_BxT = np.ones(token_BxT.shape, bool)
    mask_BxT[:, : patches // config.vision.merge**2 + 2] = False
    return mask_BxT


def added_mib(call) -> tuple[float | None, Any]:
    """Return (max MiB that a call adds to the process, the call's value); None MiB if the system does not tell.

    Memory that earlier calls freed is returned to the system first: a call that takes it again needs it too."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident
        before = _resident("VmRSS")
    except OSError:
        return None, call()
    value = call()
    return (_resident("VmHWM") - before) / 1024, value


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
