"""Drawing one token from logits: keys, temperature, top-p, forbidden tokens. Pure functions of arrays."""

import jax
import jax.numpy as jnp

from tapo_jax.logprobs import FORBIDDEN


def turn_keys(seed: jax.Array, step: jax.Array, prompt_R: jax.Array, sample_R: jax.Array, turn_R: jax.Array) -> jax.Array:
    """One key for each (seed, step, prompt, sample, turn)."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(prompt: jax.Array, sample: jax.Array, turn: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, prompt), sample), turn)

    return jax.vmap(one)(prompt_R, sample_R, turn_R)


def draw(
    logits_RxV: jax.Array, key_R: jax.Array, temperature: jax.Array, top_p: jax.Array, forbidden_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(token_R int32, logp_R float32): a token of each row and its log-probability.

    The log-probability is that of the distribution at `temperature` over the tokens that are not forbidden; top_p < 1 only
    restricts what is drawn to the smallest set of most probable tokens whose mass reaches top_p. temperature 0 takes the most
    probable token and gives its log-probability at temperature 1.
    """
    logits_RxV = jnp.where(forbidden_V[None], FORBIDDEN, logits_RxV.astype(jnp.float32))
    greedy = temperature == 0
    logp_RxV = jax.nn.log_softmax(logits_RxV / jnp.where(greedy, 1.0, temperature), axis=-1)
    p_RxV = jax.lax.cond(top_p < 1, lambda p: _nucleus(p, top_p), lambda p: p, jnp.exp(logp_RxV))
    # Inverse of the cumulative distribution: one random number for each row instead of one for each token of the vocabulary.
    # A cumulative sum in blocks need not be monotone in its last bits, so tokens of probability 0 are excluded explicitly.
    total_RxV = jnp.cumsum(p_RxV, axis=-1)
    u_Rx1 = jax.vmap(jax.random.uniform)(key_R)[:, None]
    passed_RxV = (total_RxV > u_Rx1 * total_RxV[:, -1:]) & (p_RxV > 0)
    most_R = jnp.argmax(logits_RxV, axis=-1)
    drawn_R = jnp.where(passed_RxV.any(axis=-1), jnp.argmax(passed_RxV, axis=-1), most_R)
    token_R = jnp.where(greedy, most_R, drawn_R).astype(jnp.int32)
    return token_R, jnp.take_along_axis(logp_RxV, token_R[:, None], axis=-1)[:, 0]


def _nucleus(p_RxV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Zeroes every token that is less probable than the last one needed to reach top_p."""
    sorted_RxV = -jnp.sort(-p_RxV, axis=-1)
    needed_RxV = jnp.cumsum(sorted_RxV, axis=-1) - sorted_RxV < top_p  # always true of the first
    least_Rx1 = jnp.min(jnp.where(needed_RxV, sorted_RxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(p_RxV >= least_Rx1, p_RxV, 0.0)
