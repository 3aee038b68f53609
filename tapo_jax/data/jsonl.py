"""Your own questions: a folder with one JSON-lines file a split and the images beside it.

    DIR/train.jsonl     {"id": "1", "question": "…", "images": ["images/1.jpg"], "answers": ["…", "…"], "hops": 1}

"id", "hops" and "images" may be left out. Images are read when a question is drawn.
"""

import json
import pathlib
from collections.abc import Sequence

from tapo_jax.atlas.dataset import decode_image
from tapo_jax.config import UserError
from tapo_jax.types import Prompt


class JsonlPrompts(Sequence):
    """One split of a folder, with random access. Raises UserError naming the line that does not fit."""

    def __init__(self, folder: str, split: str):
        self._folder = pathlib.Path(folder).resolve()
        path = self._folder / f"{split}.jsonl"
        if not path.is_file():
            raise UserError(
                f"data.dir has no file {path}: write one JSON object a line, with question, images and answers."
            )
        self._rows = [
            self._row(path, number, line) for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        ]
        if not self._rows:
            raise UserError(f"{path} has no questions.")

    def _row(self, path: pathlib.Path, number: int, line: str) -> dict:
        try:
            row = json.loads(line)
            fits = (
                isinstance(row["question"], str)
                and row["answers"]
                and all(isinstance(text, str) for text in row["answers"])
            )
            images = [(self._folder / name).resolve() for name in row.get("images", [])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: expected an object with question, images and answers.") from error
        if not fits:
            raise UserError(
                f"{path}, line {number}: question must be a string and answers a list of at least one string."
            )
        for image in images:
            if not image.is_relative_to(self._folder) or not image.is_file():
                raise UserError(f"{path}, line {number}: the image {image} does not exist in the folder.")
        return {**row, "id": str(row.get("id", number)), "images": images}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._rows[index]
        images = tuple(decode_image(image.read_bytes()) for image in row["images"])
        return Prompt(row["id"], row["question"], images, tuple(row["answers"]), int(row.get("hops", 1)))
