"""Read the questions of a split of a data set, by the data set's name."""

import os
from collections.abc import Callable, Sequence

from tapo_jax.config import UserError, check_choice
from tapo_jax.data import atlas, fvqa, hr_mmsearch, infoseek, jsonl, livevqa, mars, mat_search, mmsearch, simplevqa
from tapo_jax.data.paths import data_folder
from tapo_jax.data.recordings import with_recordings
from tapo_jax.types import Prompt

READERS: dict[str, Callable[[str | os.PathLike, str], Sequence[Prompt]]] = {
    "atlas": atlas.read,
    "jsonl": jsonl.JsonlPrompts,
    "fvqa": fvqa.read,
    "mars": mars.read,
    "mmsearch": mmsearch.read,
    "hr_mmsearch": hr_mmsearch.read,
    "infoseek": infoseek.read,
    "simplevqa": simplevqa.read,
    "livevqa": livevqa.read,
    "mat_search": mat_search.read,
}
# The split that published tables use.
BENCHMARK_SPLIT = {
    "fvqa": "test",
    "mmsearch": "end2end_image",
    "hr_mmsearch": "train",
    "infoseek": "val",
    "simplevqa": "test_en",
    "livevqa": "test",
    "mat_search": "test",
}


def read(name: str, directory: str | os.PathLike, split: str) -> Sequence[Prompt]:
    """Return the questions of a split, with random access. Images are decoded on access.

    Raises UserError if the name, the folder or the split does not exist, or a row does not fit.
    """
    check_choice("The data set", name, tuple(READERS))
    try:
        prompts = READERS[name](directory, split)
        if name == "atlas" or os.path.isfile(directory):
            return prompts
        return with_recordings(prompts, data_folder(directory), split)
    except OSError as error:
        raise UserError(f"The data set {name} in {directory} cannot be read ({error}).") from error
