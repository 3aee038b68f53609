"""Read the small files of a model directory, with one sentence for what is wrong with a file. Imports no jax."""

import json
import shutil
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError

_POINTER = b"version https://git-lfs"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt"}
_TEMPLATES = "additional_chat_templates"


def check_no_pointer(file: Path) -> None:
    """Raise UserError if a file is only the pointer that git-lfs leaves in place of a large file."""
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull` in its folder.")


def read_text(file: Path) -> str:
    """Return the text of a file. Raises UserError if it cannot be read, is a git-lfs pointer or is not UTF-8."""
    try:
        check_no_pointer(file)
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text (byte {error.start}): copy or download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file. Raises UserError if it cannot be read or is no JSON object."""
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}): copy or download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object: copy or download it again.")
    return value


def copy_assets(source: Path, target: Path) -> None:
    """Copy every file of a model directory except its weights, and the folder of named chat templates.

    Files that `target` already has stay. Links are followed: in a download cache all files are links."""
    files = [file for file in sorted(source.iterdir()) if not _about_weights(file)]
    files += sorted((source / _TEMPLATES).glob("*.jinja"))
    for file in files:
        to = target / file.relative_to(source)
        if file.is_file() and not to.exists():
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to)


def _about_weights(file: Path) -> bool:
    name = file.name
    return name.startswith(".") or file.suffix in _WEIGHTS or name.endswith(".index.json") or name == "config.json"
