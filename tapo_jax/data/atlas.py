"""Atlas, the embedded world, as a data set. Splits: train, held_out."""

import os
from collections.abc import Sequence

from tapo_jax.atlas.dataset import SPLITS, Atlas, prepare
from tapo_jax.atlas.play import Settings
from tapo_jax.config import UserError
from tapo_jax.data.images import StoredImage
from tapo_jax.types import Images, Prompt

SIZES = (2048, 512)


def read(
    directory: str | os.PathLike,
    split: str = "train",
    *,
    settings: Settings | None = None,
    seed: int = 0,
    sizes: tuple[int, int] = SIZES,
) -> Sequence[Prompt]:
    """Return the questions of a split, made in `directory` if they do not exist yet. Raises UserError."""
    if split not in SPLITS:
        raise UserError(f"The split '{split}' does not exist: Atlas has {', '.join(SPLITS)}.")
    return AtlasPrompts(prepare(directory, settings=settings or Settings(), seed=seed, sizes=sizes), split)


class AtlasPrompts(Sequence):
    """One split as prompts, with random access."""

    def __init__(self, builder: Atlas, split: str):
        self._source = builder.encoded(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._source[int(index)]
        name = _text(row["id"])
        return Prompt(
            id=name,
            question=_text(row["question"]),
            images=Images([StoredImage(name, lambda: row["image"])]),
            answers=tuple(_text(answer) for answer in row["answers"]),
            hops=int(row["hops"]),
            meta={"chain": [_text(name) for name in row["chain"]], "attribute": _text(row["attribute"])},
        )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
