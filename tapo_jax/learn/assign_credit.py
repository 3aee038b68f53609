"""Turn rewards and tool calls into the advantage of every token, for the whole batch, on the device.

This is where TAPO runs in training: the step between rollout and update. The mathematics is in `advantages.py`,
`gigpo.py` and `tapo_jax.tapo`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tapo_jax import sharding, tapo
from tapo_jax.batch import TrainBatch
from tapo_jax.learn import advantages, gigpo
from tapo_jax.learn.gigpo import Settings as GigpoSettings
from tapo_jax.learn.outcomes import EncodedBatch
from tapo_jax.tapo import CreditTransfer, adaptive, memory
from tapo_jax.tapo import Settings as TapoSettings
from tapo_jax.tapo.adaptive import AdaptiveTheta
from tapo_jax.tapo.adaptive import Settings as AdaptiveSettings


@dataclasses.dataclass(frozen=True)
class Settings:
    """How advantages are computed. Raises ValueError for an unknown name."""

    max_length: int
    """Max tokens of a conversation."""
    credit: str = "tapo"
    """How the tokens of a trajectory share its credit, a name of `CREDIT`."""
    estimator: str = "grpo"
    """The base algorithm's advantage (`advantages.ESTIMATORS`)."""
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal leave the loss: their mask becomes False."""
    overlong_buffer: int = 0
    """Tokens before max_length in which a penalty grows to 1."""
    tapo: TapoSettings = tapo.PUBLISHED
    adaptive: AdaptiveSettings | None = None
    """How TAPO's thresholds follow the data; None keeps them fixed."""
    gigpo: GigpoSettings = GigpoSettings()

    def __post_init__(self) -> None:
        if self.credit not in CREDIT:
            raise ValueError(f"algorithm.credit is {self.credit!r}; known: {', '.join(CREDIT)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Credit:
    """The credit of every trajectory and step."""

    advantage_PxG: jax.Array
    """The base algorithm's advantage of every trajectory."""
    transfer: CreditTransfer
    """What TAPO decided. Without TAPO it has the similarities under the published settings, and corrects nothing."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The inputs of the functions of `CREDIT`."""

    batch: TrainBatch
    encoded: EncodedBatch
    reward_PxG: jax.Array
    advantage_PxG: jax.Array
    transfer: CreditTransfer


def trajectory_credit(evidence: Evidence, settings: Settings) -> jax.Array:
    """Give every token the advantage of its trajectory (GRPO, RLOO, …)."""
    B, T = evidence.batch.mask_BxT.shape
    return jnp.broadcast_to(evidence.advantage_PxG.reshape(B, 1), (B, T))


def tapo_credit(evidence: Evidence, settings: Settings) -> jax.Array:
    """Give the tokens of a tool step the advantage that TAPO leaves it."""
    step_BxT = evidence.batch.step_BxT
    return tapo.token_advantages(evidence.advantage_PxG, evidence.transfer.advantage_PxS, step_BxT)


def gigpo_credit(evidence: Evidence, settings: Settings) -> jax.Array:
    """Give the tokens of a turn GiGPO's advantage of that turn (arXiv 2505.10978)."""
    turn_PxV = gigpo.turn_advantages(
        evidence.encoded.anchor_PxV, evidence.reward_PxG, evidence.advantage_PxG, settings.gigpo
    )
    return tapo.token_advantages(evidence.advantage_PxG, turn_PxV, gigpo.turns(evidence.batch.mask_BxT))


CREDIT: dict[str, Callable[[Evidence, Settings], jax.Array]] = {
    "trajectory": trajectory_credit,
    "tapo": tapo_credit,
    "gigpo": gigpo_credit,
}
WITHOUT_EFFECT = dataclasses.replace(tapo.PUBLISHED, beta=0.0)


def make_assign_credit(mesh: Mesh, settings: Settings) -> Callable:
    """Return the jitted function that assigns credit.

    It maps (batch, encoded, thresholds, seed_step_2) to (advantage_BxT, mask_BxT, Credit, thresholds, metrics).
    thresholds are TAPO's if they adapt, else None; seed_step_2 is int32 (seed, step), from which the shuffling control
    draws. TAPO's diagnostics are among the metrics whichever credit is chosen, with the published settings if it is
    not TAPO's.
    """

    def assign_credit(
        batch: TrainBatch, encoded: EncodedBatch, thresholds: AdaptiveTheta | None, seed_step_2: jax.Array
    ) -> tuple:
        P, G = encoded.reward_PxG.shape
        judged_PxG = encoded.judged_PxG
        encoded = without_unjudged(encoded)
        length_B = (batch.inputs.segment_BxT > 0).sum(axis=1)
        penalty_PxG = advantages.overlong_penalty(length_B, settings.max_length, settings.overlong_buffer)
        penalty_PxG = penalty_PxG.reshape(P, G)
        reward_PxG = encoded.reward_PxG + penalty_PxG
        advantage_PxG = advantages.group_advantages(reward_PxG, settings.estimator, valid_PxG=judged_PxG)
        key = jax.random.fold_in(jax.random.key(seed_step_2[0]), seed_step_2[1])
        transfer, thresholds, metrics = transferred(encoded, advantage_PxG, thresholds, key, settings)
        evidence = Evidence(batch, encoded, reward_PxG, advantage_PxG, transfer)
        advantage_BxT = CREDIT[settings.credit](evidence, settings)
        if settings.credit != "tapo":
            transfer = dataclasses.replace(transfer, corrected_PxS=jnp.zeros_like(transfer.corrected_PxS))
        signal_P = advantages.has_signal(reward_PxG, judged_PxG)
        mask_BxT = batch.mask_BxT
        if judged_PxG is not None:
            mask_BxT &= judged_PxG.reshape(P * G, 1)
        if settings.dynamic_sampling:
            mask_BxT &= jnp.repeat(signal_P, G, total_repeat_length=P * G)[:, None]
        metrics |= {
            "reward/mean": _mean(reward_PxG, judged_PxG),
            "reward/accuracy": _mean(encoded.success_PxG, judged_PxG),
            "reward/overlong": _mean(penalty_PxG, judged_PxG),
            "advantage/groups_with_signal": signal_P.mean(dtype=jnp.float32),
            "advantage/magnitude": _mean(jnp.abs(advantage_PxG), judged_PxG),
        }
        return jnp.where(mask_BxT, advantage_BxT, 0), mask_BxT, Credit(advantage_PxG, transfer), thresholds, metrics

    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
    return jax.jit(assign_credit, out_shardings=(rows, rows, everywhere, everywhere, everywhere))


def without_unjudged(encoded: EncodedBatch) -> EncodedBatch:
    """Take the trajectories that nobody could judge out of what TAPO and GiGPO compare.

    They are no successes and their steps are invalid, so they are neither witnesses nor failures.
    """
    judged_PxG = encoded.judged_PxG
    if judged_PxG is None:
        return encoded

    own_PxM = jnp.ones_like(encoded.remembered_success_PxM)  # what is remembered was a success
    steps_PxS = _each(jnp.concatenate([judged_PxG, own_PxM], axis=1), encoded.steps.valid_PxS)
    anchor_PxV = encoded.anchor_PxV
    return dataclasses.replace(
        encoded,
        success_PxG=encoded.success_PxG & judged_PxG,
        steps=dataclasses.replace(encoded.steps, valid_PxS=encoded.steps.valid_PxS & steps_PxS),
        anchor_PxV=None if anchor_PxV is None else jnp.where(_each(judged_PxG, anchor_PxV), anchor_PxV, 0),
    )


def _each(flag_PxG: jax.Array, slot_PxS: jax.Array) -> jax.Array:
    """Return the flag of the trajectory of every slot."""
    return jnp.repeat(flag_PxG, slot_PxS.shape[1] // flag_PxG.shape[1], axis=1)


def _mean(x_PxG: jax.Array, judged_PxG: jax.Array | None) -> jax.Array:
    """Return the float32 mean over the judged trajectories; not a number where there is none."""
    if judged_PxG is None:
        return x_PxG.mean(dtype=jnp.float32)
    return jnp.where(judged_PxG, x_PxG, 0).sum(dtype=jnp.float32) / judged_PxG.sum(dtype=jnp.float32)


def transferred(
    encoded: EncodedBatch,
    advantage_PxG: jax.Array,
    thresholds: AdaptiveTheta | None,
    key: jax.Array,
    settings: Settings,
) -> tuple[CreditTransfer, AdaptiveTheta | None, dict[str, jax.Array]]:
    """Return (what TAPO decided about the G rollouts, thresholds for the next batch, diagnostics).

    Remembered rollouts join as further members of their group; thresholds are used before they are updated.
    """
    numbers = settings.tapo if settings.credit == "tapo" else WITHOUT_EFFECT
    steps, G = encoded.steps, advantage_PxG.shape[1]
    success_PxH = jnp.concatenate([encoded.success_PxG, encoded.remembered_success_PxM], axis=1)
    advantage_PxH = jnp.concatenate([advantage_PxG, encoded.remembered_advantage_PxM], axis=1)
    weight_PxH = jnp.concatenate([jnp.ones_like(advantage_PxG), encoded.remembered_weight_PxM], axis=1)
    theta_PxS = None if thresholds is None else adaptive.thresholds(thresholds, steps, numbers.theta)
    result = tapo.transfer(
        steps, success_PxH, advantage_PxH, numbers, key=key, theta_PxS=theta_PxS, weight_PxG=weight_PxH
    )
    own = G * steps.valid_PxS.shape[1] // success_PxH.shape[1]
    result = memory.drop_remembered(result, own)
    trajectory_PxS, valid_PxS = steps.trajectory_PxS[:, :own], steps.valid_PxS[:, :own]
    metrics = tapo.diagnostics(
        result, trajectory_PxS, valid_PxS, encoded.success_PxG, advantage_PxG, judged_PxG=encoded.judged_PxG
    )
    if thresholds is not None:
        sim_PxSxS = tapo.pairwise_similarity(steps, numbers.text)
        thresholds = adaptive.update(thresholds, steps, sim_PxSxS, success_PxH, settings.adaptive)
        metrics |= {f"tapo/theta/{name}": thresholds.theta_N[n] for n, name in enumerate(settings.adaptive.tools)}
    return result, thresholds, metrics
