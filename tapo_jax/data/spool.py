"""Copy the pictures of a Parquet column once into a flat file from which each can be read by itself.

A Parquet page holds the pictures of a hundred rows or of a whole file, so that reading one means reading all. The copy
is in the user's cache folder (XDG_CACHE_HOME), holds the encoded bytes unchanged, and is reused as long as the file has
the same path, size and date. Only the position of each picture stays in memory.
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

# An item of a cell: bytes at (offset, length) of the copy, the path of a file, or the reason why it is no picture.
Item = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Spool:
    """The copy of a column."""

    path: Path
    rows: list[list[Item]]
    """The items of each row's cell, without the empty ones."""

    def read(self, item: Item) -> bytes:
        """Return the bytes of an item that has "at"."""
        offset, length = item["at"]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tapo_jax" / "pictures"


def spool(source: Path, column: str, cells: Iterable[Any], count: int) -> Spool:
    """Return the copy of a column, made by one process if it does not exist yet.

    cells: the values of its `count` rows. Raises UserError if the cache folder cannot be written.
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
    """Write the copy and its index. The index is renamed last: if it exists, the copy is complete."""
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
    """Yield bytes, {"path": …} or {"bad": reason} for each item of a cell that is not empty."""
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
