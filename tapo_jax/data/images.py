"""Decode images to pixels, as transformers does: rotated as EXIF says, alpha on white, 16 bit scaled to 8.

Files are untrusted: only formats that contain no code are opened, the size is checked before anything is decoded, and
every failure is a `BadImage` that names the image.
"""

import base64
import binascii
import dataclasses
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from tapo_jax.config import BadImage
from tapo_jax.models.image_processor import MAX_ASPECT
from tapo_jax.tools.pixels import to_rgb

PIL.Image.init()
# No EPS or PDF: those run an interpreter.
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in PIL.Image.OPEN)
MAX_PIXELS = 200_000_000  # of an image that is decoded
FULL_PIXELS = 1 << 25  # max pixels of a decoded image, kept for zooming; a larger photograph is reduced by 2, 4, …
MAX_BYTES = 1 << 28  # of an encoded image
PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow's own guard raises at twice this number


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image that is read and decoded when it is called."""

    name: str
    """The name in messages."""
    read: Callable[[], bytes]

    def __call__(self) -> np.ndarray:
        return decode(self.data(), self.name)

    def data(self) -> bytes:
        """Return the encoded bytes. Raises BadImage if they cannot be read."""
        try:
            return self.read()
        except OSError as error:
            raise bad(self.name, f"it cannot be read ({error.strerror or error})") from error

    def size(self) -> tuple[int, int]:
        """Return width and height from the file's header, without decoding. Raises BadImage."""
        return opened(self.data(), self.name).size


def stored_file(path: Path) -> StoredImage:
    """Return an image file as a `StoredImage`."""

    def read() -> bytes:
        if os.path.getsize(path) > MAX_BYTES:
            raise bad(str(path), f"the file is larger than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()

    return StoredImage(str(path), read)


def decode(data: bytes, name: str) -> np.ndarray:
    """Decode to uint8 [H, W, 3].

    A photograph of more than FULL_PIXELS is reduced by a power of two while it is decoded. Raises BadImage: before
    anything is decoded if it is no picture, has more than MAX_PIXELS or is more than MAX_ASPECT times as long as wide.
    """
    image = opened(data, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; what matters raises
            if (factor := reduction(image)) > 1:
                image.draft("RGB", (image.width // factor, image.height // factor))  # only JPEG supports this
            image.load()
            shown = to_rgb(PIL.ImageOps.exif_transpose(image))
            return np.array(shown.reduce(factor) if (factor := reduction(shown)) > 1 else shown)
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise bad(name, f"it is damaged ({_one_line(error)})") from error


def reduction(image: PIL.Image.Image) -> int:
    """Return the smallest power of two by which both sides have to shrink for FULL_PIXELS."""
    factor = 1
    while image.width * image.height > FULL_PIXELS * factor**2:
        factor *= 2
    return factor


def opened(data: bytes, name: str) -> PIL.Image.Image:
    """Return the image with its header read and nothing decoded. Raises BadImage."""
    head = data[:512].lstrip().lower()
    if not data:
        raise bad(name, "the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise bad(name, "it is a pointer of git-lfs and not the picture: run git lfs pull")
    if head.startswith((b"<!doctype html", b"<html")):
        raise bad(name, "it is a web page and not a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise bad(name, f"it has more than {MAX_PIXELS // 10**6} megapixels") from error
    except PIL.UnidentifiedImageError as error:
        raise bad(name, f"it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a header that is truncated or wrong
        raise bad(name, f"it is damaged ({_one_line(error)})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise bad(name, f"{width} x {height} is more than {MAX_PIXELS // 10**6} megapixels")
    check_shape(height, width, name)
    return image


def check_shape(height: int, width: int, name: str) -> None:
    """Check the shape of an image. Raises BadImage if the model cannot be shown it."""
    if min(height, width) < 1:
        raise bad(name, f"{width} x {height} has no pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise bad(name, f"{width} x {height} is more than {MAX_ASPECT} times as long as wide")


def from_base64(text: str) -> bytes:
    """Decode base64 text or a data: URL to bytes. Raises ValueError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"it is no base64 text ({error})") from error


def bad(name: str, reason: str) -> BadImage:
    return BadImage(f"The image {name} cannot be shown: {reason}.")


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
