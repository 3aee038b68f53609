"""Read JSON and JSON-lines files as people write them: a byte-order mark, blank lines and CRLF are fine.

What cannot be read is a UserError, one sentence with the file and the line.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError

_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def shown(value: Any, most: int = 80) -> str:
    """Return a value as a message shows it: short, on one line, without control characters.

    A text is in quotes, anything else is JSON.
    """
    if isinstance(value, str):
        text = repr(value) if value.isprintable() else ascii(value)
    else:
        try:
            text = json.dumps(value, default=ascii, skipkeys=True)
        except (ValueError, RecursionError):
            text = f"a {type(value).__name__} that nests too deep"
    return text if len(text) <= most else f"{text[:most]}…"


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of each line that is not blank.

    Lines end only at line feeds: U+2028 and the like may occur in a text. A file named .gz is unpacked. Raises
    UserError.
    """
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if number == 1:
                _refuse_other_kinds(path, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            where = f"{path}, line {number}"
            if line.strip():
                value = parse(_text(line, where), where)
                if not isinstance(value, dict):
                    raise UserError(f"{where}: found {shown(value)}; expected a JSON object, {{…}}.")
                yield number, value


def _lines(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): the file is damaged or no gzip file.") from error


def json_file(path: Path) -> Any:
    """Return the value of a JSON file. Raises UserError."""
    data = path.read_bytes()
    _refuse_other_kinds(path, data)
    return parse(_text(data.removeprefix(b"\xef\xbb\xbf"), str(path)), str(path))


def parse(text: str, where: str) -> Any:
    """Parse JSON. Raises UserError if it is invalid, nested too deep or has a field twice."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: the field '{twice}' stands twice in one object.")
        return found

    try:
        return json.loads(text, object_pairs_hook=fields)
    except RecursionError as error:
        raise UserError(f"{where}: the JSON is nested too deep.") from error
    except ValueError as error:
        raise UserError(f"{where}: found {shown(text.strip(), 40)}, which is no JSON ({error}).") from error


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8.") from error


def _refuse_other_kinds(path: Path, data: bytes) -> None:
    if data[:2] in _BOMS:
        raise UserError(f"{path} is {_BOMS[data[:2]]}: save it as UTF-8.")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of git-lfs and not the file: run git lfs pull.")
    if data.startswith(b"[") and path.suffix == ".jsonl":
        raise UserError(f"{path} is a JSON list: write one object a line, without the brackets around them.")
