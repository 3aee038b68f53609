"""Read the passages of a text search in Search-R1's format.

Each row has "contents" ("Title\\ntext"), or "title" and "text".
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from tapo_jax.config import UserError
from tapo_jax.data.json_files import json_lines
from tapo_jax.data.rows import Row
from tapo_jax.tools import passage_index

FIELDS = ("contents", "title", "text")


def read_corpus(path: str) -> Iterator[str]:
    """Read the passages of a .jsonl, .jsonl.gz or .parquet file, one after the other.

    Raises UserError if a row has none (it is named), or the corpus has no word.
    """
    file = _file(path)
    wordless = True
    for row in _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file):
        passage = _passage(row)
        wordless = wordless and not re.search(r"\w", passage)
        yield passage
    if wordless:
        raise UserError(f"{path} has no passage with a word in it: nothing could be found.")


def open_index(path: str, folder: str) -> passage_index.PassageIndex:
    """Load the index of a corpus from a folder; build it and save it there if the folder is new or empty.

    folder: "" keeps the index only in memory. Raises UserError if it holds the index of another corpus.
    """
    if not folder:
        return passage_index.build(read_corpus(path))
    where, made_of = Path(folder), fingerprint(path)
    if where.exists() and (not where.is_dir() or any(where.iterdir())):
        return passage_index.load(where, made_of)
    passage_index.save(passage_index.build(read_corpus(path)), where, made_of)
    return passage_index.load(where, made_of)


def fingerprint(path: str) -> str:
    """Hash the bytes of a corpus: about a second per gigabyte, which is faster than reading the passages."""
    with open(_file(path), "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _file(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--corpus is '{path}', which is no file: give JSON lines with a field \"contents\".")
    return file


def _passage(row: Row) -> str:
    contents = row.optional("contents")
    if contents is None and "title" in row.values and isinstance(row.optional("text"), str):
        title = row.optional("title")
        if title is not None and not isinstance(title, str):
            raise row.bad("title", "a text")
        return row.encodable("text", f"{title}\n{row.optional('text')}" if title else row.optional("text"))
    if not isinstance(contents, str):
        raise row.bad("contents", "a text, title first (or fields title and text)")
    return row.encodable("contents", contents)


def _json_rows(file: Path) -> Iterator[Row]:
    for number, values in json_lines(file):
        yield Row(f"{file}, line {number}", values)


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        import pyarrow.parquet  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise UserError(f"{file} needs pyarrow: pip install 'tapo_jax[parquet]'.") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            columns = [name for name in FIELDS if name in opened.schema_arrow.names]
            number = 0
            for batch in opened.iter_batches(batch_size=4096, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from error
