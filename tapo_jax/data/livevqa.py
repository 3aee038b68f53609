"""LiveVQA (ONE-Lab/LiveVQA-Research-Preview): qa.json, at the top or under data/samples/qa, and pictures in image/.

Split: test.
"""

import os

from tapo_jax.config import UserError
from tapo_jax.data.json_files import json_file
from tapo_jax.data.paths import data_folder, find_image, split_file
from tapo_jax.data.rows import Row, accepted, lazy, marked, rows_of, unique_ids
from tapo_jax.types import Prompt

_NAMES = ("qa.json", "data/samples/qa/qa.json", "samples/qa/qa.json")
_BASES = ("", "image", "data/samples", "data/samples/image", "samples", "samples/image")


def read(directory: str | os.PathLike, split: str = "test") -> list[Prompt]:
    """Return the questions. Raises UserError."""
    if split != "test":
        raise UserError(f"The split '{split}' does not exist: LiveVQA has test.")
    folder = data_folder(directory)
    path = split_file(folder, split, _NAMES)
    values = json_file(path)
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: expected a list of questions.")
    return unique_ids([_prompt(row, f"{split}_{n}", folder) for n, row in enumerate(rows_of(path, values))])


def _prompt(row: Row, otherwise: str, folder) -> Prompt:
    image = row.text("query_image", "the path of a picture")
    return Prompt(
        row.name("sample_id", otherwise),
        marked(row, "query", row.text("query"), 1),
        lazy([find_image(folder, image, row.where, _BASES)]),
        accepted(row, "gt_answer", row.texts("gt_answer")),
        meta=row.rest(("sample_id", "query", "query_image", "gt_answer")),
    )
