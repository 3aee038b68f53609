"""HR-MMSearch (sensenova/HR-MMSearch): data/train-*.parquet, 305 questions about 4K pictures. Split: train."""

import os

from tapo_jax.data import parquet
from tapo_jax.data.paths import data_folder
from tapo_jax.data.rows import Row, accepted, lazy, marked, unique_ids
from tapo_jax.types import Prompt


def read(directory: str | os.PathLike, split: str = "train") -> list[Prompt]:
    """Return the questions of the split. Raises UserError."""
    folder = data_folder(directory)
    rows = parquet.rows(folder, split, pictures=("query_image",))
    return unique_ids([_prompt(row, f"{split}_{n}", folder) for n, row in enumerate(rows)])


def _prompt(row: Row, otherwise: str, folder) -> Prompt:
    cell = row.optional("query_image")
    if cell is None or not cell.items:
        raise row.bad("query_image", "a picture with bytes")
    images = cell.stored(folder)
    return Prompt(
        row.name("sample_id", otherwise),
        marked(row, "query", row.text("query"), len(images)),
        lazy(images),
        accepted(row, "ground_truth", row.texts("ground_truth", as_json=True)),
        meta=row.rest(("sample_id", "query", "query_image", "ground_truth")),
    )
