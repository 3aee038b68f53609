"""Files that rows name, looked for inside of the data folder alone. Links that lie in the folder are followed."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tapo_jax.config import UserError
from tapo_jax.data.images import StoredImage, bad, stored_file
from tapo_jax.data.json_files import shown


def data_folder(directory: str | os.PathLike) -> Path:
    """The folder as an absolute path. Raises UserError where there is none."""
    if not str(directory):
        raise UserError("data.dir is empty: give the folder of the data set.")
    folder = Path(os.path.abspath(directory))
    if not folder.is_dir():
        raise UserError(f"The data folder {folder} does not exist: give the folder of the data set.")
    return folder


def inside(folder: Path, name: str) -> Path | None:
    """The path that a name means, or None where it leads out of the folder. Links are not looked at: whoever owns the
    folder may have placed one, and a row cannot."""
    path = Path(os.path.normpath(folder / name))
    for root in (folder, folder.resolve()):
        if path.is_relative_to(root):
            return folder / path.relative_to(root)
    return None


def find_file(folder: Path, name: str, bases: Sequence[str] = ("",), *, tails: bool = False) -> Path | None:
    """The first file of this name below one of the bases, or None.

    tails: absolute names may be those of the machine where they were written ("/data/mars/images/1.jpg" finds
    images/1.jpg).
    """
    if not isinstance(name, str) or not name or "\0" in name or "://" in name[:12]:
        return None
    names = [name]
    if tails and name.startswith("/"):
        parts = PurePosixPath(name).parts[1:]
        names += ["/".join(parts[start:]) for start in range(len(parts))]
    for base in bases:
        for one in names:
            for form in dict.fromkeys((one, unicodedata.normalize("NFC", one), unicodedata.normalize("NFD", one))):
                path = inside(folder, os.path.join(base, form))
                if path is not None and os.path.isfile(path):
                    return path
    return None


def find_image(folder: Path, name: str, where: str, bases: Sequence[str] = ("",)) -> StoredImage:
    """The image of a published row. One that is not there cannot be shown, and says so when it is looked at."""
    path = find_file(folder, name, bases, tails=True)
    if path is not None:
        return stored_file(path)
    label = f"{shown(name)} ({where})"

    def read() -> bytes:
        raise bad(label, f"there is no such file in {folder}")

    return StoredImage(label, read)


def split_file(folder: Path, split: str, names: Sequence[str]) -> Path:
    """The first of the names, with {split} filled in, that exists. Raises UserError."""
    if not split or "/" in split or split.startswith("."):
        raise UserError(f"The split is '{split}': give the name of a split, like train.")
    for name in names:
        path = folder / name.format(split=split)
        if path.is_file():
            return path
    looked = ", ".join(name.format(split=split) for name in names)
    raise UserError(f"{folder} has no split '{split}': looked for {looked}.")
