"""Log-probabilities and entropies of given tokens, never with a whole [B, T, V] array of logits."""

import jax
import jax.numpy as jnp

from tapo_jax.models import qwen3_vl

FORBIDDEN = -1e30


def token_logp(
    model: qwen3_vl.Qwen3VL,
    hidden_BxTxD: jax.Array,
    token_BxT: jax.Array,
    *,
    temperature: float = 1.0,
    forbidden_V: jax.Array | None = None,
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """(logp_BxT, entropy_BxT), float32, aligned with the token itself: logp[:, t] = log p(token[:, t] | token[:, :t]).

    The distribution is softmax(logits / temperature) without the forbidden tokens, as the sampler draws from it; entropy
    is that of the distribution the token was drawn from. Place 0 has no history: both are 0 there.
    chunk: places of every row whose logits [B, chunk, V] exist at one time; the backward pass makes them again.
    """
    B, T = token_BxT.shape
    steps = -(-(T - 1) // chunk) if T > 1 else 0
    chunk = -(-(T - 1) // steps) if steps else 0
    pad = steps * chunk - (T - 1)
    # Place t is predicted from place t - 1.
    history = jnp.pad(hidden_BxTxD[:, :-1], ((0, 0), (0, pad), (0, 0)))
    target = jnp.pad(token_BxT[:, 1:], ((0, 0), (0, pad)))

    @jax.checkpoint
    def one(hidden_BxCxD: jax.Array, token_BxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BxCxV = qwen3_vl.logits(model, hidden_BxCxD) / temperature
        if forbidden_V is not None:
            logits_BxCxV = jnp.where(forbidden_V[None, None], FORBIDDEN, logits_BxCxV)
        return logp_and_entropy(logits_BxCxV, token_BxC)

    if steps == 0:
        return jnp.zeros((B, T)), jnp.zeros((B, T))
    if steps == 1:
        logp, entropy = one(history, target)
    else:
        split = [jnp.moveaxis(x.reshape(B, steps, chunk, *x.shape[2:]), 1, 0) for x in (history, target)]
        _, out = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, tuple(split))
        logp, entropy = (jnp.moveaxis(x, 0, 1).reshape(B, steps * chunk) for x in out)
    return tuple(jnp.pad(x[:, : T - 1], ((0, 0), (1, 0))) for x in (logp, entropy))


def logp_and_entropy(logits_xV: jax.Array, token_x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log softmax(logits)[token] and the entropy -Σ p log p = lse - Σ p·logit."""
    lse_x = jax.nn.logsumexp(logits_xV, axis=-1)
    chosen_x = jnp.take_along_axis(logits_xV, token_x[..., None], axis=-1)[..., 0]
    mean_x = jnp.sum(jnp.exp(logits_xV - lse_x[..., None]) * logits_xV, axis=-1)
    return chosen_x - lse_x, lse_x - mean_x
