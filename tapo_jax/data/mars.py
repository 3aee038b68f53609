"""SenseNova-MARS: a manifest, {name: {root, annotation, length, repeat_time, …}}, and JSON lines for each of its sets.

DIR is the folder of the manifests or one manifest. Splits: the name of a set (fvqa_train, hr_mmsearch, …), or a
manifest's name or its prefix (train_qwen3_vl_8b, test_all, train, test): all its sets, each repeated as the manifest
says. Paths may be from the machine where a manifest was written: they are found in DIR by their ends.
"""

import os
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.data.json_files import json_file, json_lines, shown
from tapo_jax.data.paths import data_folder, find_file, find_image
from tapo_jax.data.rows import Row, accepted, lazy, marked, unique_ids
from tapo_jax.tools.recorded_image_search import Recording
from tapo_jax.types import Prompt

_USED = ("id", "prompt", "image", "reward_model", "image_search_title_list", "image_search_thumbnail_list",
         "image_search_summary")  # fmt: skip


def read(directory: str | os.PathLike, split: str = "train") -> list[Prompt]:
    """Return the questions of a split, with `meta["benchmark"]`, the name of their set. Raises UserError."""
    single = Path(directory) if str(directory).endswith(".json") and Path(directory).is_file() else None
    folder = data_folder(single.parent if single else directory)
    files = [folder / single.name] if single else sorted(folder.glob("*.json"))
    manifests = {path: sets for path in files if (sets := _sets(path))}
    prompts = []
    for path, name, entry in _chosen(folder, manifests, split):
        found = _set(folder, path, name, entry)
        repeat = entry.get("repeat_time", 1)
        if type(repeat) not in (int, float) or not 0 < repeat <= 1000:
            raise UserError(f"{path}: the field 'repeat_time' of {name} is {shown(repeat)}; expected a number above 0.")
        count = round(len(found) * repeat)
        prompts += (found * (count // len(found) + 1))[:count]
    return unique_ids(prompts)


def _sets(path: Path) -> dict[str, dict]:
    """Return the sets of a manifest; {} for another JSON file."""
    value = json_file(path)
    entries = value.items() if isinstance(value, dict) else ()
    return {
        name: entry for name, entry in entries if isinstance(entry, dict) and isinstance(entry.get("annotation"), str)
    }


def _chosen(folder: Path, manifests: dict[Path, dict], split: str) -> list[tuple[Path, str, dict]]:
    for path, sets in manifests.items():
        if split in sets:
            return [(path, split, sets[split])]
    exact = [path for path in manifests if path.stem == split]
    fits = exact or [path for path in manifests if path.stem.startswith(f"{split}_")]
    if len(fits) > 1:
        raise UserError(f"The split '{split}' fits {', '.join(path.stem for path in fits)} of {folder}: name one.")
    if not fits:
        names = [path.stem for path in manifests] + [name for sets in manifests.values() for name in sets]
        raise UserError(f"{folder} has no split '{split}': its manifests have {', '.join(names) or 'no sets'}.")
    return [(fits[0], name, entry) for name, entry in manifests[fits[0]].items()]


def _set(folder: Path, path: Path, name: str, entry: dict[str, Any]) -> list[Prompt]:
    file = find_file(folder, entry["annotation"], tails=True)
    if file is None:
        raise UserError(f"{path}: the annotation {shown(entry['annotation'])} of {name} is not in {folder}.")
    rows = [Row(f"{file}, line {number}", values) for number, values in json_lines(file)]
    length = entry.get("length", len(rows))
    if not rows or (isinstance(length, int) and len(rows) < length):
        raise UserError(f"{file} has {len(rows)} rows and {path} says {length}: download it again.")
    root = os.path.relpath(file.parent, folder)
    declared = entry.get("root")
    below = _below(folder, declared) if isinstance(declared, str) else None
    bases = tuple(dict.fromkeys((below or root, root, "")))
    return [_prompt(row, f"{name}_{n}", name, folder, bases) for n, row in enumerate(rows)]


def _below(folder: Path, root: str) -> str | None:
    """Return the longest end of a root that is a folder in the data folder; None if there is none."""
    parts = [part for part in Path(root).parts if part not in ("/", "..")]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if (folder / end).is_dir()), None)


def _prompt(row: Row, otherwise: str, name: str, folder: Path, bases: tuple[str, ...]) -> Prompt:
    messages = row.optional("prompt")
    messages = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    said = {m.get("role"): m.get("content") for m in messages}
    question = said.get("user")
    if not isinstance(question, str) or not question.replace("<image>", "").strip():
        raise row.bad("prompt", 'a list with {"role": "user", "content": the question}')
    images = [find_image(folder, image, row.where, bases) for image in row.texts("image")]
    meta = row.rest(_USED) | {"benchmark": name}
    if isinstance(said.get("system"), str):
        meta["system"] = said["system"]
    recording = _recording(row, folder, bases)
    if recording is not None:
        meta["image_search"] = recording
    return Prompt(
        row.name("id", otherwise),
        marked(row, "prompt", row.encodable("prompt", question), len(images)),
        lazy(images),
        accepted(row, "reward_model.ground_truth", row.texts("reward_model.ground_truth")),
        meta=meta,
    )


def _recording(row: Row, folder: Path, bases: tuple[str, ...]) -> Recording | None:
    titles = row.texts("image_search_title_list")
    thumbnails = row.optional("image_search_thumbnail_list") or []
    if not isinstance(thumbnails, list) or not all(path is None or isinstance(path, str) for path in thumbnails):
        raise row.bad("image_search_thumbnail_list", "a list of paths, or null for a picture that is missing")
    shown = [find_image(folder, path, row.where, bases) if path else None for path in thumbnails]
    summary = row.optional("image_search_summary")
    if not titles and not shown and not summary:
        return None
    if summary is not None and not isinstance(summary, str):
        raise row.bad("image_search_summary", "a text")
    return Recording(tuple(titles), tuple(shown), row.encodable("image_search_summary", summary or ""))
