"""Draw one token from logits: keys, temperature, top-p and other limits, forbidden tokens. Functions of arrays."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tapo_jax.models.layers import MASKED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrawLimits:
    """Limits of a draw that only evaluations have: the trainer cannot reproduce them."""

    top_k: Any
    """int32, tokens that may be drawn, equally probable ones included; 0: all."""
    min_p: Any
    """float32, the least probability that a token needs, as a share of the most probable one's; 0: none."""
    presence_penalty: Any
    """float32, taken from the logit of every token that the turn holds already, before the temperature; 0: nothing."""


def turn_keys(
    seed: jax.Array, step: jax.Array, prompt_R: jax.Array, sample_R: jax.Array, turn_R: jax.Array
) -> jax.Array:
    """Return one random key for each (seed, step, prompt, sample, turn)."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(prompt: jax.Array, sample: jax.Array, turn: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, prompt), sample), turn)

    return jax.vmap(one)(prompt_R, sample_R, turn_R)


def draw(
    logits_RxV: jax.Array,
    key_R: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    forbidden_V: jax.Array,
    limits: DrawLimits | None = None,
    seen_RxV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw a token for each row; return (token_R int32, logp_R float32), the tokens and their log-probabilities.

    The log-probability is that of the distribution at `temperature` over the tokens that are not forbidden; top_p < 1
    only restricts the draw to the smallest set of most probable tokens whose mass reaches top_p. Temperature 0
    takes the most probable token and returns its log-probability at temperature 1.

    limits: also restrict the draw, in this order: presence penalty, temperature, min_p, top_k, top_p of what is left.
        Like top_p they do not change the log-probability.
    seen_RxV: bool, the tokens that the presence penalty applies to; given where `limits` are.
    """
    logits_RxV = jnp.where(forbidden_V[None], MASKED, logits_RxV.astype(jnp.float32))
    greedy = temperature == 0
    logp_RxV = jax.nn.log_softmax(logits_RxV / jnp.where(greedy, 1.0, temperature), axis=-1)
    p_RxV = jnp.exp(logp_RxV)
    if limits is not None:
        logits_RxV = logits_RxV - limits.presence_penalty * seen_RxV
        p_RxV = _limited(jax.nn.softmax(logits_RxV / jnp.where(greedy, 1.0, temperature), axis=-1), limits)
    p_RxV = jax.lax.cond(top_p < 1, lambda p: _nucleus(p, top_p), lambda p: p, p_RxV)
    most_R = jnp.argmax(logits_RxV, axis=-1)
    drawn_R = pick(p_RxV, jax.vmap(jax.random.uniform)(key_R))
    token_R = jnp.where(greedy, most_R, drawn_R).astype(jnp.int32)
    return token_R, jnp.take_along_axis(logp_RxV, token_R[:, None], axis=-1)[:, 0]


def pick(p_RxV: jax.Array, u_R: jax.Array) -> jax.Array:
    """Return the inverse of each row's cumulative distribution at u in [0, 1).

    It needs one random number for each row instead of one for each token of the vocabulary. Rows need not add up to 1.
    A token of probability 0 is never picked.

    The search has two levels of about √V entries: first the block of tokens, then the token in it. The cumulative sums
    of so few terms are one small matrix product.
    """
    R, V = p_RxV.shape
    side = math.isqrt(V - 1) + 1
    p_RxMxM = jnp.pad(p_RxV, ((0, 0), (0, side * side - V))).reshape(R, side, side)
    before_MxM = jnp.tri(side, dtype=jnp.float32).T  # x @ before: sums up to and including each entry

    def first(p_RxM: jax.Array, target_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the first entry at which the sum exceeds the target, and the target minus the sum before it."""
        sum_RxM = jnp.matmul(p_RxM, before_MxM, precision="highest")
        passed_RxM = (sum_RxM > target_R[:, None]) & (p_RxM > 0)
        # Rounding may leave no such entry; then take the most probable one.
        place_R = jnp.where(passed_RxM.any(axis=1), jnp.argmax(passed_RxM, axis=1), jnp.argmax(p_RxM, axis=1))
        taken_R = jnp.take_along_axis(sum_RxM - p_RxM, place_R[:, None], axis=1)[:, 0]
        return place_R, target_R - taken_R

    block_RxM = p_RxMxM.sum(axis=2)
    block_R, rest_R = first(block_RxM, u_R * block_RxM.sum(axis=1))
    place_R, _ = first(jnp.take_along_axis(p_RxMxM, block_R[:, None, None], axis=1)[:, 0], rest_R)
    return block_R * side + place_R


def _nucleus(p_RxV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Zero every token that is less probable than the last one needed to reach top_p."""
    sorted_RxV = -jnp.sort(-p_RxV, axis=-1)
    needed_RxV = jnp.cumsum(sorted_RxV, axis=-1) - sorted_RxV < top_p  # always true of the first
    least_Rx1 = jnp.min(jnp.where(needed_RxV, sorted_RxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(p_RxV >= least_Rx1, p_RxV, 0.0)


def _limited(p_RxV: jax.Array, limits: DrawLimits) -> jax.Array:
    """Zero the tokens that min_p and then top_k exclude, and divide by what is left."""
    p_RxV = jnp.where(p_RxV >= limits.min_p * p_RxV.max(axis=-1, keepdims=True), p_RxV, 0.0)
    last = jnp.where(limits.top_k > 0, limits.top_k, p_RxV.shape[-1]) - 1
    least_Rx1 = jax.lax.dynamic_slice_in_dim(-jnp.sort(-p_RxV, axis=-1), jnp.minimum(last, p_RxV.shape[-1] - 1), 1, 1)
    p_RxV = jnp.where(p_RxV >= least_Rx1, p_RxV, 0.0)
    return p_RxV / p_RxV.sum(axis=-1, keepdims=True)
