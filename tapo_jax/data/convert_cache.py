"""Convert published caches of recorded image searches to JSON lines and image files (`recordings.py` reads them).

MMSearch-R1's pickle: {data_id: {"tool_returned_web_title_list": [text], "tool_returned_images_urls": [URL or picture]}}
DeepEyesV2's JSON:    {data_id: {"tool_returned_web_title": [text], "cached_images_path": [path or null]}}
"""

import collections
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tapo_jax.config import BadImage, UserError
from tapo_jax.data import unpickle
from tapo_jax.data.images import decode, opened, stored_file, to_rgb
from tapo_jax.data.json_files import json_file, shown
from tapo_jax.data.paths import find_file
from tapo_jax.data.recordings import FILE
from tapo_jax.records import write_whole

_TITLES = ("tool_returned_web_title_list", "tool_returned_web_title")
_PICTURES = ("tool_returned_images_urls", "cached_images_path")


def convert(source: Path, out: Path) -> collections.Counter:
    """Write OUT/image_search.jsonl and OUT/thumbnails/.

    Returns counts of questions, titles, thumbnails, and of what was skipped: "addresses" (nothing is downloaded),
    "unreadable" pictures, "odd" entries.

    Raises UserError if the file is not such a cache; a pickle that asks for anything but plain values is refused.
    """
    if not source.is_file():
        raise UserError(f"{source} does not exist: give a .pkl or .json file of recorded image searches.")
    value = json_file(source) if source.suffix == ".json" else unpickle.load(source)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{source} holds {shown(type(value).__name__)}; expected a dict of question ids.")
    counts: collections.Counter = collections.Counter()
    (out / "thumbnails").mkdir(parents=True, exist_ok=True)
    temporary = out / f"{FILE}.tmp"
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for name, entry in tqdm(value.items(), desc="questions", unit="", dynamic_ncols=True):
            row = _row(name, entry, source.parent, out, counts)
            if row is not None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not counts["questions"]:
        temporary.unlink()
        raise UserError(f"{source} has no entry with {' or '.join(_TITLES)}: it is no cache of image searches.")
    os.replace(temporary, out / FILE)
    return counts


def _row(name: Any, entry: Any, folder: Path, out: Path, counts: collections.Counter) -> dict[str, Any] | None:
    """Return one line, or None for an entry of another form."""
    fits = isinstance(name, (str, int)) and isinstance(entry, dict) and any(field in entry for field in _TITLES)
    titles, pictures = (_first(entry, fields) for fields in (_TITLES, _PICTURES)) if fits else ((), ())
    if not fits or not isinstance(titles, list) or not isinstance(pictures, list) or not _encodable(str(name)):
        counts["odd"] += 1
        return None
    kept = [title if isinstance(title, str) and _encodable(title) else "" for title in titles]
    files = [_thumbnail(picture, folder, out, counts) for picture in pictures]
    counts.update(questions=1, titles=len(kept), thumbnails=sum(file is not None for file in files))
    return {"id": str(name), "titles": kept, "thumbnails": files, "summary": ""}


def _first(entry: dict, fields: tuple[str, ...]) -> Any:
    return next((entry[field] for field in fields if entry.get(field) is not None), [])


def _thumbnail(value: Any, folder: Path, out: Path, counts: collections.Counter) -> str | None:
    """Return the file's name in OUT, None if there is no picture to keep."""
    if value is None:
        return None
    if isinstance(value, str) and "://" in value[:12]:
        counts["addresses"] += 1
        return None
    try:
        data, ending = _encoded(value, folder)
    except (BadImage, ValueError, OSError):
        counts["unreadable"] += 1
        return None
    # Named by its content: no text of the cache becomes a path.
    name = f"thumbnails/{hashlib.blake2b(data, digest_size=12).hexdigest()}.{ending}"
    path = out / name
    if not path.exists():
        write_whole(path, data)
    return name


def _encoded(value: Any, folder: Path) -> tuple[bytes, str]:
    """Return a picture's bytes and its format's file ending. Raises BadImage or ValueError."""
    if isinstance(value, str):
        path = find_file(folder, value, tails=True)
        if path is None:
            raise ValueError("no such file")
        value = stored_file(path).data()
    if isinstance(value, bytes):
        decode(value, "thumbnail")
        return value, opened(value, "thumbnail").format.lower()
    image = unpickle.picture(value)
    if image is None:
        raise ValueError("no picture")
    data = io.BytesIO()
    to_rgb(image).save(data, format="PNG")
    return data.getvalue(), "png"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
