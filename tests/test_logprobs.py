"""Log-probabilities and entropies in chunks equal those of whole logits; the whole logits are never made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_models import CONFIGS

from tapo_jax import sharding
from tapo_jax.learn.logprobs import token_logp
from tapo_jax.models import hf, parameters, qwen3_vl

CONFIG = CONFIGS["grouped"]
B, T, V, D = 2, 11, CONFIG.vocab, CONFIG.hidden


def _case():
    model = qwen3_vl.Qwen3VL(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(4 * rng.standard_normal((B, T, D)), jnp.float32)
    return model, hidden, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def _whole(model, hidden, token, temperature=1.0, forbidden=None):
    """The definition, on all logits at once in float64."""
    logits = np.asarray(qwen3_vl.logits(model, hidden), np.float64)[:, :-1] / temperature
    if forbidden is not None:
        logits[..., forbidden] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, np.asarray(token)[:, 1:, None], -1)[..., 0]
    entropy = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
    return np.log(chosen), entropy


@pytest.mark.parametrize("sizes", [{"chunk": 128}, {"chunk": 4}], ids=str)
def test_equals_whole_logits(sizes):
    """Chunks that divide the 10 predicted places and that do not."""
    model, hidden, token = _case()
    forbidden = np.zeros(V, bool)
    forbidden[[3, 50, V - 1]] = True
    token = jnp.where(jnp.asarray(forbidden)[token], 0, token)
    for options in ({}, {"temperature": 0.7, "forbidden_V": jnp.asarray(forbidden)}):
        logp, entropy = jax.jit(lambda h, t, o=options: token_logp(model, h, t, **sizes, **o))(hidden, token)
        expected = _whole(model, hidden, token, options.get("temperature", 1.0), forbidden if options else None)
        np.testing.assert_allclose(logp[:, 1:], expected[0], atol=1e-5)
        np.testing.assert_allclose(entropy[:, 1:], expected[1], atol=1e-5)
        assert (np.asarray(logp)[:, 0] == 0).all() and (np.asarray(entropy)[:, 0] == 0).all()


@pytest.mark.parametrize("sizes", [{"chunk": 3}], ids=str)
def test_gradient(sizes):
    """Of Σ w·logp + u·entropy with respect to hidden states and table, against the unchunked definition by jax."""
    model, hidden, token = _case()
    graph, state = nnx.split(model)
    rng = np.random.default_rng(1)
    w, u = (jnp.asarray(rng.standard_normal((B, T)), jnp.float32) for _ in range(2))
    forbidden = jnp.arange(V) == 7

    def chunked(state, hidden):
        logp, entropy = token_logp(nnx.merge(graph, state), hidden, token, forbidden_V=forbidden, **sizes)
        return jnp.sum((w * logp + u * entropy)[:, 1:])

    def plain(state, hidden):
        logits = jnp.where(forbidden[None, None], -1e30, qwen3_vl.logits(nnx.merge(graph, state), hidden))[:, :-1]
        all_logp = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(all_logp, token[:, 1:, None], -1)[..., 0]
        entropy = -jnp.sum(jnp.where(forbidden[None, None], 0, jnp.exp(all_logp) * all_logp), -1)
        return jnp.sum(w[:, 1:] * logp + u[:, 1:] * entropy)

    ours, theirs = (jax.jit(jax.grad(f, argnums=(0, 1)))(state, hidden) for f in (chunked, plain))
    assert np.isfinite(ours[1]).all()
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    np.testing.assert_allclose(ours[0].embedding[...], theirs[0].embedding[...], atol=2e-5)
    assert np.abs(theirs[0].embedding[...]).max() > 0.1


@pytest.mark.parametrize("sizes", [(8, 1), (2, 2)], ids=["fsdp 8", "fsdp 2 × tensor 2"])
def test_on_a_mesh(sizes):
    """Rows and vocabulary split over devices: same values and gradients, forbidden tokens included."""
    fsdp, tensor = sizes
    model, hidden, token = _case()
    hidden, token = jnp.tile(hidden, (4, 1, 1)), jnp.tile(token, (4, 1))
    graph, state = nnx.split(model)

    def loss(state, hidden, token, forbidden):
        logp, entropy = token_logp(nnx.merge(graph, state), hidden, token, forbidden_V=forbidden, chunk=4)
        return jnp.sum(logp) + jnp.sum(entropy)

    forbidden = jnp.arange(V) == 7
    run = lambda *a: jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*a)  # noqa: E731
    value, (table, rows) = run(state, hidden, token, forbidden)
    mesh = sharding.make_mesh(data=1, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: fsdp * tensor])
    placed = jax.device_put(state, sharding.parameters(state, parameters.logical_axes(CONFIG), mesh))
    split = sharding.put_rows((np.asarray(hidden), np.asarray(token)), mesh, len(hidden))
    with sharding.on(mesh):
        again, (table_again, rows_again) = run(placed, *split, sharding.put_replicated(forbidden, mesh))
    np.testing.assert_allclose(again, value, rtol=1e-5)
    np.testing.assert_allclose(rows_again, rows, atol=1e-5)
    np.testing.assert_allclose(table_again.embedding[...], table.embedding[...], atol=5e-5)


def test_a_forbidden_token_has_no_chance_and_gives_finite_gradients():
    model, hidden, token = _case()
    forbidden = jnp.arange(V) == token[0, 2]
    logp, gradient = jax.value_and_grad(lambda h: token_logp(model, h, token, forbidden_V=forbidden)[0][0, 2])(hidden)
    assert logp < -1e20
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("length", [1, 2])
def test_short_rows(length):
    model, hidden, token = _case()
    logp, entropy = token_logp(model, hidden[:, :length], token[:, :length])
    assert logp.shape == entropy.shape == (B, length)
    assert (np.asarray(logp)[:, 0] == 0).all()
    assert length == 1 or (np.asarray(logp)[:, 1] < 0).all()


def test_memory_never_holds_all_logits():
    """The compiled gradient's temporaries stay far below one float32 [B, T, V] array (16 · 512 · 4096 · 4 = 134 MB)."""
    rows, places, vocab = 16, 512, 4096
    model = hf.abstract(dataclasses.replace(CONFIG, vocab=vocab))
    graph, state = nnx.split(model)
    hidden = jax.ShapeDtypeStruct((rows, places, D), jnp.float32)
    token = jax.ShapeDtypeStruct((rows, places), jnp.int32)

    def temporaries(**sizes):
        def loss(state, hidden, token):
            logp, entropy = token_logp(nnx.merge(graph, state), hidden, token, **sizes)
            return logp.sum() + entropy.sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, hidden, token).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = rows * places * vocab * 4
    assert temporaries(chunk=512) > whole / 2  # what is measured is what grows
    assert temporaries(chunk=16) < whole / 4
