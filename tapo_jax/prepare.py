"""From rewards and tool calls to the advantage of every token, for the whole batch, on the device: the step between rollout and
update. The mathematics is in `advantages.py` and `tapo.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tapo_jax import advantages, sharding, tapo
from tapo_jax.batch import TrainBatch
from tapo_jax.tapo import CreditTransfer, Steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the episodes of a batch ended, and their calls. reward_PxG: float32, total reward. success_PxG: bool. steps: encoded calls."""

    reward_PxG: Any
    success_PxG: Any
    steps: Steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Credit:
    """What every trajectory and every step got. advantage_PxG: of the base algorithm; transfer: None where TAPO is off."""

    advantage_PxG: jax.Array
    transfer: CreditTransfer | None


def make_prepare(
    mesh: Mesh, *, estimator: str, dynamic_sampling: bool, overlong_buffer: int, max_length: int, transfer: dict[str, Any] | None
) -> Callable:
    """jitted (batch, outcome, seed_step_2) -> (advantage_BxT, mask_BxT, Credit, metrics).

    transfer: the settings of `tapo.transfer_credit`, None: TAPO off (its diagnostics are logged all the same, with the published
    settings and without effect). seed_step_2: int32, what the control that shuffles draws from. dynamic_sampling: groups whose rewards are all
    equal leave the loss (their mask becomes False). overlong_buffer: tokens before max_length in which a penalty grows to 1.
    """
    settings = transfer if transfer is not None else {"beta": 0.0}

    def prepare(batch: TrainBatch, outcome: Outcome, seed_step_2: jax.Array) -> tuple:
        P, G = outcome.reward_PxG.shape
        length_B = (batch.inputs.segment_BxT > 0).sum(axis=1)
        penalty_PxG = advantages.overlong_penalty(length_B, max_length, overlong_buffer).reshape(P, G)
        reward_PxG = outcome.reward_PxG + penalty_PxG
        advantage_PxG = advantages.group_advantages(reward_PxG, estimator)
        steps = outcome.steps
        key = jax.random.fold_in(jax.random.key(seed_step_2[0]), seed_step_2[1])
        result = tapo.transfer_credit(steps, outcome.success_PxG, advantage_PxG, key=key, **settings)
        metrics = tapo.diagnostics(result, steps.trajectory_PxS, steps.valid_PxS, outcome.success_PxG, advantage_PxG)
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
        return jnp.where(mask_BxT, advantage_BxT, 0), mask_BxT, credit, metrics

    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
    return jax.jit(prepare, out_shardings=(rows, rows, everywhere, everywhere))
