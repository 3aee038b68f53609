"""Prompts for every step, in an order that the seed fixes, with a position that a checkpoint keeps.

The order is a grain pipeline over indices; a process then reads only its own prompts of the step.
"""

from collections.abc import Sequence
from typing import Any

import grain

from tapo_jax.config import UserError
from tapo_jax.types import Prompt


class Prompts:
    """An endless iterator: `next` gives this process's prompts of the next step.

    source: random access to all prompts of a split. prompts_per_step: of all processes. local: which of
    0..prompts_per_step-1 this process takes. Every epoch has another order. Raises UserError for an empty source.
    """

    def __init__(self, source: Sequence[Prompt], *, prompts_per_step: int, local: Sequence[int], seed: int) -> None:
        if len(source) == 0:
            raise UserError("The training split has no prompts: choose another data.split or data.dir.")
        self._source, self._local = source, local
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(prompts_per_step)
        self._order = iter(order.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))

    def __next__(self) -> list[Prompt]:
        index_P = next(self._order)
        return [self._source[int(index_P[p])] for p in self._local]

    def get_state(self) -> dict[str, Any]:
        """JSON-able; the same in every process."""
        return self._order.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._order.set_state(state)
