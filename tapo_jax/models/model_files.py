"""Reading the small files of a model directory, with one sentence for what is wrong with a file. Imports no jax."""

import json
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError

_POINTER = b"version https://git-lfs"


def check_no_pointer(file: Path) -> None:
    """Raises UserError where a file is only the pointer that git-lfs leaves in the place of a large file."""
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull` in its folder.")


def read_text(file: Path) -> str:
    """The text of a file. Raises UserError where it cannot be read, is a git-lfs pointer or is no UTF-8."""
    try:
        check_no_pointer(file)
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text (byte {error.start}): copy or download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UserError where it cannot be read or is no JSON object."""
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}): copy or download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object: copy or download it again.")
    return value
