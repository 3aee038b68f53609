"""Draw one token from logits: keys, temperature, top-p, forbidden tokens. Pure functions of arrays."""

import math

import jax
import jax.numpy as jnp

from tapo_jax.models.layers import MASKED


def turn_keys(
    seed: jax.Array, step: jax.Array, prompt_R: jax.Array, sample_R: jax.Array, turn_R: jax.Array
) -> jax.Array:
    """Return one random key for each (seed, step, prompt, sample, turn)."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(prompt: jax.Array, sample: jax.Array, turn: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, prompt), sample), turn)

    return jax.vmap(one)(prompt_R, sample_R, turn_R)


def draw(
    logits_RxV: jax.Array, key_R: jax.Array, temperature: jax.Array, top_p: jax.Array, forbidden_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw a token for each row; return (token_R int32, logp_R float32), the tokens and their log-probabilities.

    The log-probability is that of the distribution at `temperature` over the tokens that are not forbidden; top_p < 1
    only restricts the draw to the smallest set of most probable tokens whose mass reaches top_p. Temperature 0
    takes the most probable token and returns its log-probability at temperature 1.
    """
    logits_RxV = jnp.where(forbidden_V[None], MASKED, logits_RxV.astype(jnp.float32))
    greedy = temperature == 0
    logp_RxV = jax.nn.log_softmax(logits_RxV / jnp.where(greedy, 1.0, temperature), axis=-1)
    p_RxV = jax.lax.cond(top_p < 1, lambda p: _nucleus(p, top_p), lambda p: p, jnp.exp(logp_RxV))
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
