"""From rewards and tool calls to the advantage of every token, for the whole batch, on the device: the step between
rollout and update. The mathematics is in `advantages.py` and `tapo_jax.tapo`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tapo_jax import sharding, tapo
from tapo_jax.batch import TrainBatch
from tapo_jax.learn import advantages
from tapo_jax.learn import gigpo as gigpo_lib
from tapo_jax.learn.outcomes import Outcome
from tapo_jax.tapo import CreditTransfer, memory
from tapo_jax.tapo import adaptive as tapo_adaptive
from tapo_jax.tapo.adaptive import AdaptiveTheta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Credit:
    """What every trajectory and step got. advantage_PxG: of the base algorithm; transfer: where TAPO is off it says
    what resembles what (with the published settings), and nothing is corrected."""

    advantage_PxG: jax.Array
    transfer: CreditTransfer


def make_prepare(
    mesh: Mesh,
    *,
    estimator: str,
    dynamic_sampling: bool,
    overlong_buffer: int,
    max_length: int,
    transfer: dict[str, Any] | None,
    adaptive: dict[str, Any] | None = None,
    gigpo: dict[str, float] | None = None,
) -> Callable:
    """jitted (batch, outcome, thresholds, seed_step_2) -> (advantage_BxT, mask_BxT, Credit, thresholds, metrics).

    transfer: the settings of `tapo.transfer_credit`, None: TAPO off (its diagnostics are logged all the same, with the
    published settings and without effect). dynamic_sampling: groups whose rewards are all equal leave the loss (their
    mask becomes False). overlong_buffer: tokens before max_length in which a penalty grows to 1.
    adaptive: None, or tools, quantile and rate of thresholds that adapt (`tapo.adaptive`); thresholds is None without.
    gigpo: None, or discount and omega of the comparator `gigpo`: its advantages of turns are used then, and
    Credit says what TAPO would have seen.
    seed_step_2: int32, what the control that shuffles draws from.
    """

    def prepare(batch: TrainBatch, outcome: Outcome, thresholds: AdaptiveTheta | None, seed_step_2: jax.Array) -> tuple:
        P, G = outcome.reward_PxG.shape
        length_B = (batch.inputs.segment_BxT > 0).sum(axis=1)
        penalty_PxG = advantages.overlong_penalty(length_B, max_length, overlong_buffer).reshape(P, G)
        reward_PxG = outcome.reward_PxG + penalty_PxG
        advantage_PxG = advantages.group_advantages(reward_PxG, estimator)
        key = jax.random.fold_in(jax.random.key(seed_step_2[0]), seed_step_2[1])
        result, thresholds, metrics = transferred(outcome, advantage_PxG, thresholds, key, transfer, adaptive)
        if transfer is None or gigpo is not None:
            result = dataclasses.replace(result, corrected_PxS=jnp.zeros_like(result.corrected_PxS))
        advantage_BxT = jnp.broadcast_to(advantage_PxG.reshape(P * G, 1), batch.mask_BxT.shape)
        if gigpo is not None:
            turn_PxV = compared(outcome.anchor_PxV, reward_PxG, advantage_PxG, **gigpo)
            advantage_BxT = tapo.token_advantages(advantage_PxG, turn_PxV, gigpo_lib.turns(batch.mask_BxT))
        elif transfer is not None:
            advantage_BxT = tapo.token_advantages(advantage_PxG, result.advantage_PxS, batch.step_BxT)
        signal_P = advantages.has_signal(reward_PxG)
        mask_BxT = batch.mask_BxT
        if dynamic_sampling:
            mask_BxT &= jnp.repeat(signal_P, G, total_repeat_length=P * G)[:, None]
        metrics |= {
            "reward/mean": reward_PxG.mean(),
            "reward/accuracy": outcome.success_PxG.mean(dtype=jnp.float32),
            "reward/overlong": penalty_PxG.mean(),
            "advantage/groups_with_signal": signal_P.mean(dtype=jnp.float32),
            "advantage/magnitude": jnp.abs(advantage_PxG).mean(),
        }
        return jnp.where(mask_BxT, advantage_BxT, 0), mask_BxT, Credit(advantage_PxG, result), thresholds, metrics

    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
    return jax.jit(prepare, out_shardings=(rows, rows, everywhere, everywhere, everywhere))


def transferred(
    outcome: Outcome,
    advantage_PxG: jax.Array,
    thresholds: AdaptiveTheta | None,
    key: jax.Array,
    transfer: dict[str, Any] | None,
    adaptive: dict[str, Any] | None,
) -> tuple[CreditTransfer, AdaptiveTheta | None, dict[str, jax.Array]]:
    """-> (CreditTransfer of the G rollouts' slots, thresholds for the next batch, diagnostics). Remembered rollouts
    join as further members of their group; thresholds are used before they move."""
    settings = transfer if transfer is not None else {"beta": 0.0}
    steps, G = outcome.steps, advantage_PxG.shape[1]
    success_PxH = jnp.concatenate([outcome.success_PxG, outcome.remembered_success_PxM], axis=1)
    advantage_PxH = jnp.concatenate([advantage_PxG, outcome.remembered_advantage_PxM], axis=1)
    weight_PxH = jnp.concatenate([jnp.ones_like(advantage_PxG), outcome.remembered_weight_PxM], axis=1)
    if adaptive is not None:
        settings = settings | {"theta": tapo_adaptive.thresholds(thresholds, steps, settings["theta"])}
    result = tapo.transfer_credit(steps, success_PxH, advantage_PxH, key=key, weight_PxG=weight_PxH, **settings)
    own = G * steps.valid_PxS.shape[1] // success_PxH.shape[1]
    result = memory.drop_remembered(result, own)
    trajectory_PxS, valid_PxS = steps.trajectory_PxS[:, :own], steps.valid_PxS[:, :own]
    metrics = tapo.diagnostics(result, trajectory_PxS, valid_PxS, outcome.success_PxG, advantage_PxG)
    if adaptive is not None:
        sim_PxSxS = tapo.pairwise_similarity(steps, settings["text"])
        moving = {"quantile": adaptive["quantile"], "rate": adaptive["rate"]}
        thresholds = tapo_adaptive.update(thresholds, steps, sim_PxSxS, success_PxH, **moving)
        metrics |= {f"tapo/theta/{name}": thresholds.theta_N[n] for n, name in enumerate(adaptive["tools"])}
    return result, thresholds, metrics


def compared(
    anchor_PxV: jax.Array, reward_PxG: jax.Array, advantage_PxG: jax.Array, *, discount: float, omega: float
) -> jax.Array:
    """GiGPO's advantage of every turn, [P, V]."""
    valid_PxV = anchor_PxV != 0
    return_PxV = gigpo_lib.step_returns(reward_PxG, valid_PxV, discount)
    return gigpo_lib.step_advantages(return_PxV, anchor_PxV, valid_PxV, advantage_PxG, omega=omega)
