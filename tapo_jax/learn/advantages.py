"""Compute advantages from the rewards of a group, and the two reward rules that need a whole batch.

Axes: P prompts, G rollouts of each, B rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")


def group_advantages(
    reward_PxG: ArrayLike,
    estimator: str = "grpo",
    epsilon: float = 1e-6,
    valid_PxG: ArrayLike | None = None,
) -> jax.Array:
    """Return the advantage of every trajectory against its own group.

    reward_PxG: finite rewards. Returns advantage_PxG in the rewards' float type (float32 for integers).
    valid_PxG: bool, whether a reward is known (None: all are). Unknown ones are excluded from mean and standard
        deviation, as if the group were smaller, and their own advantage is exactly 0.

    grpo                   (r - mean) / (std + epsilon), std with ddof 1 (Shao et al. 2024, arXiv 2402.03300)
    dr_grpo                r - mean (Liu et al. 2025, arXiv 2503.20783)
    rloo                   (r - mean) * G / (G - 1), the leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)
    reinforce_pp_baseline  (r - mean) / (std of r - mean over the batch, ddof 1, + epsilon) (Hu 2025, arXiv 2501.03262);
                           over a sharded batch, inside jit, it is the global standard deviation

    A group whose rewards are all equal, and a group of one, gives exactly 0: the rounding noise of a float32 mean is
    not a signal.

    Raises ValueError for an unknown estimator, and for a NaN or infinite reward, naming the group, when the rewards are
    concrete; inside jit a NaN stays a NaN.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; known: {', '.join(ESTIMATORS)}")
    check_rewards(reward_PxG)
    reward_PxG = jnp.asarray(reward_PxG)
    if not jnp.issubdtype(reward_PxG.dtype, jnp.floating):
        reward_PxG = reward_PxG.astype(jnp.float32)
    if reward_PxG.shape[1] == 1:
        return jnp.zeros_like(reward_PxG)
    if valid_PxG is not None:
        return _valid_advantages(reward_PxG, estimator, epsilon, jnp.asarray(valid_PxG))
    size = reward_PxG.shape[1]
    signal_Px1 = has_signal(reward_PxG)[:, None]
    # Centring on the group's lowest reward first keeps a common offset (say 100 + 0/1) out of the mean's rounding.
    offset_PxG = reward_PxG - reward_PxG.min(axis=1, keepdims=True)
    centred_PxG = jnp.where(signal_Px1, offset_PxG - offset_PxG.mean(axis=1, keepdims=True), 0)
    if estimator == "grpo":
        std_Px1 = jnp.sqrt((centred_PxG**2).sum(axis=1, keepdims=True) / (size - 1))
        return centred_PxG / (std_Px1 + epsilon)
    if estimator == "rloo":
        return centred_PxG * (size / (size - 1))
    if estimator == "reinforce_pp_baseline":
        # Every group is centred, so the mean over the batch is 0 already.
        std = jnp.sqrt((centred_PxG**2).sum() / (centred_PxG.size - 1))
        return centred_PxG / (std + epsilon)
    return centred_PxG


def _valid_advantages(reward_PxG: jax.Array, estimator: str, epsilon: float, valid_PxG: jax.Array) -> jax.Array:
    """Return `group_advantages` over the valid members; the sums are those of a group without the others."""
    size_Px1 = valid_PxG.sum(axis=1, keepdims=True).astype(reward_PxG.dtype)
    others_Px1 = jnp.maximum(size_Px1 - 1, 1)
    signal_Px1 = has_signal(reward_PxG, valid_PxG)[:, None]
    lowest_Px1 = jnp.where(valid_PxG, reward_PxG, jnp.inf).min(axis=1, keepdims=True)
    offset_PxG = jnp.where(valid_PxG, reward_PxG - lowest_Px1, 0)
    mean_Px1 = offset_PxG.sum(axis=1, keepdims=True) / jnp.maximum(size_Px1, 1)
    centred_PxG = jnp.where(signal_Px1 & valid_PxG, offset_PxG - mean_Px1, 0)
    if estimator == "grpo":
        std_Px1 = jnp.sqrt((centred_PxG**2).sum(axis=1, keepdims=True) / others_Px1)
        return centred_PxG / (std_Px1 + epsilon)
    if estimator == "rloo":
        return centred_PxG * (size_Px1 / others_Px1)
    if estimator == "reinforce_pp_baseline":
        std = jnp.sqrt((centred_PxG**2).sum() / jnp.maximum(size_Px1.sum() - 1, 1))
        return centred_PxG / (std + epsilon)
    return centred_PxG


def check_rewards(reward_PxG: ArrayLike) -> None:
    """Raise a ValueError naming the first group with a NaN or infinite reward. Traced arrays are not checked."""
    if np.ndim(reward_PxG) != 2:
        raise ValueError(f"rewards have shape {np.shape(reward_PxG)}; expected [prompts, group]")
    if isinstance(reward_PxG, jax.core.Tracer):
        return
    if isinstance(reward_PxG, jax.Array) and not reward_PxG.is_fully_addressable:
        return  # one process sees only its part; the rewards were checked on the host that made them
    bad_P = ~np.isfinite(np.asarray(reward_PxG, dtype=np.float64)).all(axis=1)
    if bad_P.any():
        group = int(bad_P.argmax())
        rewards = np.asarray(reward_PxG)[group].tolist()
        raise ValueError(f"group {group} has rewards {rewards}; every reward must be finite")


def has_signal(reward_PxG: jax.Array, valid_PxG: jax.Array | None = None) -> jax.Array:
    """Return signal_P: whether the rewards of a group differ at all. valid_PxG: as in `group_advantages`.

    Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2) drops groups without signal: their advantages
    are 0 and they only dilute the mean.
    """
    if valid_PxG is not None:  # fewer than two valid ones cannot differ
        highest_P = jnp.where(valid_PxG, reward_PxG, -jnp.inf).max(axis=1)
        lowest_P = jnp.where(valid_PxG, reward_PxG, jnp.inf).min(axis=1)
        return ~(highest_P <= lowest_P)
    return ~(reward_PxG.max(axis=1) <= reward_PxG.min(axis=1))  # a NaN counts as a signal, so that it is not hidden


def overlong_penalty(length_B: ArrayLike, max_length: int, buffer: int) -> jax.Array:
    """Return penalty_B, the soft overlong punishment to add to the reward (DAPO, arXiv 2503.14476, section 3.4).

    0 up to max_length - buffer tokens, then linearly down to -1 at max_length, -1 beyond. DAPO counts generated tokens;
    this counts those of the whole conversation, which is what the budget limits. buffer 0 gives 0 everywhere.
    """
    if buffer == 0:
        return jnp.zeros(jnp.shape(length_B), jnp.float32)
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer is {buffer}; it must lie in 0..max_length ({max_length})")
    return -jnp.clip((jnp.asarray(length_B) - (max_length - buffer)) / buffer, 0.0, 1.0)
