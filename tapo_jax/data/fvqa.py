"""FVQA (lmms-lab/FVQA) and the InfoSeek subset published with it.

Files: fvqa_train.parquet, fvqa_test.parquet, mmsearch_r1_infoseek_sub_2k.parquet. Splits: train, test, or the rest of a
file's name (infoseek_sub_2k).
"""

import os

from tapo_jax.data import parquet
from tapo_jax.data.paths import data_folder
from tapo_jax.data.rows import Row, accepted, lazy, marked, unique_ids
from tapo_jax.types import Prompt


def read(directory: str | os.PathLike, split: str = "train") -> list[Prompt]:
    """Return the questions of a split. Accepted are ground_truth and candidate_answers. Raises UserError."""
    folder = data_folder(directory)
    rows = parquet.rows(folder, split, pictures=("images",))
    return unique_ids([_prompt(row, f"{split}_{n}", folder) for n, row in enumerate(rows)])


def _prompt(row: Row, otherwise: str, folder) -> Prompt:
    messages = row.optional("prompt")
    said = [m for m in messages or [] if isinstance(m, dict) and m.get("role") == "user"] if messages else []
    question = said[-1].get("content") if said else None
    if not isinstance(question, str) or not question.strip():
        raise row.bad("prompt", 'a list with {"role": "user", "content": the question}')
    cell = row.optional("images")
    if cell is None or not cell.items:
        raise row.bad("images", "a list of pictures, each with bytes")
    images = cell.stored(folder)
    answers = row.texts("reward_model.ground_truth") + row.texts("reward_model.candidate_answers", as_json=True)
    return Prompt(
        row.name("data_id", otherwise),
        marked(row, "prompt", row.encodable("prompt", question), len(images)),
        lazy(images),
        accepted(row, "reward_model.ground_truth", answers),
        meta=row.rest(("prompt", "images", "reward_model", "data_id")),
    )
