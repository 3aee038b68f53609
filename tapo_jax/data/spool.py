"""Pictures of a Parquet column, copied once into a flat file from which each can be read alone.

A Parquet page holds the pictures of a hundred rows or of a whole file, so that one of them costs reading all. The copy
lies in the user's cache folder (XDG_CACHE_HOME), holds the encoded bytes as they are, and is found again as long as the
file has the same path, size and date. Nothing of it stays in memory but where each picture begins.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tapo_jax.config import UserError
from tapo_jax.data.images import from_base64

# What a cell holds: bytes at (offset, length) of the copy, the path of a file, or text that is no picture (the reason).
Item = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Spool:
    """rows: the items of each row's cell, those that hold nothing left out."""

    path: Path
    rows: list[list[Item]]

    def read(self, item: Item) -> bytes:
        """The bytes of an item that has "at"."""
        offset, length = item["at"]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tapo_jax" / "pictures"


def spool(source: Path, column: str, cells: Iterable[Any], count: int) -> Spool:
    """The copy of a column, made by one process where it is not there yet. cells: the values of its `count` rows.

    Raises UserError where the cache folder cannot be written.
    """
    stat = source.stat()
    identity = json.dumps([str(source.resolve()), stat.st_size, stat.st_mtime_ns, column])
    place = cache_folder() / hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    data, index = place.with_suffix(".bytes"), place.with_suffix(".json")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not index.is_file():
                bar = tqdm(cells, desc=f"copying {source.name}", total=count, unit="", dynamic_ncols=True, leave=False)
                _write(data, index, bar)
    except OSError as error:
        raise UserError(
            f"The pictures of {source} ({stat.st_size >> 20} MiB) cannot be copied into the cache folder "
            f"{place.parent} ({error.strerror or error}): make room, or set XDG_CACHE_HOME to another folder."
        ) from error
    return Spool(data, json.loads(index.read_text()))


def _write(data: Path, index: Path, cells: Iterable[Any]) -> None:
    """The index is renamed last: where it is, the copy is whole."""
    temporary, rows, offset = data.with_suffix(".tmp"), [], 0
    try:
        with open(temporary, "wb") as file:
            for cell in cells:
                items = []
                for item in _items(cell):
                    if isinstance(item, bytes):
                        file.write(item)
                        items.append({"at": [offset, len(item)]})
                        offset += len(item)
                    else:
                        items.append(item)
                rows.append(items)
        os.replace(temporary, data)
        index.with_suffix(".tmp").write_text(json.dumps(rows))
        os.replace(index.with_suffix(".tmp"), index)
    finally:
        for left in (temporary, index.with_suffix(".tmp")):
            with contextlib.suppress(FileNotFoundError):
                left.unlink()


def _items(cell: Any) -> Iterator[bytes | dict[str, str]]:
    """Bytes, {"path": …} or {"bad": reason} for each item of a cell that holds something."""
    for item in [] if cell is None else cell if isinstance(cell, list) else [cell]:
        data, path = (item.get("bytes"), item.get("path")) if isinstance(item, Mapping) else (item, None)
        if isinstance(data, str) and data:
            try:
                yield from_base64(data)
            except ValueError as error:
                yield {"bad": str(error)}
        elif data:
            yield bytes(data)
        elif path:
            yield {"path": str(path)}
