"""Hold the groups that are in flight between the steps of a run: those that are carried over, and those to begin.

A step keeps P + carry groups in flight and ends its rollout when P of them are complete: those are trained on, whole,
and the others go on in the next step under its weights. So every batch has P groups, and nothing is dropped. No more
groups are begun than the steps that are left can train on, so the last step ends with none in flight.

Which groups are carried depends on rounds and tokens alone, so a run repeats bit for bit; what is in flight is part of
a checkpoint (`pack`, `unpack`), as ids, log-probabilities and images. Keys and values are saved only in the middle of
a rollout and where they are small; otherwise they are computed anew.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tapo_jax.rollout.groups import Group
from tapo_jax.rollout.packed import pack, unpack
from tapo_jax.rollout.rounds import Counts, Until
from tapo_jax.types import Episode, Prompt

KEYS = 2**31  # random keys are folded from numbers of 31 bits


class Source(Protocol):
    """Where questions come from: `data.pipeline.Prompts`."""

    rows: list[int]
    skipped: int

    def __next__(self) -> Sequence[Prompt]: ...

    def read(self, index: int) -> Prompt: ...


class Flight:
    """The groups of this process that are not trained on yet, oldest first.

    source: the questions; one `next` is a batch of this process.
    local: the places of this process's questions in a batch of all processes.
    batch: P, questions of a batch of all processes.
    group_size: G, episodes of a question.
    carry: groups of this process that may be unfinished when a rollout ends.
    max_staleness: a group is trained on at most this many steps after the one in which it began.
    total: steps of the run.
    """

    def __init__(
        self,
        source: Source,
        *,
        local: Sequence[int],
        batch: int,
        group_size: int,
        carry: int = 0,
        max_staleness: int = 1,
        total: int,
    ) -> None:
        self._source, self._local, self._batch, self._group_size = source, list(local), batch, group_size
        self._carry, self._max_staleness, self._total = carry, max_staleness, total
        self.groups: list[Group] = []
        self.counts = Counts()
        self.skipped = 0
        """Rows that were left out when the questions of this step were read."""
        self.slots: Any = None
        """The sampler's slots of a rollout that was stopped, if they were saved: it goes on with them, bit for bit."""
        self._step = 0  # whose rollout is under way, or was the last one
        self._batches = 0  # that were read

    @property
    def carries(self) -> bool:
        return self._carry > 0

    def begin(self, step: int) -> list[Group]:
        """Return the groups that play in a step, after reading the questions that are missing."""
        if step != self._step:
            self._step, self.skipped, self.counts = step, 0, Counts()
        each = len(self._local)
        wanted = min(each + self._carry, (self._total - step + 1) * each)
        while len(self.groups) < wanted:
            prompts = next(self._source)
            self.skipped += self._source.skipped
            for place, row, prompt in zip(self._local, self._source.rows, prompts, strict=True):
                number = self._batches * self._batch + place
                self.groups.append(Group(prompt, [None] * self._group_size, number=number, row=row))
            self._batches += 1
        playing = self.groups[: max(wanted, sum(group.begun is not None for group in self.groups))]
        for group in playing:
            group.key = (group.number - (step - 1) * self._batch) % KEYS
        return playing

    @property
    def until(self) -> Until:
        """Return when the rollout of the step that has begun may end."""
        return Until(complete=len(self._local), oldest=self._step - self._max_staleness)

    def take(self) -> list[Group]:
        """Remove and return the groups that this step trains on: the oldest that are complete."""
        complete = [group for group in self.groups if group.complete]
        taken = complete[: len(self._local)]
        if len(taken) < len(self._local):
            raise ValueError(f"{len(taken)} of {len(self._local)} groups are complete: the rollout has not ended")
        self.groups = [group for group in self.groups if not any(group is one for one in taken)]
        return taken

    def metrics(self, taken: Sequence[Group], slots: int) -> dict[str, float]:
        """Return the metrics of carrying, for this process.

        taken: the groups that the step trains on.
        slots: slots of this process.
        """
        age = [self._step - episode.policy_T[episode.mask_T] for group in taken for episode in group.episodes]
        count = sum(len(one) for one in age)
        played = self.counts.steps * slots
        return {
            "rollout/staleness": sum(float(one.sum()) for one in age) / count if count else 0.0,
            "rollout/staleness_max": float(max((one.max() for one in age if len(one)), default=0)),
            "rollout/idle": 1 - self.counts.drawn / played if played else 0.0,
            "rollout/recomputed": float(self.counts.recomputed),
            "rollout/carried": float(sum(group.begun is not None for group in self.groups)),
        }

    def page_metrics(self) -> dict[str, float]:
        """Return the metrics of pages that had run out, for this process."""
        return {
            "rollout/evicted": float(self.counts.evicted),
            "rollout/evicted_tokens": float(self.counts.evicted_tokens),
        }

    def unscored(self) -> list[Episode]:
        """Return the episodes that have ended and have no rewards yet."""
        return [episode for group in self.groups for episode in group.episodes if not episode.rewards]

    # What a checkpoint keeps.

    def pack(self) -> bytes:
        """Return everything of this process that is in flight."""
        about = {"step": self._step, "batches": self._batches, "skipped": self.skipped, "counts": vars(self.counts)}
        return pack(self.groups, about)

    def unpack(self, data: bytes, reopen: Callable[..., Any]) -> None:
        """Go on with what `pack` returned. reopen: see `packed.unpack`. Raises ValueError for anything else."""
        self.groups, about = unpack(data, self._source.read, reopen)
        self._step, self._batches, self.skipped = about["step"], about["batches"], about["skipped"]
        self.counts = Counts(**about["counts"])
        if any(len(group.seats) != self._group_size for group in self.groups):
            raise ValueError("its groups have another size than rollout.group_size")

    def skip_to(self, step: int) -> None:
        """Go on after `step` steps that kept nothing in flight."""
        self._batches = step
