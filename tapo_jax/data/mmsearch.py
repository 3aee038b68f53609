"""MMSearch (CaraJ/MMSearch), its end-to-end task: end2end.parquet.

Splits: end2end (300 questions, 171 of them with a picture) and end2end_image (those 171, the multimodal set that tables
use). `image_search_result`, a picture of the results of a search for the question's picture, is replayed by the
recorded image search.
"""

import os

from tapo_jax.data import parquet
from tapo_jax.data.paths import data_folder
from tapo_jax.data.rows import Row, accepted, lazy, marked, unique_ids
from tapo_jax.tools.recorded_image_search import Recording
from tapo_jax.types import Prompt

_USED = ("sample_id", "query", "query_image", "image_search_result", "gt_answer", "alternative_gt_answers")


def read(directory: str | os.PathLike, split: str = "end2end_image") -> list[Prompt]:
    """Return the questions of a split. Raises UserError."""
    folder = data_folder(directory)
    rows = parquet.rows(folder, split.removesuffix("_image"), pictures=("query_image", "image_search_result"))
    prompts = [_prompt(row, f"{split}_{n}", folder) for n, row in enumerate(rows)]
    if split.endswith("_image"):
        prompts = [prompt for prompt in prompts if len(prompt.images)]
    return unique_ids(prompts)


def _prompt(row: Row, otherwise: str, folder) -> Prompt:
    image, found = (
        row.values[name].stored(folder) if name in row.values else [] for name in ("query_image", "image_search_result")
    )
    answers = row.texts("gt_answer") + row.texts("alternative_gt_answers", as_json=True)
    meta = row.rest(_USED)
    if found:
        meta["image_search"] = Recording(thumbnails=tuple(found))
    return Prompt(
        row.name("sample_id", otherwise),
        marked(row, "query", row.text("query"), len(image)),
        lazy(image),
        accepted(row, "gt_answer", answers),
        meta=meta,
    )
