"""MAT-Search (laolao77/MAT): MAT-Benchmark/MAT-Search.json, 75 simple questions and then 75 hard ones.

Splits: test (all), simple (the first half), hard (the second half).
"""

import os

from tapo_jax.config import UserError
from tapo_jax.data.json_files import json_file
from tapo_jax.data.paths import data_folder, find_image, split_file
from tapo_jax.data.rows import Row, accepted, lazy, marked, rows_of, unique_ids
from tapo_jax.types import Prompt

SPLITS = ("test", "simple", "hard")
_NAMES = ("MAT-Search.json", "MAT-Benchmark/MAT-Search.json")
_BASES = ("MAT-Benchmark/MAT-Search-image", "MAT-Search-image", "MAT-Benchmark", "")


def read(directory: str | os.PathLike, split: str = "test") -> list[Prompt]:
    """Return the questions of a split. Each has `meta["half"]`, simple or hard. Raises UserError."""
    if split not in SPLITS:
        raise UserError(f"The split '{split}' does not exist: MAT-Search has {', '.join(SPLITS)}.")
    folder = data_folder(directory)
    path = split_file(folder, split, _NAMES)
    values = json_file(path)
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: expected a list of questions.")
    half = (len(values) + 1) // 2
    prompts = unique_ids([_prompt(row, n, n < half, folder) for n, row in enumerate(rows_of(path, values))])
    return {"test": prompts, "simple": prompts[:half], "hard": prompts[half:]}[split]


def _prompt(row: Row, number: int, simple: bool, folder) -> Prompt:
    image = row.text("image_path", "the path of a picture")
    return Prompt(
        row.name("id", str(number)),
        marked(row, "question", row.text("question"), 1),
        lazy([find_image(folder, image, row.where, _BASES)]),
        accepted(row, "answer", row.texts("answer")),
        meta=row.rest(("id", "question", "image_path", "answer")) | {"half": "simple" if simple else "hard"},
    )
