"""How a batch of episodes ended, as arrays: rewards, successes, encoded calls, and witnesses remembered from earlier
steps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tapo_jax import processes, tapo
from tapo_jax.learn import advantages
from tapo_jax.learn.batches import tool_steps
from tapo_jax.tapo import Steps, name_hash
from tapo_jax.tapo import memory as tapo_memory
from tapo_jax.types import Episode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """One batch. reward_PxG: float32, total rewards. success_PxG: bool. anchor_PxV: int32, a hash of what had last been
    seen before each of the at most V / G turns of the G rollouts (0 where there is no turn). steps: the calls of G + M
    rollouts of each prompt; the last M are successful rollouts that the same question had in earlier steps (M may be
    0): remembered_success_PxM is False where there is none, remembered_advantage_PxM what they had then,
    remembered_weight_PxM what is left of their weight."""

    reward_PxG: Any
    success_PxG: Any
    steps: Steps
    anchor_PxV: Any
    remembered_success_PxM: Any
    remembered_advantage_PxM: Any
    remembered_weight_PxM: Any


class Outcomes:
    """Encodes batches and keeps the memory of witnesses.

    steps, turns: of a rollout at most, tool steps (K) and turns. features: of a hashed text. slots:
    `tapo.parameter_slots` of the tools.
    embed: text to vector, None: hashed words. memory_steps: how long a witness is remembered, 0: not at all;
    memory_size: M, rollouts of one question that are; discount: of their weight for each step of age.
    """

    def __init__(
        self,
        *,
        steps: int,
        turns: int,
        features: int,
        slots: Mapping[str, int],
        embed: Callable | None = None,
        memory_steps: int = 0,
        memory_size: int = 0,
        discount: float = 1.0,
    ) -> None:
        self._steps, self._turns = steps, turns
        self._features, self._slots, self._embed = features, dict(slots), embed
        self._memory_steps, self._discount = memory_steps, discount
        self.remembered = memory_size if memory_steps else 0  # M
        self._memory: tapo_memory.Memory = {}

    def encode(self, groups: Sequence[Sequence[Episode]], step: int) -> Outcome:
        """groups: the episodes of each of this process's prompts. Raises ValueError for a reward that is not finite."""
        calls = self._calls(groups)
        ids = [group[0].prompt.id for group in groups]
        size = {"steps": self._memory_steps, "size": self.remembered, "discount": self._discount}
        calls, success_PxM, advantage_PxM, weight_PxM = tapo_memory.recall(self._memory, step, ids, calls, **size)
        reward_PxG = np.array([[episode.reward for episode in group] for group in groups], np.float32)
        advantages.check_rewards(reward_PxG)
        return Outcome(
            reward_PxG=reward_PxG,
            success_PxG=np.array([[episode.success for episode in group] for group in groups]),
            steps=tapo.encode_steps(
                calls, steps=self._steps, features=self._features, embed=self._embed, **self._slots
            ),
            anchor_PxV=np.array([[anchor for e in group for anchor in self._anchors(e)] for group in groups], np.int32),
            remembered_success_PxM=success_PxM,
            remembered_advantage_PxM=advantage_PxM,
            remembered_weight_PxM=weight_PxM,
        )

    def remember(self, groups: Sequence[Sequence[Episode]], step: int, advantage_PxG: np.ndarray) -> None:
        """Keeps the successful rollouts of all processes and forgets the old ones. Every process must call this."""
        if not self.remembered:
            return
        size = {"steps": self._memory_steps, "size": self.remembered}
        ids = [group[0].prompt.id for group in groups]
        success = np.array([[episode.success for episode in group] for group in groups])
        new = tapo_memory.remember({}, step, ids, self._calls(groups), success, advantage_PxG, **size)
        memory = tapo_memory.remember(self._memory, step, [], [], success, advantage_PxG, **size)
        for fresh in processes.gather(new):
            memory |= {name: [*memory.get(name, []), *entries][-self.remembered :] for name, entries in fresh.items()}
        self._memory = memory

    def get_state(self) -> tapo_memory.Memory:
        """JSON-able; the same in every process."""
        return self._memory

    def set_state(self, state: tapo_memory.Memory) -> None:
        self._memory = state

    def _anchors(self, episode: Episode) -> list[int]:
        """For each of the `turns` turns the hash of what was last seen before it: at first the question, then the
        newest tool response."""
        anchors, seen = [], "question"
        for turn in episode.turns:
            anchors.append(name_hash(seen))
            if turn.result is not None:
                seen = repr((turn.result.text, [(image.root, image.box) for image in turn.result.images]))
        return (anchors + [0] * self._turns)[: self._turns]

    def _calls(self, groups: Sequence[Sequence[Episode]]) -> list:
        return [
            [[(turn.call.name, turn.call.parameters) for turn in tool_steps(episode, self._steps)] for episode in group]
            for group in groups
        ]
