"""Find the files that rows name, only inside the data folder. Links in the folder are followed."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tapo_jax.config import UserError
from tapo_jax.data.images import StoredImage, bad, stored_file
from tapo_jax.data.json_files import shown


def data_folder(directory: str | os.PathLike) -> Path:
    """Return the folder as an absolute path. Raises UserError if it does not exist."""
    if not str(directory):
        raise UserError("data.dir is empty: give the folder of the data set.")
    folder = Path(os.path.abspath(directory))
    if not folder.is_dir():
        raise UserError(f"The data folder {folder} does not exist: give the folder of the data set.")
    return folder


def inside(folder: Path, name: str) -> Path | None:
    """Return the path of a name, or None if it is outside the folder.

    Links are not resolved: the owner of the folder may have put one there, and a row cannot.
    """
    path = Path(os.path.normpath(folder / name))
    for root in (folder, folder.resolve()):
        if path.is_relative_to(root):
            return folder / path.relative_to(root)
    return None


def find_file(folder: Path, name: str, bases: Sequence[str] = ("",), *, tails: bool = False) -> Path | None:
    """Return the first file of this name below one of the bases, or None.

    tails: absolute names may be from the machine where they were written ("/data/mars/images/1.jpg" finds
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
    """Return the image of a published row. A missing one raises BadImage when it is read."""
    path = find_file(folder, name, bases, tails=True)
    if path is not None:
        return stored_file(path)
    label = f"{shown(name)} ({where})"

    def read() -> bytes:
        raise bad(label, f"there is no such file in {folder}")

    return StoredImage(label, read)


def split_file(folder: Path, split: str, names: Sequence[str]) -> Path:
    """Return the first of the names, with {split} filled in, that exists. Raises UserError if none does."""
    if not split or "/" in split or split.startswith("."):
        raise UserError(f"The split is '{split}': give the name of a split, like train.")
    for name in names:
        path = folder / name.format(split=split)
        if path.is_file():
            return path
    looked = ", ".join(name.format(split=split) for name in names)
    raise UserError(f"{folder} has no split '{split}': looked for {looked}.")
