"""Log-probabilities and entropies of given tokens, without ever holding the whole [B, T, V] array of logits.

Axes: B rows, T tokens, D width, V vocabulary, C positions of a chunk.
"""

import jax
import jax.numpy as jnp

from tapo_jax import sharding
from tapo_jax.models import qwen3_vl
from tapo_jax.models.layers import MASKED


def token_logp(
    model: qwen3_vl.Qwen3VL,
    hidden_BxTxD: jax.Array,
    token_BxT: jax.Array,
    *,
    temperature: float = 1.0,
    forbidden_V: jax.Array | None = None,
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Return (logp_BxT, entropy_BxT), float32, aligned with the token: logp[:, t] = log p(token[:, t] | token[:, :t]).

    The distribution is softmax(logits / temperature) without the forbidden tokens, as the sampler draws from it; the
    entropy is that distribution's. Position 0 has no history: both are 0 there.

    model: its embedding or output table gives the logits.
    hidden_BxTxD: hidden states after the final norm.
    token_BxT: ids.
    temperature: that of the sampler.
    forbidden_V: bool, tokens that are never drawn.
    chunk: positions of every row whose logits exist at one time; the backward pass recomputes them.
    """
    T = token_BxT.shape[1]
    if T == 1:
        return jnp.zeros(token_BxT.shape), jnp.zeros(token_BxT.shape)
    steps = -(-(T - 1) // chunk)
    chunk = -(-(T - 1) // steps)
    spare = steps * chunk - (T - 1)
    # Position t is predicted from position t - 1.
    history = jnp.pad(hidden_BxTxD[:, :-1], ((0, 0), (0, spare), (0, 0)))
    target = jnp.pad(token_BxT[:, 1:], ((0, 0), (0, spare)))

    @jax.checkpoint
    def one(table_VxD: jax.Array, hidden_BxCxD: jax.Array, token_BxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        table_VxD = table_VxD.astype(hidden_BxCxD.dtype)
        logits_BxCxV = _logits(table_VxD, hidden_BxCxD, temperature, forbidden_V)
        lse_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1)
        chosen_BxC = jnp.take_along_axis(logits_BxCxV, token_BxC[..., None], axis=-1)[..., 0]
        # -Σ p log p = lse - Σ p · logit
        mean_BxC = jnp.sum(jnp.exp(logits_BxCxV - lse_BxC[..., None]) * logits_BxCxV, axis=-1)
        return chosen_BxC - lse_BxC, lse_BxC - mean_BxC

    def all_places(table_VxD: jax.Array, history: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
        if steps == 1:
            return one(table_VxD, history, target)
        split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], steps, chunk, *x.shape[2:]), 1, 0)  # noqa: E731
        _, out = jax.lax.scan(lambda _, xs: (None, one(table_VxD, *xs)), None, (split(history), split(target)))
        return tuple(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], steps * chunk) for x in out)

    # The table keeps its own precision, in which its gradient is summed over chunks and devices.
    out = sharding.on_rows(all_places, qwen3_vl.output_table(model), history, target)
    logp_BxT, entropy_BxT = (jnp.pad(x[:, : T - 1], ((0, 0), (1, 0))) for x in out)
    return logp_BxT, entropy_BxT


def _logits(
    table_VxD: jax.Array, hidden_BxCxD: jax.Array, temperature: float, forbidden_V: jax.Array | None
) -> jax.Array:
    logits_BxCxV = qwen3_vl.times_table(table_VxD, hidden_BxCxD) / temperature
    return logits_BxCxV if forbidden_V is None else jnp.where(forbidden_V[None, None], MASKED, logits_BxCxV)
