"""Define how a simulated policy is trained: one frozen object of settings, and the advantage of every token.

The arithmetic is the trainer's: `learn.advantages`, `learn.gigpo`, `tapo` and `learn.losses`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tapo_jax import tapo
from tapo_jax.lab.episodes import Batch
from tapo_jax.learn import advantages, gigpo, losses
from tapo_jax.tapo import controls

CONTROLS = ("none", "shuffled", "zero_tools", "gigpo")
OPTIMIZERS = ("sgd", "adam")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """Base algorithm, credit transfer and optimiser. Numbers may be arrays that `jax.vmap` maps over.

    Raises ValueError for an unknown name and for sizes that do not divide.
    """

    rate: Any = 0.2
    """The learning rate."""
    beta: Any = 0.8
    """TAPO's share of a witness's credit."""
    theta: Any = 0.7
    """The least similarity to a witness."""
    alpha_min: Any = 0.25
    """The least similarity × support."""
    clip_low: Any = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Any = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    tapo: bool = dataclasses.field(default=True, metadata={"static": True})
    """False: only the base algorithm (beta 0 gives the same advantages, at the cost of computing them)."""
    algorithm: str = dataclasses.field(default="grpo", metadata={"static": True})
    """The loss: a name of `learn.losses`."""
    aggregation: str | None = dataclasses.field(default=None, metadata={"static": True})
    """Aggregation of the loss; None: the algorithm's own."""
    support: bool = dataclasses.field(default=True, metadata={"static": True})
    clip: bool = dataclasses.field(default=True, metadata={"static": True})
    """TAPO's own clip: a corrected advantage is never positive."""
    control: str = dataclasses.field(default="none", metadata={"static": True})
    """What TAPO has to beat: "shuffled", "zero_tools" or "gigpo"."""
    optimizer: str = dataclasses.field(default="sgd", metadata={"static": True})
    """"sgd" or "adam" (0.9, 0.95, as in training)."""
    group: int = dataclasses.field(default=8, metadata={"static": True})
    """G, the rollouts of a question."""
    rollouts: int = dataclasses.field(default=64, metadata={"static": True})
    """P·G, the rollouts of a batch."""
    updates_per_batch: int = dataclasses.field(default=1, metadata={"static": True})
    """Mini-batches that a batch is split into, each for one update."""

    def __post_init__(self) -> None:
        if self.control not in CONTROLS or self.optimizer not in OPTIMIZERS:
            known = ", ".join([*CONTROLS, *OPTIMIZERS])
            raise ValueError(f"control {self.control!r}, optimizer {self.optimizer!r}; known: {known}")
        if self.rollouts % self.group or self.rollouts % self.updates_per_batch:
            raise ValueError(f"{self.rollouts} rollouts: not a multiple of group and updates_per_batch")

    @property
    def prompts(self) -> int:
        """Return P, the number of questions of a batch."""
        return self.rollouts // self.group


class Credit(NamedTuple):
    """The advantages of a batch."""

    advantage_BxT: jax.Array
    """Advantage of every token."""
    corrected_PxS: jax.Array
    """Whether TAPO corrected the step slot."""


def assign_credit(method: Method, batch: Batch, key: jax.Array) -> Credit:
    """Return the advantage of every token of a batch. key: random key of the control "shuffled"."""
    reward_PxG = batch.success_PxG.astype(jnp.float32)
    advantage_PxG = advantages.group_advantages(reward_PxG)
    untouched_PxS = jnp.zeros_like(batch.valid_PxS)
    if method.control == "gigpo":
        valid_PxV = batch.anchor_PxV != 0
        return_PxV = gigpo.step_returns(reward_PxG, valid_PxV)
        turn_PxV = gigpo.step_advantages(return_PxV, batch.anchor_PxV, valid_PxV, advantage_PxG)
        return Credit(tapo.token_advantages(advantage_PxG, turn_PxV, batch.turn_BxT), untouched_PxS)
    if not method.tapo:
        return Credit(jnp.repeat(advantage_PxG.reshape(-1, 1), batch.mask_BxT.shape[1], axis=1), untouched_PxS)
    sim_PxSxS = batch.sim_PxSxS
    if method.control == "shuffled":
        failing_PxS = controls.failing_steps(batch.trajectory_PxS, batch.valid_PxS, batch.success_PxG)
        sim_PxSxS = controls.shuffle_rows(jax.random.split(key, method.prompts), sim_PxSxS, failing_PxS)
    transfer = transfer_credit(method, batch, sim_PxSxS, advantage_PxG)
    if method.control == "zero_tools":
        transfer = controls.zero_tools(transfer, batch, batch.success_PxG)
    advantage_BxT = tapo.token_advantages(advantage_PxG, transfer.advantage_PxS, batch.step_BxT)
    return Credit(advantage_BxT, transfer.corrected_PxS)


def transfer_credit(
    method: Method, batch: Batch, sim_PxSxS: jax.Array, advantage_PxG: jax.Array
) -> tapo.CreditTransfer:
    """Transfer credit within a batch with the project's kernel."""
    settings = tapo.Settings(method.theta, method.alpha_min, method.beta, support=method.support, clip=method.clip)
    return tapo.transfer_from_similarity(
        sim_PxSxS, batch.trajectory_PxS, batch.valid_PxS, batch.success_PxG, advantage_PxG, settings
    )


def policy_loss(
    method: Method, logp_BxT: jax.Array, old_logp_BxT: jax.Array, advantage_BxT: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
    """Return the loss of these rows, from the project's function."""
    settings = losses.Settings(method.algorithm, method.clip_low, method.clip_high, aggregation=method.aggregation)
    return losses.policy_loss(logp_BxT, old_logp_BxT, advantage_BxT, mask_BxT, settings)[0]
