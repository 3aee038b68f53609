"""SimpleVQA (m-a-p/SimpleVQA): test-*.parquet with pictures as base64 text.

Splits: test (2,025 questions), test_en (1,013 in English, which tables use), test_cn.
"""

import os

from tapo_jax.config import UserError
from tapo_jax.data import parquet
from tapo_jax.data.paths import data_folder
from tapo_jax.data.rows import Row, accepted, lazy, marked, unique_ids
from tapo_jax.types import Prompt

LANGUAGES = {"_en": "EN", "_cn": "CN"}


def read(directory: str | os.PathLike, split: str = "test_en") -> list[Prompt]:
    """Return the questions of a split. Raises UserError."""
    folder = data_folder(directory)
    language = LANGUAGES.get(split[-3:])
    rows = parquet.rows(folder, split[:-3] if language else split, pictures=("image",))
    if language:
        rows = [row for row in rows if row.text("language", "EN or CN") == language]
        if not rows:
            raise UserError(f"{folder} has no question with language {language}.")
    return unique_ids([_prompt(row, f"{split}_{n}", folder) for n, row in enumerate(rows)])


def _prompt(row: Row, otherwise: str, folder) -> Prompt:
    cell = row.optional("image")
    if cell is None or not cell.items:
        raise row.bad("image", "a picture as base64 text")
    images = cell.stored(folder)
    return Prompt(
        row.name("data_id", otherwise),
        marked(row, "question", row.text("question"), len(images)),
        lazy(images),
        accepted(row, "answer", row.texts("answer", as_json=True)),
        meta=row.rest(("data_id", "question", "image", "answer")),
    )
