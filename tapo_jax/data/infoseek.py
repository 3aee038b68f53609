"""InfoSeek's own files: JSON lines (infoseek_val.jsonl) and OVEN pictures, found by the stems of their names.

Splits: the rest of a file's name, like val. The answer to a numeric question is right if its number is in a range:
`Prompt.meta["ranges"]` holds [low, high] pairs, which `rewards.in_range` reads.
"""

import functools
import os
from pathlib import Path

from tapo_jax.data.images import StoredImage, bad, stored_file
from tapo_jax.data.json_files import json_lines
from tapo_jax.data.paths import data_folder, split_file
from tapo_jax.data.rows import Row, accepted, lazy, marked, unique_ids
from tapo_jax.types import Prompt

_NAMES = ("infoseek_{split}.jsonl", "{split}.jsonl", "data/infoseek_{split}.jsonl", "infoseek/infoseek_{split}.jsonl")


def read(directory: str | os.PathLike, split: str = "val") -> list[Prompt]:
    """Return the questions of a split. Raises UserError."""
    folder = data_folder(directory)
    path = split_file(folder, split, _NAMES)
    stems = functools.cache(lambda: _stems(folder))
    rows = [Row(f"{path}, line {number}", values) for number, values in json_lines(path)]
    return unique_ids([_prompt(row, f"{split}_{n}", folder, stems) for n, row in enumerate(rows)])


def _prompt(row: Row, otherwise: str, folder: Path, stems) -> Prompt:
    image = row.text("image_id", "the stem of a picture's file name, like oven_04990040")
    texts, ranges = _evaluated(row)
    meta = row.rest(("data_id", "image_id", "question", "answer", "answer_eval"))
    if ranges:
        meta["ranges"] = ranges
    return Prompt(
        row.name("data_id", otherwise),
        marked(row, "question", row.text("question"), 1),
        lazy([_image(image, folder, stems, row.where)]),
        accepted(row, "answer", row.texts("answer") + texts),
        meta=meta,
    )


def _evaluated(row: Row) -> tuple[list[str], list[list[float]]]:
    """Return the texts and the ranges of answer_eval."""
    values = row.optional("answer_eval") or []
    values = values if isinstance(values, list) else [values]
    texts = [row.encodable("answer_eval", value) for value in values if isinstance(value, str)]
    ranges = []
    for value in values:
        if isinstance(value, str):
            continue
        pair = value.get("range") if isinstance(value, dict) else None
        numbers = isinstance(pair, list) and all(type(end) in (int, float) for end in pair)
        if not numbers or len(pair) != 2 or not pair[0] <= pair[1]:
            raise row.bad("answer_eval", 'a list of texts and of {"range": [low, high]}')
        ranges.append([float(end) for end in pair])
    return texts, ranges


def _image(stem: str, folder: Path, stems, where: str) -> StoredImage:
    """Return the picture of a stem; the file is looked up when it is read."""
    label = f"{stem} ({where})"

    def read() -> bytes:
        path = stems().get(stem)
        if path is None:
            raise bad(label, f"no file in {folder} has this stem")
        return stored_file(path).read()

    return StoredImage(label, read)


def _stems(folder: Path) -> dict[str, Path]:
    """Return every picture below the folder by its stem."""
    endings = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links can form a circle
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            stem, ending = os.path.splitext(name)
            if ending.lower() in endings:
                found.setdefault(stem, Path(place, name))
    return found
