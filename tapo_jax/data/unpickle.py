"""Read pickles of plain containers without running anything that they ask for.

A pickle is a program. This reader lets it build dicts, lists, tuples, sets, texts, bytes and numbers, and gives it an
inert object if it asks for a Pillow picture. A file that asks for any other name is refused, and nothing of it is run.
"""

import pickle
import pickletools
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

from tapo_jax.config import UserError

_FORMS = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"}
MAX_PIXELS = 1 << 25  # of a picture inside a pickle


class Inert:
    """What a pickle gets if it asks for a picture's class: it keeps the state that it is given, and does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


def _inert(*_: Any) -> Inert:
    """Replace copyreg's function that builds an object in old pickles."""
    return Inert()


def _latin(text: str, encoding: str) -> bytes:
    """Return the bytes that old pickles write as `_codecs.encode(text, "latin1")`."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {str(encoding)[:20]!r}")
    return text.encode("latin-1")


def _byte_array(data: bytes | str = b"", encoding: str = "latin-1") -> bytes:
    """Return the bytes of a bytearray in a pickle. Never from a number n: that would be n zero bytes."""
    return bytes(data) if isinstance(data, (bytes, bytearray)) else _latin(data, encoding)


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a known name. Never imports anything: known names map to objects of this file."""
        if module.split(".")[0] == "PIL" and name.endswith(("Image", "ImageFile")):
            return Inert
        known = {
            ("copyreg", "_reconstructor"): _inert,
            ("copy_reg", "_reconstructor"): _inert,
            ("_codecs", "encode"): _latin,
            ("builtins", "object"): Inert,
            ("__builtin__", "object"): Inert,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("builtins", "bytearray"): _byte_array,
            ("__builtin__", "bytearray"): _byte_array,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, and only plain containers are read")
        return known[module, name]


def load(path: Path) -> Any:
    """Return the value of a pickle, with an `Inert` for each picture. Raises UserError for anything not plain."""
    try:
        with open(path, "rb") as file:
            _check_memo(file)
            file.seek(0)
            return _Plain(file).load()
    except Exception as error:  # the file is an untrusted program: it can fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is refused: {reason}. Nothing of it was run.") from error


def _check_memo(file: BinaryIO) -> None:
    """Check the memo's numbers. Raises UnpicklingError if one is larger than the number of opcodes so far.

    The reader would allocate memory for all numbers below it.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if "PUT" in opcode.name and int(argument) > count + 1:
            raise pickle.UnpicklingError(f"keeps a value under the number {argument}")


def picture(value: Any) -> PIL.Image.Image | None:
    """Return the picture that an `Inert` was in the pickle; None if its state is not a picture's."""
    state = value.state if isinstance(value, Inert) else None
    if not isinstance(state, (list, tuple)) or len(state) < 5:
        return None
    _, mode, size, palette, data = state[:5]
    shape = isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if mode not in _FORMS or not shape or size[0] * size[1] > MAX_PIXELS or not isinstance(data, bytes):
        return None
    try:
        image = PIL.Image.frombytes(mode, tuple(size), data)
        if mode == "P":
            image.putpalette(bytes(palette[:768]))
    except (ValueError, TypeError):
        return None
    return image
