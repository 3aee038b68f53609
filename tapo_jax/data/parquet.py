"""Read Parquet files row by row: small columns are read at once, those with pictures are copied once (`spool.py`).

Needs pyarrow (the extra [parquet]). A picture is `struct{bytes, path}`, bytes, base64 text or a list of these, in any
of Arrow's types for them (large_string, binary_view, …).
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.data.images import StoredImage, bad, stored_file
from tapo_jax.data.json_files import shown
from tapo_jax.data.paths import find_file
from tapo_jax.data.rows import Row
from tapo_jax.data.spool import Item, Spool, spool

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A row's cell in a column of pictures."""

    name: str
    """Like "FILE, row 3, images"."""
    column: Spool
    items: list[Item]
    """Those that are not empty."""

    def stored(self, folder: Path) -> list[StoredImage]:
        """Return the images of the cell, unread. folder: where paths are looked up if the cell holds paths."""
        names = [f"{self.name}[{n}]" if len(self.items) > 1 else self.name for n in range(len(self.items))]
        return [
            StoredImage(name, lambda name=name, item=item: self._data(name, item, folder))
            for name, item in zip(names, self.items, strict=True)
        ]

    def _data(self, name: str, item: Item, folder: Path) -> bytes:
        if "bad" in item:
            raise bad(name, item["bad"])
        if "at" in item:
            return self.column.read(item)
        file = find_file(folder, item["path"], tails=True)
        if file is None:
            raise bad(name, f"there is no file {shown(item['path'])} in {folder}")
        return stored_file(file).data()


def rows(folder: Path, split: str, pictures: Sequence[str]) -> list[Row]:
    """Return all rows of a split's shards, in order. The columns `pictures` hold `Pictures`, all others their values.

    Raises UserError if the split or a shard is missing, or a file is not Parquet.
    """
    found = [row for path in shards(folder, split) for row in _rows_of_file(path, pictures)]
    if not found:
        raise UserError(f"{folder} has no rows in its split '{split}'.")
    return found


def shards(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, in the folder or its `data`.

    For train: train.parquet, NAME_train.parquet, or train-00000-of-00002.parquet and the other shards. Raises UserError
    if there is none, if one is missing, or if several files fit.
    """
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
    file = _open(path)
    import pyarrow as pa  # noqa: PLC0415 - an extra

    try:
        schema, count = file.schema_arrow, file.metadata.num_rows
        small = [field.name for field in schema if field.name not in pictures and not _holds_bytes(field.type)]
        values = file.read(columns=small).to_pylist() if small else [{} for _ in range(count)]
        columns = {name: spool(path, name, _cells(file, name), count) for name in pictures if name in schema.names}
        pa.default_memory_pool().release_unused()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:  # text that is not UTF-8 is a ValueError
        raise UserError(f"{path} cannot be read ({str(error).strip().splitlines()[0][:200]}).") from error
    if {len(values), *(len(column.rows) for column in columns.values())} != {count}:
        raise UserError(f"{path} is damaged: its columns have different numbers of rows; download it again.")
    for number, row in enumerate(values):
        where = f"{path}, row {number + 1}"
        cells = {name: Pictures(f"{where}, {name}", column, column.rows[number]) for name, column in columns.items()}
        yield Row(where, row | cells)


def _cells(file: Any, column: str) -> Iterator[Any]:
    """Yield the values of a column, a few rows in memory at a time if the file's pages allow it."""
    for group in range(file.metadata.num_row_groups):
        for batch in file.iter_batches(4, row_groups=[group], columns=[column]):
            yield from batch.column(0).to_pylist()


def _holds_bytes(kind: Any) -> bool:
    """Return whether a column's type contains bytes at any level."""
    import pyarrow as pa  # noqa: PLC0415 - an extra

    views = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    if any(check(kind) for check in views):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _open(path: Path) -> Any:
    """Open the file, to be read in pieces. Raises UserError without pyarrow or if it is not a Parquet file."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError(f"{path} is a Parquet file, which needs pyarrow: pip install 'tapo_jax[parquet]'.") from error
    with open(path, "rb") as file:
        head = file.read(24)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of git-lfs and not the file: run git lfs pull.")
    if not head.startswith(b"PAR1"):
        raise UserError(f"{path} is no Parquet file: download it again.")
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).strip().splitlines()[0][:200]}).") from error
