"""Recorded image searches of a data set: one JSON line per question, and the thumbnails next to the file.

    DIR/image_search_SPLIT/image_search.jsonl     {"id": "…", "titles": ["…"], "thumbnails": ["ab12.png", null],
                                                   "summary": ""}

`python -m tapo_jax.data convert-cache` writes this from the published caches. A folder `image_search` without a split
serves all of them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tapo_jax.data.images import stored_file
from tapo_jax.data.json_files import json_lines, shown
from tapo_jax.data.paths import find_file
from tapo_jax.data.rows import Row
from tapo_jax.tools.recorded_image_search import Recording
from tapo_jax.types import Prompt

FILE = "image_search.jsonl"


def recording(row: Row, folder: Path) -> Recording:
    """Return the search that a row holds. Raises UserError."""
    titles = row.texts("titles")
    thumbnails = row.optional("thumbnails") or []
    if not isinstance(thumbnails, list):
        raise row.bad("thumbnails", "a list of paths, or null for a picture that is missing")
    pictures = []
    for name in thumbnails:
        path = None if name is None else find_file(folder, name)
        if name is not None and path is None:
            raise row.bad("thumbnails", f"paths of files inside {folder}, and {shown(name)} is none")
        pictures.append(None if path is None else stored_file(path))
    summary = row.optional("summary")
    if summary is not None and not isinstance(summary, str):
        raise row.bad("summary", "a text")
    return Recording(tuple(titles), tuple(pictures), row.encodable("summary", summary or ""))


def with_recordings(prompts: Sequence[Prompt], folder: Path, split: str) -> Sequence[Prompt]:
    """Return the prompts, each with the search recorded for its id; unchanged if the folder has no recordings.

    Raises UserError if there are recordings, but none for any of the prompts.
    """
    files = [folder / name / FILE for name in (f"image_search_{split}", "image_search")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return prompts
    found = {}
    for number, values in json_lines(file):
        row = Row(f"{file}, line {number}", values)
        found[row.text("id")] = recording(row, file.parent)
    made = [
        dataclasses.replace(prompt, meta=prompt.meta | {"image_search": found[prompt.id]})
        if prompt.id in found
        else prompt
        for prompt in prompts
    ]
    if not any("image_search" in prompt.meta for prompt in made):
        raise Row(f"{file}, line 1", {"id": next(iter(found), None)}).bad("id", f"ids of the split '{split}'")
    return made
