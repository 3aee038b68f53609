"""Parquet files row by row: the small columns are read at once, the columns with pictures one row at a time.

Needs pyarrow (the extra [parquet]). A picture is `struct{bytes, path}`, bytes, base64 text or a list of these, in any
of Arrow's spellings (large_string, binary_view, …).
"""

import dataclasses
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.data.images import StoredImage, bad, from_base64
from tapo_jax.data.json_files import shown
from tapo_jax.data.paths import find_file
from tapo_jax.data.rows import Row

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_BATCH = 8  # rows that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a row keeps of a column of pictures: where to read it, and which items of the cell hold something."""

    column: "PictureColumn"
    row: int
    there: tuple[bool, ...]
    where: str

    def stored(self, folder: Path) -> list[StoredImage]:
        """The images of the cell, unread. folder: where the paths of cells that hold paths are looked for."""
        return [
            StoredImage(self._name(n), lambda n=n: self._data(n, folder)) for n, there in enumerate(self.there) if there
        ]

    def _name(self, number: int) -> str:
        return f"{self.where}, {self.column.name}" + (f"[{number}]" if len(self.there) > 1 else "")

    def _data(self, number: int, folder: Path) -> bytes:
        name = self._name(number)
        item = self.column.read(self.row)[number]
        try:
            data, path = (item.get("bytes"), item.get("path")) if isinstance(item, Mapping) else (item, None)
            if isinstance(data, str):
                return from_base64(data)
        except ValueError as error:
            raise bad(name, str(error)) from error
        if data is not None:
            return data
        file = find_file(folder, path, tails=True)
        if file is None:
            raise bad(name, f"there is no file {shown(path)} in {folder}")
        return file.read_bytes()


def rows(folder: Path, split: str, pictures: Sequence[str]) -> list[Row]:
    """All rows of a split's shards, in order. The columns `pictures` hold `Pictures`, all others their values.

    Raises UserError for a split or a shard that is not there, and for what is no Parquet file.
    """
    found = [row for path in shards(folder, split) for row in _rows_of_file(path, pictures)]
    if not found:
        raise UserError(f"{folder} has no rows in its split '{split}'.")
    return found


def shards(folder: Path, split: str) -> list[Path]:
    """train.parquet, NAME_train.parquet or train-00000-of-00002.parquet and its fellows, in the folder or its `data`.
    Raises UserError where there is none, where one is missing, or where several files fit."""
    files = [path for place in (folder, folder / "data") if place.is_dir() for path in sorted(place.glob("*.parquet"))]
    names = {path: _SHARD.sub("", path.stem) for path in files}
    fits = [path for path in files if names[path] == split] or [
        path for path in files if names[path].endswith((f"_{split}", f"-{split}"))
    ]
    kinds = sorted(set(names.values()))
    if not fits:
        raise UserError(f"{folder} has no Parquet file of a split '{split}': it has {', '.join(kinds) or 'none'}.")
    if len({(path.parent, names[path]) for path in fits}) > 1:
        raise UserError(f"{folder} has several files of a split '{split}': {', '.join(str(path) for path in fits)}.")
    numbers = [_SHARD.search(path.stem) for path in fits]
    if any(numbers):
        totals = {int(number.group(2)) for number in numbers if number}
        wanted = set(range(max(totals)))
        missing = sorted(wanted - {int(number.group(1)) for number in numbers if number})
        if missing or len(totals) > 1:
            raise UserError(
                f"{folder} has {len(fits)} of the {max(totals)} files of its split '{split}': "
                f"number {', '.join(map(str, missing)) or 'unclear'} is missing; download it again."
            )
    return fits


def _rows_of_file(path: Path, pictures: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa  # noqa: PLC0415 - an extra

    try:
        file = _open(path)
        schema = file.schema_arrow
        small = [field.name for field in schema if field.name not in pictures and not _holds_bytes(field.type)]
        table = file.read(columns=small)
        columns = {name: PictureColumn(path, name) for name in pictures if name in schema.names}
        there = {name: list(column.filled()) for name, column in columns.items()}
        values = table.to_pylist() if small else [{} for _ in range(file.metadata.num_rows)]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({str(error).strip().splitlines()[0][:200]}).") from error
    for number, row in enumerate(values):
        where = f"{path}, row {number + 1}"
        cells = {name: Pictures(column, number, there[name][number], where) for name, column in columns.items()}
        yield Row(where, row | cells)


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type has bytes somewhere inside."""
    import pyarrow as pa  # noqa: PLC0415 - an extra

    views = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    if any(check(kind) for check in views):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _open(path: Path) -> Any:
    """The file, which is read in pieces. Raises UserError without pyarrow or for what is no Parquet file."""
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError(f"{path} is a Parquet file, which needs pyarrow: pip install 'tapo_jax[parquet]'.") from error
    with open(path, "rb") as file:
        head = file.read(24)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of git-lfs and not the file: run git lfs pull.")
    if not head.startswith(b"PAR1"):
        raise UserError(f"{path} is no Parquet file: download it again.")
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


class PictureColumn:
    """One column of one file, read a few rows at a time. Rows in order cost one pass over the file; a row out of order
    costs a pass over its row group up to it. Keeps the last batch of rows, and no more. Safe to call from threads."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._lock = threading.Lock()
        self._file: Any = None
        self._batches: Iterator | None = None
        self._kept: list[list[Any]] = []
        self._first = 0  # row number of _kept[0]

    def filled(self) -> Iterator[tuple[bool, ...]]:
        """For each row, which items of its cell hold something. One pass over the file."""
        for batch in _open(self.path).iter_batches(_BATCH, columns=[self.name]):
            for value in batch.column(0).to_pylist():
                yield tuple(_is_filled(item) for item in _items(value))

    def read(self, row: int) -> list[Any]:
        """The items of a row's cell."""
        with self._lock:
            if not self._first <= row < self._first + len(self._kept):
                self._seek(row)
            return self._kept[row - self._first]

    def _seek(self, row: int) -> None:
        if self._file is None:
            self._file = _open(self.path)
        group, start = self._group(row)
        after = self._first + len(self._kept)
        if self._batches is None or not start <= after <= row:
            self._batches = self._file.iter_batches(_BATCH, row_groups=[group], columns=[self.name])
            after = start
        for batch in self._batches:
            if row < after + batch.num_rows:
                self._first, self._kept = after, [_items(value) for value in batch.column(0).to_pylist()]
                return
            after += batch.num_rows
        raise IndexError(row)

    def _group(self, row: int) -> tuple[int, int]:
        """The row group of a row and the number of its first row."""
        metadata, start = self._file.metadata, 0
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if row < start + size:
                return group, start
            start += size
        raise IndexError(row)


def _items(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_filled(item: Any) -> bool:
    return bool(item.get("bytes") or item.get("path")) if isinstance(item, Mapping) else bool(item)
