"""Policy-gradient losses as pure functions of arrays. Axes: B rows, T tokens. Everything is minimised.

Every function puts `where(mask, ·, 0)` in front of the exponential, not behind it: a masked token with a huge
log-ratio would otherwise give inf · 0 = NaN in the gradient under a finite loss.
"""

import jax
import jax.numpy as jnp

ALGORITHMS = {"grpo": "token_mean", "cispo": "token_mean", "gspo": "seq_mean_token_mean", "sapo": "seq_mean_token_mean"}
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm")
KL_ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # e^20 = 5e8: beyond it a float32 product overflows and the clipped branch's gradient becomes NaN


def policy_loss(
    logp_BxT,
    old_logp_BxT,
    advantage_BxT,
    mask_BxT,
    *,
    algorithm="grpo",
    clip_low=0.2,
    clip_high=0.2,
    clip_dual=None,
    tau_pos=1.0,
    tau_neg=1.05,
    aggregation=None,
    denominator=None,
    weight_BxT=None,
):
    """(loss, metrics) of one array of trajectories, differentiable in logp_BxT only.

    logp_BxT: log-probability of each token under the current parameters; old_logp_BxT: before the first update.
    advantage_BxT: per token. mask_BxT: bool, the tokens that the policy wrote. With r = exp(logp - old):

    grpo   -min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A); with clip_dual = c > 1 at most -c·A where A < 0
           (Schulman et al. 2017, arXiv 1707.06347, eq. 7; Ye et al. 2020, arXiv 1912.09729)
    gspo   the same with s_t = sg[s]·exp(logp - sg[logp]), s = exp(mean over the row's tokens of log r)
           (Zheng et al. 2025, arXiv 2507.18071, section 4.3: the form that is right for per-token A)
    sapo   -(4/tau)·sigmoid(tau·(r - 1))·A with tau = tau_pos where A > 0, else tau_neg (Gao et al., arXiv 2511.20347)
    cispo  -sg[clip(r, 1 - clip_low, 1 + clip_high)]·A·logp (MiniMax 2025, arXiv 2506.13585)

    log r is clipped to ±20 before the exponential. aggregation None: token_mean for grpo and cispo,
    seq_mean_token_mean for gspo and sapo; see `aggregate`. denominator: see `aggregate`.
    weight_BxT: importance weights (`importance_weight`), a detached factor of each token's loss.

    metrics: means over the mask, combined over micro-batches by weighting with "tokens": ratio_mean, ratio_max,
    approx_kl (k3 of old against current), clip_fraction_high, clip_fraction_low, clip_fraction_dual, zero_fraction
    (tokens with A = 0), effective_sample_size ((Σr)² / (n·Σr²)), tokens.

    Raises ValueError for an unknown algorithm or aggregation and for clip_dual <= 1.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    if clip_dual is not None and clip_dual <= 1:
        raise ValueError(f"clip_dual is {clip_dual}; it must be larger than 1")
    mask_BxT = jnp.asarray(mask_BxT, bool)
    log_ratio_BxT = jnp.where(mask_BxT, logp_BxT - jax.lax.stop_gradient(old_logp_BxT), 0)
    advantage_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, advantage_BxT, 0)).astype(log_ratio_BxT.dtype)
    if algorithm == "gspo":
        log_ratio_BxT = _sequence_log_ratio(log_ratio_BxT, mask_BxT)
    ratio_BxT = jnp.exp(jnp.clip(log_ratio_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_BxT = jnp.clip(ratio_BxT, 1 - clip_low, 1 + clip_high)
    if algorithm == "sapo":
        tau_BxT = jnp.where(advantage_BxT > 0, tau_pos, tau_neg)
        loss_BxT = -4 / tau_BxT * jax.nn.sigmoid(tau_BxT * (ratio_BxT - 1)) * advantage_BxT
    elif algorithm == "cispo":
        logp_BxT = jnp.where(mask_BxT, logp_BxT, 0)
        loss_BxT = -jax.lax.stop_gradient(clipped_BxT) * advantage_BxT * logp_BxT
    else:
        loss_BxT = jnp.maximum(-ratio_BxT * advantage_BxT, -clipped_BxT * advantage_BxT)
        if clip_dual is not None:
            bound_BxT = jnp.where(advantage_BxT < 0, -clip_dual * advantage_BxT, jnp.inf)
            loss_BxT = jnp.minimum(loss_BxT, bound_BxT)
    if weight_BxT is not None:
        loss_BxT = loss_BxT * jax.lax.stop_gradient(jnp.where(mask_BxT, weight_BxT, 0))
    loss = aggregate(loss_BxT, mask_BxT, aggregation or ALGORITHMS[algorithm], denominator)
    metrics = _metrics(log_ratio_BxT, ratio_BxT, advantage_BxT, mask_BxT, clip_low, clip_high, clip_dual)
    return loss, metrics


def _sequence_log_ratio(log_ratio_BxT, mask_BxT):
    """log s_t of GSPO: every token of a row has the row's mean as its value and its own logp in its gradient."""
    count_Bx1 = jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)
    mean_Bx1 = jax.lax.stop_gradient(log_ratio_BxT.sum(axis=1, keepdims=True) / count_Bx1)
    own_BxT = log_ratio_BxT - jax.lax.stop_gradient(log_ratio_BxT)
    return jnp.where(mask_BxT, mean_Bx1 + own_BxT, 0)


