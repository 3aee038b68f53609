"""From rewards and tool calls to the advantage of every token, for the whole batch, on the device: the step between
rollout and update. The mathematics is in `advantages.py` and `tapo.py`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tapo_jax import advantages, sharding, tapo, tapo_adaptive, tapo_memory
from tapo_jax.batch import TrainBatch
from tapo_jax.outcome import Outcome
from tapo_jax.tapo import CreditTransfer
from tapo_jax.tapo_adaptive import AdaptiveTheta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Credit:
    """What every trajectory and step got. advantage_PxG: of the base algorithm; transfer: None where TAPO is off."""

    advantage_PxG: jax.Array
    transfer: CreditTransfer | None


def make_prepare(
    mesh: Mesh,
    *,
    estimator: str,
    dynamic_sampling: bool,
    overlong_buffer: int,
    max_length: int,
    transfer: dict[str, Any] | None,
    tools: Sequence[str] = (),
    quantile: float = 0.8,
    rate: float = 0.05,
) -> Callable:
    """jitted (batch, outcome, thresholds, seed_step_2) -> (advantage_BxT, mask_BxT, Credit, thresholds, metrics).

    transfer: the settings of `tapo.transfer_credit`, None: TAPO off (its diagnostics are logged all the same, with the
    published settings and without effect). dynamic_sampling: groups whose rewards are all equal leave the loss (their
    mask becomes False). overlong_buffer: tokens before max_length in which a penalty grows to 1. thresholds:
    `tapo_adaptive.AdaptiveTheta` of `tools`, moved by `quantile` and `rate`, or None for the theta of `transfer`.
    seed_step_2: int32, what the control that shuffles draws from.
    """
    settings = transfer if transfer is not None else {"theta": 0.7, "beta": 0.0}

    def prepare(batch: TrainBatch, outcome: Outcome, thresholds: AdaptiveTheta | None, seed_step_2: jax.Array) -> tuple:
        P, G = outcome.reward_PxG.shape
        length_B = (batch.inputs.segment_BxT > 0).sum(axis=1)
        penalty_PxG = advantages.overlong_penalty(length_B, max_length, overlong_buffer).reshape(P, G)
        reward_PxG = outcome.reward_PxG + penalty_PxG
        advantage_PxG = advantages.group_advantages(reward_PxG, estimator)
        result, thresholds, metrics = transferred(outcome, advantage_PxG, thresholds, seed_step_2)
        if transfer is None:
            advantage_BxT = jnp.broadcast_to(advantage_PxG.reshape(P * G, 1), batch.mask_BxT.shape)
        else:
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
        credit = Credit(advantage_PxG, result if transfer is not None else None)
        return jnp.where(mask_BxT, advantage_BxT, 0), mask_BxT, credit, thresholds, metrics

    def transferred(
        outcome: Outcome, advantage_PxG: jax.Array, thresholds: AdaptiveTheta | None, seed_step_2: jax.Array
    ) -> tuple:
        """-> (CreditTransfer of the G rollouts' slots, thresholds for the next batch, diagnostics)."""
        G, steps = advantage_PxG.shape[1], outcome.steps
        together = lambda own, remembered: jnp.concatenate([own, remembered], axis=1)  # noqa: E731
        success_PxH = together(outcome.success_PxG, outcome.remembered_success_PxM)
        advantage_PxH = together(advantage_PxG, outcome.remembered_advantage_PxM)
        weight_PxH = together(jnp.ones_like(advantage_PxG), outcome.remembered_weight_PxM)
        key = jax.random.fold_in(jax.random.key(seed_step_2[0]), seed_step_2[1])
        used = (
            settings
            if thresholds is None
            else settings | {"theta": tapo_adaptive.thresholds(thresholds, steps, settings["theta"])}
        )
        result = tapo.transfer_credit(steps, success_PxH, advantage_PxH, key=key, weight_PxG=weight_PxH, **used)
        own = G * steps.valid_PxS.shape[1] // success_PxH.shape[1]
        result = tapo_memory.drop_remembered(result, own)
        metrics = tapo.diagnostics(
            result, steps.trajectory_PxS[:, :own], steps.valid_PxS[:, :own], outcome.success_PxG, advantage_PxG
        )
        if thresholds is not None:
            sim_PxSxS = tapo.pairwise_similarity(steps, settings["text"])
            thresholds = tapo_adaptive.update(thresholds, steps, sim_PxSxS, success_PxH, quantile=quantile, rate=rate)
            metrics |= {f"tapo/theta/{name}": thresholds.theta_N[n] for n, name in enumerate(tools)}
        return result, thresholds, metrics

    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
    return jax.jit(prepare, out_shardings=(rows, rows, everywhere, everywhere, everywhere))
