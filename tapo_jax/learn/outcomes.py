"""Outcomes of a batch of episodes as arrays: rewards, successes, encoded calls, witnesses from earlier steps."""

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
class EncodedBatch:
    """Outcomes of one batch: G rollouts of each prompt, and M successful ones of earlier steps of the run."""

    reward_PxG: Any
    """float32, total rewards."""
    success_PxG: Any
    """bool."""
    steps: Steps
    """The calls of the G rollouts of each prompt, followed by those of the M remembered ones."""
    anchor_PxV: Any
    """int32, a hash of the last observation before each turn, V / G turns for a rollout; 0 means no turn.

    None if GiGPO is not used."""
    remembered_success_PxM: Any
    """bool, False where a prompt has fewer remembered rollouts."""
    remembered_advantage_PxM: Any
    """The advantage that the remembered rollout had in its own batch."""
    remembered_weight_PxM: Any
    """Its weight after decay."""
    judged_PxG: Any = None
    """bool, False where nobody could say whether the answer is right; None if all of them are judged."""


class CallEncoder:
    """Encoder of batches, with the memory of witnesses.

    steps: K, max tool steps of a rollout.
    slots: `tapo.parameter_slots` of the tools.
    features: F of a hashed text, or the length of embed's vectors.
    embed: maps a text to a vector; None hashes words and trigrams.
    memory: how long successful rollouts stay witnesses.
    anchor_turns: turns of a rollout whose states are hashed, for GiGPO; 0 hashes none.
    may_fail: whether a judgement may fail; False gives the program no judged_PxG.
    """

    def __init__(
        self,
        *,
        steps: int,
        slots: Mapping[str, int],
        features: int,
        embed: Callable[[str], np.ndarray] | None = None,
        memory: tapo_memory.Settings = tapo_memory.Settings(),
        anchor_turns: int = 0,
        may_fail: bool = False,
    ) -> None:
        self._steps, self._slots, self._features, self._embed = steps, dict(slots), features, embed
        self._settings, self._anchor_turns, self._may_fail = memory, anchor_turns, may_fail
        self._memory: tapo_memory.Memory = {}

    @property
    def remembered(self) -> int:
        """Return M, the number of remembered rollouts of every group."""
        return self._settings.rollouts

    def encode(self, groups: Sequence[Sequence[Episode]], step: int) -> EncodedBatch:
        """Encode the episodes of each of this process's prompts.

        Raises ValueError for a reward that is not finite.
        """
        ids = [group[0].prompt.id for group in groups]
        calls, success_PxM, advantage_PxM, weight_PxM = tapo_memory.recall(
            self._memory, step, ids, self._calls(groups), self._settings
        )
        judged_PxG = np.array([[episode.judged for episode in group] for group in groups])
        reward_PxG = np.array([[e.reward if e.judged else 0.0 for e in group] for group in groups], np.float32)
        advantages.check_rewards(reward_PxG)
        if not (self._may_fail or judged_PxG.all()):
            raise ValueError("an episode is not judged: give CallEncoder may_fail=True")
        steps = tapo.encode_steps(calls, steps=self._steps, features=self._features, embed=self._embed, **self._slots)
        return EncodedBatch(
            reward_PxG=reward_PxG,
            success_PxG=np.array([[episode.success for episode in group] for group in groups]),
            steps=steps,
            anchor_PxV=self._anchors(groups) if self._anchor_turns else None,
            remembered_success_PxM=success_PxM,
            remembered_advantage_PxM=advantage_PxM,
            remembered_weight_PxM=weight_PxM,
            judged_PxG=judged_PxG if self._may_fail else None,
        )

    def remember(self, groups: Sequence[Sequence[Episode]], step: int, advantage_PxG: np.ndarray) -> None:
        """Keep the successful rollouts of all processes and forget the old ones. Every process must call this."""
        if not self.remembered:
            return
        ids = [group[0].prompt.id for group in groups]
        success = np.array([[episode.success for episode in group] for group in groups])
        new = tapo_memory.remember({}, step, ids, self._calls(groups), success, advantage_PxG, self._settings)
        kept = tapo_memory.remember(self._memory, step, [], [], success, advantage_PxG, self._settings)
        for fresh in processes.gather(new):
            kept |= {name: [*kept.get(name, []), *entries][-self.remembered :] for name, entries in fresh.items()}
        self._memory = kept

    def get_state(self) -> tapo_memory.Memory:
        """Return the memory as JSON-able values, the same in every process."""
        return self._memory

    def set_state(self, state: tapo_memory.Memory) -> None:
        self._memory = state

    def _anchors(self, groups: Sequence[Sequence[Episode]]) -> np.ndarray:
        """Return the anchors of all turns, int32 [P, G · turns]."""
        rows = [[anchor for e in group for anchor in turn_anchors(e, self._anchor_turns)] for group in groups]
        return np.array(rows, np.int32)

    def _calls(self, groups: Sequence[Sequence[Episode]]) -> list:
        return [
            [[(turn.call.name, turn.call.parameters) for turn in tool_steps(episode, self._steps)] for episode in group]
            for group in groups
        ]


def turn_anchors(episode: Episode, turns: int) -> list[int]:
    """Hash the last observation before each turn: the question at first, then the newest tool responses."""
    anchors, seen, results = [], "question", []
    for turn in episode.turns:
        if not turn.continues:
            anchors.append(name_hash(seen))
            results = []
        if turn.result is not None:
            results.append((turn.result.text, [(image.root, image.box) for image in turn.result.images]))
            seen = repr(results if len(results) > 1 else results[0])
    return (anchors + [0] * turns)[:turns]