def _metrics(log_ratio_BxT, ratio_BxT, advantage_BxT, mask_BxT, clip_low, clip_high, clip_dual):
    log_ratio_BxT, ratio_BxT = jax.lax.stop_gradient((log_ratio_BxT, ratio_BxT))
    count = mask_BxT.sum()
    positive_BxT, negative_BxT = advantage_BxT > 0, advantage_BxT < 0

    def mean(value_BxT):
        return jnp.where(mask_BxT, value_BxT, 0).sum(dtype=ratio_BxT.dtype) / jnp.maximum(count, 1)

    square = mean(ratio_BxT**2)
    dual = mean(negative_BxT & (ratio_BxT > clip_dual)) if clip_dual is not None else jnp.zeros((), ratio_BxT.dtype)
    return {
        "ratio_mean": mean(ratio_BxT),
        "ratio_max": jnp.where(mask_BxT, ratio_BxT, 0).max(),
        "approx_kl": mean(_k3(log_ratio_BxT)),
        "clip_fraction_high": mean(positive_BxT & (ratio_BxT > 1 + clip_high)),
        "clip_fraction_low": mean(negative_BxT & (ratio_BxT < 1 - clip_low)),
        "clip_fraction_dual": dual,
        "zero_fraction": mean(advantage_BxT == 0),
        "effective_sample_size": mean(ratio_BxT) ** 2 / jnp.where(square > 0, square, 1),
        "tokens": count,
    }


def aggregate(value_BxT, mask_BxT, aggregation="token_mean", denominator=None):
    """One number from a value for each token. An all-zero mask gives 0 with gradient 0.

    token_mean               Σ value / tokens
    seq_mean_token_mean      Σ over rows of (the row's mean over its tokens) / rows that have a token
    seq_mean_token_sum_norm  Σ value / (rows that have a token · T)   (Dr. GRPO, arXiv 2503.20783; in training T is
                             rollout.max_length, whatever a batch's longest row)

    denominator: the number to divide by instead of this array's own tokens, rows, or rows · T. Under micro-batching and
    data parallelism it is the count of the global batch: the mean of micro-batch means is another number.
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


def count(mask_BxT, aggregation="token_mean"):
    """The denominator that `aggregate` uses for this mask. Counts of parts of a batch add up to the batch's."""
    mask_BxT = jnp.asarray(mask_BxT, bool)
    if aggregation == "token_mean":
        return mask_BxT.sum()
    rows = mask_BxT.any(axis=1).sum()
    return rows if aggregation == "seq_mean_token_mean" else rows * mask_BxT.shape[1]


def kl(logp_BxT, ref_logp_BxT, estimator="k3"):
    """Per-token estimate of KL(policy ‖ reference) from the policy's own samples (Schulman, joschu.net/blog/kl-approx).

    k1 = logp - ref; k2 = (logp - ref)² / 2; k3 = e^d - d - 1 with d = ref - logp, clipped to ±20.
    Unbiased as values: k1, k3. With the gradient of the reverse KL: k2. Differentiable in logp_BxT.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator is {estimator!r}; known: {', '.join(KL_ESTIMATORS)}")
    difference_BxT = jnp.clip(jax.lax.stop_gradient(ref_logp_BxT) - logp_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -difference_BxT
    if estimator == "k2":
        return difference_BxT**2 / 2
    return _k3(difference_BxT)


def _k3(difference_BxT):
    difference_BxT = jnp.clip(difference_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(difference_BxT) - difference_BxT


def importance_weight(old_logp_BxT, sampler_logp_BxT, mask_BxT, *, cap=2.0, low=None, mode="truncate", level="token"):
    """(weight_BxT, metrics): correction for a sampler whose probabilities differ from the trainer's, detached.

    w = exp(old - sampler) of a token, or of the whole row's sum with level="sequence".
    mode="truncate": min(w, cap) (Yao et al. 2025, truncated importance sampling). mode="mask": 0 outside [low, cap], w
    inside; low None: 1/cap. The weight of a masked token is 0.

    metrics: weight_mean (before truncation), weight_effective_sample_size (of the weights used), weight_clip_fraction,
    sampler_kl (k3 of sampler against trainer), sampler_logp_difference (mean |old - sampler|).
    Raises ValueError for an unknown mode or level and for cap <= 0.
    """
    if mode not in ("truncate", "mask") or level not in ("token", "sequence"):
        raise ValueError(f"mode {mode!r}, level {level!r}; known modes: truncate, mask; known levels: token, sequence")
    if cap <= 0:
        raise ValueError(f"cap is {cap}; it must be positive")
    mask_BxT = jnp.asarray(mask_BxT, bool)
    difference_BxT = jnp.where(mask_BxT, old_logp_BxT - sampler_logp_BxT, 0)
    log_weight_BxT = difference_BxT
    if level == "sequence":
        log_weight_BxT = jnp.broadcast_to(difference_BxT.sum(axis=1, keepdims=True), difference_BxT.shape)
    raw_BxT = jnp.exp(jnp.clip(log_weight_BxT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    outside_BxT = raw_BxT > cap
    if mode == "mask":
        outside_BxT |= raw_BxT < (1 / cap if low is None else low)
        weight_BxT = jnp.where(outside_BxT, 0, raw_BxT)
    else:
        weight_BxT = jnp.minimum(raw_BxT, cap)
    weight_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, weight_BxT, 0))

    def mean(value_BxT):
        return aggregate(jax.lax.stop_gradient(value_BxT).astype(raw_BxT.dtype), mask_BxT)

    square = mean(weight_BxT**2)
    metrics = {
        "weight_mean": mean(raw_BxT),
        "weight_effective_sample_size": mean(weight_BxT) ** 2 / jnp.where(square > 0, square, 1),
        "weight_clip_fraction": mean(outside_BxT),
        "sampler_kl": mean(_k3(difference_BxT)),
        "sampler_logp_difference": mean(jnp.abs(difference_BxT)),
    }
    return weight_BxT, metrics
