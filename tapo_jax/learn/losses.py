"""Compute policy-gradient losses as pure functions of arrays. Axes: B rows, T tokens. Everything is minimised.

Every function applies `where(mask, ·, 0)` before the exponential, not after it: a masked token with a huge log-ratio
would otherwise give inf · 0 = NaN in the gradient under a finite loss.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm")
KL_ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # e^20 = 5e8: beyond it a float32 product overflows and the clipped branch's gradient becomes NaN


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of a policy loss. Hashable. Raises ValueError for an unknown name and for clip_dual <= 1."""

    algorithm: str = "grpo"
    """A name of `LOSSES`."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    clip_dual: float | None = None
    """c > 1: a token with A < 0 loses at most -c·A; None: no bound."""
    tau_pos: float = 1.0
    """SAPO's temperature for A > 0."""
    tau_neg: float = 1.05
    """SAPO's temperature for A <= 0."""
    aggregation: str | None = None
    """One of `AGGREGATIONS`; None: the algorithm's own."""

    def __post_init__(self) -> None:
        if self.algorithm not in LOSSES:
            raise ValueError(f"algorithm is {self.algorithm!r}; known: {', '.join(LOSSES)}")
        if self.aggregation is not None and self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation is {self.aggregation!r}; known: {', '.join(AGGREGATIONS)}")
        if self.clip_dual is not None and self.clip_dual <= 1:
            raise ValueError(f"clip_dual is {self.clip_dual}; it must be larger than 1")


@dataclasses.dataclass(frozen=True)
class Loss:
    """A policy loss."""

    function: Callable[[jax.Array, jax.Array, jax.Array, Settings], jax.Array]
    """`function(ratio_BxT, logp_BxT, advantage_BxT, settings) -> loss_BxT`; logp_BxT is 0 outside the mask."""
    aggregation: str
    log_ratio: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    """Applied to (log_ratio_BxT, mask_BxT) before the exponential."""


def clipped_loss(ratio_BxT: jax.Array, logp_BxT: jax.Array, advantage_BxT: jax.Array, settings: Settings) -> jax.Array:
    """Return -min(r·A, clip(r)·A), bounded above by -clip_dual·A if A < 0.

    Schulman et al. 2017, arXiv 1707.06347, eq. 7; the bound: Ye et al. 2020, arXiv 1912.09729.
    """
    loss_BxT = jnp.maximum(-ratio_BxT * advantage_BxT, -_clip(ratio_BxT, settings) * advantage_BxT)
    if settings.clip_dual is None:
        return loss_BxT
    bound_BxT = jnp.where(advantage_BxT < 0, -settings.clip_dual * advantage_BxT, jnp.inf)
    return jnp.minimum(loss_BxT, bound_BxT)


def sapo_loss(ratio_BxT: jax.Array, logp_BxT: jax.Array, advantage_BxT: jax.Array, settings: Settings) -> jax.Array:
    """Return -(4/tau)·sigmoid(tau·(r - 1))·A, tau = tau_pos if A > 0 else tau_neg (Gao et al., arXiv 2511.20347)."""
    tau_BxT = jnp.where(advantage_BxT > 0, settings.tau_pos, settings.tau_neg)
    return -4 / tau_BxT * jax.nn.sigmoid(tau_BxT * (ratio_BxT - 1)) * advantage_BxT


def cispo_loss(ratio_BxT: jax.Array, logp_BxT: jax.Array, advantage_BxT: jax.Array, settings: Settings) -> jax.Array:
    """Return -sg[clip(r)]·A·logp (MiniMax 2025, arXiv 2506.13585)."""
    return -jax.lax.stop_gradient(_clip(ratio_BxT, settings)) * advantage_BxT * logp_BxT


def _clip(ratio_BxT: jax.Array, settings: Settings) -> jax.Array:
    return jnp.clip(ratio_BxT, 1 - settings.clip_low, 1 + settings.clip_high)


