"""Your own questions: a folder with one JSON-lines file per split, and the images next to it.

    DIR/train.jsonl     {"id": "1", "question": "…", "images": ["images/1.jpg"], "answers": ["…", "…"], "hops": 1}

"id", "hops" and "images" may be left out. "image_search" may hold a recorded search: {"titles": ["…"], "thumbnails":
["images/2.jpg", null], "summary": "…"}. All other fields are kept in `Prompt.meta`. Images are read on access.
"""

import difflib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tapo_jax import rewards
from tapo_jax.config import UserError
from tapo_jax.data.images import stored_file
from tapo_jax.data.json_files import json_lines, shown
from tapo_jax.data.paths import data_folder, find_file, split_file
from tapo_jax.data.recordings import recording
from tapo_jax.data.rows import Row, lazy, marked
from tapo_jax.types import Prompt

FIELDS = ("id", "question", "images", "answers", "hops", "image_search")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class JsonlPrompts(Sequence):
    """One split of a folder, with random access. Raises UserError that names the line and the field that do not fit."""

    def __init__(self, directory: str | os.PathLike, split: str):
        folder = data_folder(directory)
        path = split_file(folder, split, ("{split}.jsonl",))
        self._prompts = []
        line_of: dict[str, int] = {}
        for number, values in json_lines(path):
            prompt = _prompt(Row(f"{path}, line {number}", values), number, folder)
            if line_of.setdefault(prompt.id, number) != number:
                raise UserError(
                    f"{path}, line {number}: the id {shown(prompt.id)} is that of line {line_of[prompt.id]}: give each "
                    "question its own (without an id it is the line's number)."
                )
            self._prompts.append(prompt)
        if not self._prompts:
            raise UserError(f"{path} has no questions: write one JSON object a line, with question and answers.")

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]


def _prompt(row: Row, number: int, folder: Path) -> Prompt:
    _refuse_misspelt(row)
    images = []
    for name in row.optional("images") if isinstance(row.optional("images"), list) else _no_list(row):
        path = find_file(folder, name)
        if path is None:
            raise row.bad("images", f"paths of files inside {folder}, and {shown(name)} is none")
        images.append(stored_file(path))
    meta = row.rest(FIELDS)
    found = row.optional("image_search")
    if found is not None:
        meta["image_search"] = recording(Row(f"{row.where}, image_search", _object(row, found)), folder)
    return Prompt(
        row.name("id", str(number)),
        marked(row, "question", row.text("question"), len(images)),
        lazy(images),
        _answers(row),
        _hops(row),
        meta,
    )


def _no_list(row: Row) -> list:
    """Return [] for a row whose images are left out or null. Raises UserError if they are anything else."""
    if row.optional("images") is not None:
        raise row.bad("images", 'a list of paths, like ["images/1.jpg"]')
    return []


def _object(row: Row, value: Any) -> dict:
    if not isinstance(value, dict):
        raise row.bad("image_search", 'an object with "titles", "thumbnails" and "summary"')
    return value


def _answers(row: Row) -> tuple[str, ...]:
    answers = row.optional("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise row.bad("answers", 'a list of at least one text, like ["Paris"]')
    for answer in answers:
        row.encodable("answers", answer)
        if not rewards.exact_match(answer, (answer,)):
            raise row.bad("answers", f"texts that an answer can match, and {shown(answer)} is empty to the reward")
    return tuple(dict.fromkeys(answers))


def _hops(row: Row) -> int:
    hops = row.optional("hops")
    if hops is None:
        return 1
    if type(hops) is not int or hops < 1:
        raise row.bad("hops", "a whole number of at least 1")
    return hops


def _refuse_misspelt(row: Row) -> None:
    """Raise UserError if a field looks like a misspelt one that the row lacks: it would be ignored silently."""
    lacking = tuple(name for name in FIELDS if name not in row.values and name not in ("id", "image_search"))
    for name, value in row.values.items():
        if name in FIELDS:
            continue
        meant = _alike(name, lacking)
        names = value if isinstance(value, list) else [value]
        pictures = any(isinstance(text, str) and text.lower().endswith(_PICTURES) for text in names)
        if not meant and pictures and "images" in lacking:
            meant = ["images"]
        if meant:
            raise UserError(
                f"{row.where}: there is a field '{name}' and no '{meant[0]}': is that what it means? (With "
                f"'{meant[0]}' in the row, '{name}' is kept beside it as a field of your own.)"
            )


@functools.cache
def _alike(name: str, lacking: tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(name.casefold(), lacking, n=1, cutoff=0.8)
