"""The passages of a text search, as Search-R1 has them: {"contents": "Title\\ntext"} a line."""

import re
from pathlib import Path

from tapo_jax.config import UserError
from tapo_jax.data.json_files import json_lines
from tapo_jax.data.rows import Row


def read_corpus(path: str) -> list[str]:
    """The passages of a JSON-lines file. Raises UserError naming the line that has none, or for a corpus of no word."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--corpus is '{path}', which is no file: give JSON lines with a field \"contents\".")
    passages = []
    for number, values in json_lines(file):
        row = Row(f"{path}, line {number}", values)
        contents = row.optional("contents")
        if not isinstance(contents, str):
            raise row.bad("contents", "a text, title first")
        passages.append(row.encodable("contents", contents))
    if not any(re.search(r"\w", passage) for passage in passages):
        raise UserError(f"{path} has no passage with a word in it: nothing could be found.")
    return passages
