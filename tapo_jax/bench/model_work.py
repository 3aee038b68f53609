"""What both sides of the model benchmark share: the size of the work, its inputs, and how memory is measured."""

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tapo_jax.models.config import Qwen3VLConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """rows, tokens: of forward and train step. slots, prompt: rows and tokens of the prefill; the slots then decode
    `chunk` steps. patches: of each row's image, a square number. remat: of the train step."""

    config: Qwen3VLConfig
    rows: int
    tokens: int
    slots: int
    prompt: int
    chunk: int
    patches: int
    dtype: str
    remat: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one step. cpu: seconds of all threads. value: what the two sides are compared by. flops: the model's own
    count."""

    seconds: float
    cpu: float
    mib: float | None
    value: Any
    tokens: int = 0
    flops: float = 0.0


def conversations(
    config: Qwen3VLConfig, rows: int, tokens: int, patches: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_BxT, pixels_NxF of all rows, grid_Bx3): every row an image between its marks, then random text."""
    rng = np.random.default_rng(0)
    side, places = int(patches**0.5), patches // config.vision.merge**2
    token_BxT = rng.integers(16, min(config.vocab, 100_000), (rows, tokens)).astype(np.int32)
    token_BxT[:, : places + 2] = [config.vision_start, *[config.image_token] * places, config.vision_end]
    pixels_NxF = rng.standard_normal((rows * patches, config.vision.patch_features), np.float32)
    return token_BxT, pixels_NxF, np.array([[1, side, side]] * rows, np.int32)


def written_mask(token_BxT: np.ndarray, patches: int, config: Qwen3VLConfig) -> np.ndarray:
    """The text after the image is taken as the policy's own."""
    mask_BxT = np.ones(token_BxT.shape, bool)
    mask_BxT[:, : patches // config.vision.merge**2 + 2] = False
    return mask_BxT


def added_mib(call) -> tuple[float | None, Any]:
    """(MiB that the process needs at most beside what it has now, the call's value); None where the system does not
    tell. What earlier calls freed is given back to the system first: a call that takes it again needs it too."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident
        before = _resident("VmRSS")
    except OSError:
        return None, call()
    value = call()
    return (_resident("VmHWM") - before) / 1024, value


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
