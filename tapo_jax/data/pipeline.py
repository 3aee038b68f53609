"""Prompts for every step, in an order that the seed fixes, with a position that a checkpoint keeps.

The order is a grain pipeline over indices; a process then reads only its own prompts of the step. A question whose
image cannot be shown is replaced by the next row of the data set that can be shown. This depends only on the rows:
processes need not communicate about it, the order continues unchanged, and a resumed run does the same.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from tapo_jax.config import BadImage, UserError
from tapo_jax.data.images import bad, check_shape
from tapo_jax.types import BadPrompt, Prompt

MOST_IN_A_ROW = 100  # unshowable rows, after which the data set itself must be wrong


class Prompts:
    """An endless iterator: `next` returns this process's prompts of the next step, with decoded images.

    Every epoch has a different order. The attribute `skipped` counts the rows that could not be shown in the last
    `next` of this process; each is named once on stderr. `rows` has the index of each prompt that `next` returned, for
    `read`.

    source: random access to all prompts of a split.
    prompts_per_step: over all processes.
    local: which of 0..prompts_per_step-1 this process takes.
    seed: fixes the order.

    Raises UserError if the source is empty.
    """

    def __init__(self, source: Sequence[Prompt], *, prompts_per_step: int, local: Sequence[int], seed: int) -> None:
        if len(source) == 0:
            raise UserError("The training split has no prompts: choose another data.split or data.dir.")
        self._source, self._local = source, local
        self.skipped = 0
        self.rows: list[int] = []
        self._named: set[int] = set()
        endless = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        order = endless.batch(prompts_per_step, drop_remainder=True)  # else the length of batches of 1 overflows
        self._order = iter(order.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))

    def __next__(self) -> list[Prompt]:
        index_P = next(self._order)
        self.skipped = 0
        self.rows = [int(index_P[p]) for p in self._local]
        return [self.read(row) for row in self.rows]

    def read(self, index: int) -> Prompt:
        """Return the prompt of a row, or of the first row after it that can be shown."""
        for tried in range(min(MOST_IN_A_ROW, len(self._source))):
            at = (index + tried) % len(self._source)
            try:
                return decoded(self._source[at])
            except BadImage as error:
                self.skipped += 1
                last = error
                if at not in self._named:
                    self._named.add(at)
                    _say(f"skipped question {at}: {error}")
            except BadPrompt as error:
                raise UserError(f"Row {at} of the questions: {error}.") from error
        raise UserError(f"None of {tried + 1} questions in a row can be shown. The last one: {last}") from last

    def get_state(self) -> dict[str, Any]:
        """Return the state: JSON-serialisable, the same in every process."""
        return self._order.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._order.set_state(state)


def showable(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that can be shown, for evaluation; the others are named on stderr.

    Decodes every image once and keeps none. The result is the same in every process.
    """
    kept = []
    for prompt in prompts:
        try:
            decoded(prompt)
        except BadImage as error:
            _say(f"left out question '{prompt.id}': {error}")
        else:
            kept.append(prompt)
    return kept


def _say(text: str) -> None:
    """Print a line, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def decoded(prompt: Prompt) -> Prompt:
    """Return the prompt with its images as arrays. Raises BadImage if the policy cannot be shown one."""
    if not isinstance(prompt, Prompt):
        raise BadPrompt(f"there is a {type(prompt).__name__} and no Prompt")
    images = tuple(prompt.images)
    for number, image in enumerate(images):
        name = f"{number} of question '{prompt.id}'"
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise bad(name, f"it is {kind}, and uint8 [H, W, 3] is needed")
        check_shape(*image.shape[:2], name)
    try:
        prompt.question.encode()
    except UnicodeEncodeError as error:
        raise BadImage(f"The question '{prompt.id}' has half of a surrogate pair, which is no character.") from error
    return dataclasses.replace(prompt, images=images)
