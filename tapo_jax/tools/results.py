"""Turn what a tool returned into a proper result: the text cleaned and cut, pictures as uint8 RGB with a root.

A tool is foreign code. A value with an obvious meaning is accepted (a str is a text, a PIL picture or an array an
image); anything else is a `BadCall` of kind "bad_result", which the policy reads.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import PIL.Image

from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.pixels import eight_bit, to_rgb
from tapo_jax.tools.values import whole_text
from tapo_jax.types import Image, ToolResult, root_image

MAX_CHARACTERS = 100_000  # of the text of one result
MAX_PIXELS = 200_000_000  # of one image


def settle(value: Any) -> ToolResult:
    """Return what a tool returned as a result whose text, images, parts and error have their types.

    Accepted are a ToolResult; a text or number; a picture (`Image`, PIL, an array); a list of texts and pictures,
    shown in their order; a dict with "text", "images" or "image", and "error". Raises BadCall.
    """
    if isinstance(value, ToolResult):
        result = _result(value.text, value.images, value.error, value.parts)
        result = result if value.origin is None else dataclasses.replace(result, origin=value.origin)
        return result if value.text_from is None else dataclasses.replace(result, text_from=_safe(value, result.text))
    if isinstance(value, Mapping):
        return _from_dict(value)
    if isinstance(value, list | tuple):
        wrong = [part for part in value if not isinstance(part, str) and not _is_picture(part)]
        if wrong:
            raise _bad(f"it gave a list with a {type(wrong[0]).__name__}")
        return _result("", (), None, value)
    if isinstance(value, str | int | float | np.number):
        return _result(value, (), None, ())
    if _is_picture(value):
        return _result("", (value,), None, ())
    if value is None:
        raise _bad("it gave nothing")
    raise _bad(f"it gave a {type(value).__name__} and no ToolResult")


def _safe(result: ToolResult, text: str) -> Callable[[int], str]:
    """Return the result's `text_from` with its texts checked; where it fails, the text is `text`."""

    def text_from(number: int) -> str:
        try:
            return _cut(_text(result.text_from(number)), MAX_CHARACTERS)
        except Exception:
            return text

    return text_from


def error_word(error: Any) -> str:
    """Return the kind of an error as one word for the metrics."""
    word = re.sub(r"\W+", "_", whole_text(error)).strip("_")[:40] if isinstance(error, str) else ""
    return word or "error"


def _from_dict(value: Mapping[Any, Any]) -> ToolResult:
    error = value.get("error")
    images = value.get("images", value.get("image"))
    if "text" not in value and images is None and not error:
        raise _bad('it gave a dict without "text"')
    text = value.get("text")
    if text is None and error:
        return _result(f"Error: {_text(error)}", images, "error", ())
    return _result(text, images, error, ())


def _result(text: Any, images: Any, error: Any, parts: Any) -> ToolResult:
    kind = error_word(error) if error else None
    if parts is not None and len(parts):
        return ToolResult(parts=tuple(_parts(parts)), error=kind)
    return ToolResult(text=_cut(_text(text), MAX_CHARACTERS), images=tuple(_images(images)), error=kind)


def _parts(parts: Iterable[Any]) -> Iterable[str | Image]:
    """Yield the parts; text after MAX_CHARACTERS in total is left out, with a note where it is cut."""
    left = MAX_CHARACTERS
    for part in parts:
        if _is_picture(part):
            yield _image(part)
        elif left > 0:
            text = _text(part)
            yield _cut(text, left)
            left -= len(text)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[:most]}\n[Cut: {most} of {len(text)} characters are shown.]"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, int | float | np.number):
        try:
            return str(value)
        except ValueError:  # an integer of thousands of digits
            raise _bad("its text is a number of too many digits") from None
    raise _bad(f"its text is a {type(value).__name__}")


def _images(images: Any) -> Iterable[Image]:
    if images is None:
        return ()
    if _is_picture(images):
        # An array of four axes is a stack of pictures.
        stack = isinstance(images, np.ndarray) and images.ndim == 4
        return [_image(image) for image in images] if stack else [_image(images)]
    if not isinstance(images, Iterable) or isinstance(images, str | bytes | Mapping):
        raise _bad(f"its images are a {type(images).__name__}")
    return [_image(image) for image in images]


def _is_picture(value: Any) -> bool:
    """Return whether a value is a picture.

    Arrays of other libraries (a tensor) have `__array__`; numpy's scalars have it too, and are not pictures.
    """
    arrayed = "__array__" in dir(type(value)) and not isinstance(value, np.generic)
    return isinstance(value, Image | PIL.Image.Image) or arrayed


def _image(value: Any) -> Image:
    if not isinstance(value, Image):
        if not _is_picture(value):
            raise _bad(f"one of its images is a {type(value).__name__}")
        return root_image(_pixels(value))
    pixels_HxWx3 = _pixels(value.pixels)
    box = _box(value.box)
    if box is None or not isinstance(value.root, int | np.integer) or isinstance(value.root, bool):
        return root_image(pixels_HxWx3)  # it is not known where it was cut from
    root = (int(value.root) + 2**31) % 2**32 - 2**31  # hashes of other lengths are wrapped to int32
    if pixels_HxWx3 is value.pixels and root == value.root and box == value.box:
        return value
    return Image(pixels_HxWx3, root, box)


def _box(box: Any) -> tuple[float, float, float, float] | None:
    """Return the box if it is one inside its root, else None."""
    if isinstance(box, np.ndarray):
        box = box.tolist()
    if not isinstance(box, tuple | list) or len(box) != 4:
        return None
    if not all(isinstance(v, int | float | np.number) for v in box):
        return None
    inside = -1e-6 <= box[0] < box[2] <= 1 + 1e-6 and -1e-6 <= box[1] < box[3] <= 1 + 1e-6
    return tuple(box) if inside else None


def _pixels(picture: Any) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3]: the array itself if it already is that."""
    if isinstance(picture, PIL.Image.Image):
        _check_size(picture.height, picture.width)
        try:
            return np.array(to_rgb(picture))
        except Exception as error:  # a truncated file, a mode that cannot be converted
            raise _bad(f"one of its images cannot be decoded ({type(error).__name__})") from error
    if not _is_picture(picture):
        raise _bad(f"one of its images has pixels of type {type(picture).__name__}")
    pixels = picture if isinstance(picture, np.ndarray) else np.asarray(picture)
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)  # channels first, as tensors have them
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise _bad(f"one of its images has the shape {list(pixels.shape)}, not [height, width, 3]")
    _check_size(*pixels.shape[:2])
    pixels = pixels if pixels.dtype == np.uint8 else _to_bytes(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return pixels
    grey = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return np.array(to_rgb(PIL.Image.fromarray(np.ascontiguousarray(grey))))


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if not np.issubdtype(pixels.dtype, np.integer) and not np.issubdtype(pixels.dtype, np.floating):
        raise _bad(f"one of its images has pixels of type {pixels.dtype}")
    # Signed 16-bit values are differences of bytes; unsigned ones are the pixels of a 16-bit picture.
    wide = pixels.astype(np.int32) if pixels.dtype == np.int16 else pixels
    try:
        return eight_bit(wide.astype(np.float32) if wide.dtype == np.float16 else wide)
    except ValueError as error:
        raise _bad(f"one of its images has pixels that are no colours: {error}") from error


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise _bad("one of its images has no pixels")
    if height * width > MAX_PIXELS:
        raise _bad(f"one of its images has more than {MAX_PIXELS // 10**6} megapixels")


def _bad(reason: str) -> BadCall:
    return BadCall("bad_result", f"The tool failed: {reason}.")
