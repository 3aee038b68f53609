"""How a batch of episodes ended, as arrays: rewards, successes, encoded calls, witnesses from earlier steps."""

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
    """How one batch ended. The steps are those of G + M rollouts of each prompt; the last M are remembered ones.

    reward_PxG: float32, total rewards.
    success_PxG: bool.
    steps: the calls. M successful rollouts that the same question had in earlier steps follow those of the batch.
    anchor_PxV: int32, a hash of what had last been seen before each of the at most V / G turns of the G rollouts, 0
        where there is no turn; None where nobody asks.
    remembered_success_PxM: bool, False where there is no remembered rollout.
    remembered_advantage_PxM: the advantage that it had then.
    remembered_weight_PxM: what is left of its weight.
    judged_PxG: bool, False where nobody could say whether the answer is right; None where all of them are judged.
    """

    reward_PxG: Any
    success_PxG: Any
    steps: Steps
    anchor_PxV: Any
    remembered_success_PxM: Any
    remembered_advantage_PxM: Any
    remembered_weight_PxM: Any
    judged_PxG: Any = None


class CallEncoder:
    """Encodes batches and keeps the memory of witnesses.

    steps: K, tool steps of a rollout at most.
    slots: `tapo.parameter_slots` of the tools.
    features: F of a hashed text, or the length of embed's vectors.
    embed: text -> vector; None: hashed words and trigrams.
    memory: how long successful rollouts stay witnesses.
    anchor_turns: turns of a rollout whose states are hashed, for GiGPO; 0: none.
    may_fail: whether a judgement may fail; False: the program gets no judged_PxG.
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
        """M, the remembered rollouts of every group."""
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
        """JSON-able; the same in every process."""
        return self._memory

    def set_state(self, state: tapo_memory.Memory) -> None:
        self._memory = state

    def _anchors(self, groups: Sequence[Sequence[Episode]]) -> np.ndarray:
        """Return int32 [P, G · turns]."""
        rows = [[anchor for e in group for anchor in turn_anchors(e, self._anchor_turns)] for group in groups]
        return np.array(rows, np.int32)

    def _calls(self, groups: Sequence[Sequence[Episode]]) -> list:
        return [
            [[(turn.call.name, turn.call.parameters) for turn in tool_steps(episode, self._steps)] for episode in group]
            for group in groups
        ]


def turn_anchors(episode: Episode, turns: int) -> list[int]:
    """Hash what was last seen before each turn: at first the question, then the newest tool response."""
    anchors, seen = [], "question"
    for turn in episode.turns:
        anchors.append(name_hash(seen))
        if turn.result is not None:
            seen = repr((turn.result.text, [(image.root, image.box) for image in turn.result.images]))
    return (anchors + [0] * turns)[:turns]