def sequence_log_ratio(log_ratio_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Return log s_t of GSPO's token form: s_t = sg[s]·exp(logp - sg[logp]), s = exp(mean of the row's log r).

    Every token has the row's mean as its value and its own logp in its gradient, the form that is right for per-token
    advantages (Zheng et al. 2025, arXiv 2507.18071, section 4.3).
    """
    count_Bx1 = jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)
    mean_Bx1 = jax.lax.stop_gradient(log_ratio_BxT.sum(axis=1, keepdims=True) / count_Bx1)
    own_BxT = log_ratio_BxT - jax.lax.stop_gradient(log_ratio_BxT)
    return jnp.where(mask_BxT, mean_Bx1 + own_BxT, 0)


LOSSES = {
    "grpo": Loss(clipped_loss, "token_mean"),
    "gspo": Loss(clipped_loss, "seq_mean_token_mean", sequence_log_ratio),
    "sapo": Loss(sapo_loss, "seq_mean_token_mean"),
    "cispo": Loss(cispo_loss, "token_mean"),
}


def aggregation_of(settings: Settings) -> str:
    """Return the aggregation that `policy_loss` uses: the settings' own or the algorithm's."""
    return settings.aggregation or LOSSES[settings.algorithm].aggregation


def policy_loss(
    logp_BxT: ArrayLike,
    old_logp_BxT: ArrayLike,
    advantage_BxT: ArrayLike,
    mask_BxT: ArrayLike,
    settings: Settings,
    *,
    denominator: ArrayLike | None = None,
    weight_BxT: ArrayLike | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (loss, metrics) of one array of trajectories, differentiable in logp_BxT only.

    With r = exp(logp - old), log r clipped to ±20, the loss of a token is that of `LOSSES[settings.algorithm]`.

    Args:
        logp_BxT: log-probability of each token under the current parameters.
        old_logp_BxT: the same before the first update on these trajectories.
        advantage_BxT: per token.
        mask_BxT: bool, the tokens that the policy wrote.
        settings: algorithm, clipping, temperatures, aggregation.
        denominator: see `aggregate`.
        weight_BxT: importance weights (`importance_weight`), a detached factor of each token's loss.

    The metrics are means over the mask, combined over micro-batches by weighting with "tokens": ratio_mean, ratio_max,
    approx_kl (k3 of old against current), clip_fraction_high, clip_fraction_low, clip_fraction_dual, zero_fraction
    (tokens with A = 0), effective_sample_size ((Σr)² / (n·Σr²)), tokens.
    """
    loss = LOSSES[settings.algorithm]
    mask_BxT = jnp.asarray(mask_BxT, bool)
    log_ratio_BxT = jnp.where(mask_BxT, jnp.asarray(logp_BxT) - jax.lax.stop_gradient(old_logp_BxT), 0)
    advantage_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, advantage_BxT, 0)).astype(log_ratio_BxT.dtype)
    if loss.log_ratio is not None:
        log_ratio_BxT = loss.log_ratio(log_ratio_BxT, mask_BxT)
    ratio_BxT = jnp.exp(jnp.clip(log_ratio_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    loss_BxT = loss.function(ratio_BxT, jnp.where(mask_BxT, logp_BxT, 0), advantage_BxT, settings)
    if weight_BxT is not None:
        loss_BxT = loss_BxT * jax.lax.stop_gradient(jnp.where(mask_BxT, weight_BxT, 0))
    total = aggregate(loss_BxT, mask_BxT, aggregation_of(settings), denominator)
    return total, _metrics(log_ratio_BxT, ratio_BxT, advantage_BxT, mask_BxT, settings)


def _metrics(
    log_ratio_BxT: jax.Array, ratio_BxT: jax.Array, advantage_BxT: jax.Array, mask_BxT: jax.Array, settings: Settings
) -> dict[str, jax.Array]:
    log_ratio_BxT, ratio_BxT = jax.lax.stop_gradient((log_ratio_BxT, ratio_BxT))
    count = mask_BxT.sum()
    positive_BxT, negative_BxT = advantage_BxT > 0, advantage_BxT < 0

    def mean(value_BxT: jax.Array) -> jax.Array:
        return jnp.where(mask_BxT, value_BxT, 0).sum(dtype=ratio_BxT.dtype) / jnp.maximum(count, 1)

    square = mean(ratio_BxT**2)
    dual = jnp.zeros((), ratio_BxT.dtype)
    if settings.clip_dual is not None:
        dual = mean(negative_BxT & (ratio_BxT > settings.clip_dual))
    return {
        "ratio_mean": mean(ratio_BxT),
        "ratio_max": jnp.where(mask_BxT, ratio_BxT, 0).max(),
        "approx_kl": mean(_k3(log_ratio_BxT)),
        "clip_fraction_high": mean(positive_BxT & (ratio_BxT > 1 + settings.clip_high)),
        "clip_fraction_low": mean(negative_BxT & (ratio_BxT < 1 - settings.clip_low)),
        "clip_fraction_dual": dual,
        "zero_fraction": mean(advantage_BxT == 0),
        "effective_sample_size": mean(ratio_BxT) ** 2 / jnp.where(square > 0, square, 1),
        "tokens": count,
    }


def aggregate(
    value_BxT: ArrayLike, mask_BxT: ArrayLike, aggregation: str = "token_mean", denominator: ArrayLike | None = None
) -> jax.Array:
    """Aggregate a value per token into one number. An all-zero mask gives 0 with gradient 0.

    token_mean               Σ value / tokens
    seq_mean_token_mean      Σ over rows of (the row's mean over its tokens) / rows that have a token
    seq_mean_token_sum_norm  Σ value / (rows that have a token · T)   (Dr. GRPO, arXiv 2503.20783; in training T is
                             rollout.max_length, regardless of the batch's longest row)

    denominator: the number to divide by instead of this array's own tokens, rows, or rows · T. Under micro-batching and
    data parallelism it is the count of the global batch, which the mean of micro-batch means does not equal.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; known: {', '.join(AGGREGATIONS)}")
    mask_BxT = jnp.asarray(mask_BxT, bool)
    value_BxT = jnp.where(mask_BxT, value_BxT, 0)
    if denominator is None:
        denominator = count(mask_BxT, aggregation)
    if aggregation == "seq_mean_token_mean":
        value_BxT = value_BxT / jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)
    denominator = jnp.asarray(denominator, value_BxT.dtype)
    return value_BxT.sum() / jnp.where(denominator > 0, denominator, 1)


def count(mask_BxT: ArrayLike, aggregation: str = "token_mean") -> jax.Array:
    """Return the denominator that `aggregate` uses for this mask; counts of parts of a batch add up to the batch's."""
    mask_BxT = jnp.asarray(mask_BxT, bool)
    if aggregation == "token_mean":
        return mask_BxT.sum()
    rows = mask_BxT.any(axis=1).sum()
    return rows if aggregation == "seq_mean_token_mean" else rows * mask_BxT.shape[1]


def kl(logp_BxT: ArrayLike, ref_logp_BxT: ArrayLike, estimator: str = "k3") -> jax.Array:
    """Estimate KL(policy ‖ reference) per token from the policy's own samples (Schulman, joschu.net/blog/kl-approx).

    k1 = logp - ref; k2 = (logp - ref)² / 2; k3 = e^d - d - 1 with d = ref - logp, clipped to ±20.
    Unbiased as values: k1, k3. With the gradient of the reverse KL: k2. Differentiable in logp_BxT.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator is {estimator!r}; known: {', '.join(KL_ESTIMATORS)}")
    difference_BxT = jnp.clip(
        jax.lax.stop_gradient(jnp.asarray(ref_logp_BxT)) - logp_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    if estimator == "k1":
        return -difference_BxT
    if estimator == "k2":
        return difference_BxT**2 / 2
    return _k3(difference_BxT)


def _k3(difference_BxT: jax.Array) -> jax.Array:
    difference_BxT = jnp.clip(difference_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(difference_BxT) - difference_BxT


def importance_weight(
    old_logp_BxT: ArrayLike, sampler_logp_BxT: ArrayLike, mask_BxT: ArrayLike, *, cap: float = 2.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (weight_BxT, metrics): the correction for a sampler whose probabilities differ from the trainer's.

    weight = min(exp(old - sampler), cap) of each token, detached (truncated importance sampling, Yao et al. 2025); 0
    outside the mask.

    metrics: weight_mean (before truncation), weight_effective_sample_size (of the weights used), weight_clip_fraction,
    sampler_kl (k3 of sampler against trainer), sampler_logp_difference (mean |old - sampler|).
    Raises ValueError for cap <= 0.
    """
    if cap <= 0:
        raise ValueError(f"cap is {cap}; it must be positive")
    mask_BxT = jnp.asarray(mask_BxT, bool)
    difference_BxT = jnp.where(mask_BxT, jnp.asarray(old_logp_BxT) - jnp.asarray(sampler_logp_BxT), 0)
    raw_BxT = jnp.exp(jnp.clip(difference_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    weight_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, jnp.minimum(raw_BxT, cap), 0))

    def mean(value_BxT: jax.Array) -> jax.Array:
        return aggregate(jax.lax.stop_gradient(value_BxT).astype(raw_BxT.dtype), mask_BxT)

    square = mean(weight_BxT**2)
    metrics = {
        "weight_mean": mean(raw_BxT),
        "weight_effective_sample_size": mean(weight_BxT) ** 2 / jnp.where(square > 0, square, 1),
        "weight_clip_fraction": mean(raw_BxT > cap),
        "sampler_kl": mean(_k3(difference_BxT)),
        "sampler_logp_difference": mean(jnp.abs(difference_BxT)),
    }
    return weight_BxT, metrics
