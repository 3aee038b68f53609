"""A question and its episodes, from the first token until the group is trained on. Plain Python, no jax."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence

from tapo_jax.rollout.episode import Conversation
from tapo_jax.types import Episode, Prompt


@dataclasses.dataclass
class Group:
    """The episodes of one question."""

    prompt: Prompt
    seats: list[Conversation | Episode | None]
    """By sample: an episode that has ended, a conversation that is being played, None where none has begun."""
    number: int = 0
    """Number of the question in the run, over all processes."""
    row: int = -1
    """Index in the data set from which the question can be read again."""
    key: int = 0
    """Part of the random keys: different for all groups that are played in one step."""
    begun: int | None = None
    """The step in which its first episode began."""
    calls: dict[int, tuple[concurrent.futures.Future, ...]] = dataclasses.field(default_factory=dict)
    """Sample -> the tool calls that its conversation waits for, if they have been submitted."""

    @property
    def complete(self) -> bool:
        return all(isinstance(seat, Episode) for seat in self.seats)

    @property
    def episodes(self) -> list[Episode]:
        """Return the episodes that have ended, in the order of the samples."""
        return [seat for seat in self.seats if isinstance(seat, Episode)]

    @property
    def conversations(self) -> list[Conversation]:
        """Return the conversations that have not ended."""
        return [seat for seat in self.seats if isinstance(seat, Conversation)]


def make_groups(prompts: Sequence[Prompt], group_size: int, first: int = 0) -> list[Group]:
    """Return groups that have not begun. first: the key of the first one."""
    return [Group(prompt, [None] * group_size, number=first + p, key=first + p) for p, prompt in enumerate(prompts)]
