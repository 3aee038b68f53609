"""Drawing one token: frequencies, log-probabilities, what top-p and forbidden tokens do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapo_jax.rollout.drawing import DrawLimits, draw, pick, turn_keys

LOGITS_V = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
NONE_V = np.zeros(4, bool)
COUNT = 20_000


@jax.jit
def _draws(logits_V, temperature, top_p, forbidden_V):
    keys = jax.random.split(jax.random.key(0), COUNT)
    return draw(jnp.broadcast_to(logits_V[None], (COUNT, len(logits_V))), keys, temperature, top_p, forbidden_V)


def draws(*, temperature=1.0, top_p=1.0, forbidden_V=NONE_V, logits_V=LOGITS_V):
    token_R, logp_R = _draws(logits_V, np.float32(temperature), np.float32(top_p), forbidden_V)
    return np.asarray(token_R), np.asarray(logp_R)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [0.5, 0.2, 0.2, 0.1]),
        (0.5, [25 / 34, 4 / 34, 4 / 34, 1 / 34]),  # squares 25, 4, 4, 1 of 100, over their sum
    ],
)
def test_frequencies_and_log_probabilities(temperature, expected):
    token_R, logp_R = draws(temperature=temperature)
    # Five standard errors of a share p of 20,000 are at most 5 · 0.5 / 141 = 0.018.
    np.testing.assert_allclose(np.bincount(token_R, minlength=4) / COUNT, expected, atol=0.018)
    np.testing.assert_allclose(logp_R, np.log(expected)[token_R], atol=1e-5)


def test_top_p_restricts_what_is_drawn_but_not_the_log_probability():
    token_R, logp_R = draws(top_p=0.6)  # 0.5 < 0.6, and the two tokens of 0.2 are equally probable: both stay
    assert set(token_R) == {0, 1, 2}
    np.testing.assert_allclose((token_R == 0).mean(), 5 / 9, atol=0.02)
    np.testing.assert_allclose(logp_R, LOGITS_V[token_R], atol=1e-5)
    assert set(draws(top_p=0.5)[0]) == {0}  # the first token alone reaches 0.5
    assert set(draws(top_p=0.01)[0]) == {0}  # never empty


def test_temperature_zero_takes_the_most_probable_and_reports_temperature_one():
    token_R, logp_R = draws(temperature=0.0, logits_V=LOGITS_V[::-1].copy())
    assert set(token_R) == {3}
    np.testing.assert_allclose(logp_R, np.log(0.5), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_drawn_and_have_no_mass(temperature):
    forbidden_V = np.array([True, False, False, True])
    token_R, logp_R = draws(temperature=temperature, forbidden_V=forbidden_V)
    assert set(token_R) == ({1} if temperature == 0 else {1, 2})
    np.testing.assert_allclose(logp_R, np.log(0.5), atol=1e-6)  # 0.2 of 0.4


jitted_pick = jax.jit(pick)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=50), st.floats(0, 1, exclude_max=True, width=32))
def test_pick_inverts_the_cumulative_distribution(weights, u):
    p_V = np.zeros(50, np.float32)  # one shape: compiled once
    p_V[: len(weights)] = weights
    if p_V.sum() < 1e-3:
        return
    token = int(jitted_pick(p_V[None], np.float32(u)[None])[0])
    assert p_V[token] > 0
    # float64 reference; at a boundary of the distribution float32 sums may fall on either side.
    total_V = np.cumsum(p_V.astype(np.float64))
    target = u * total_V[-1]
    assert total_V[token] - p_V[token] - 1e-4 <= target <= total_V[token] + 1e-4


def test_pick_with_the_vocabulary_of_a_real_model():
    """V = 151,936 is no square: the last block is padding, which is never picked."""
    V = 151_936
    p_RxV = jnp.ones((5, V), jnp.float32)
    token_R = np.asarray(jitted_pick(p_RxV, jnp.array([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])))
    np.testing.assert_allclose(token_R, [0, V // 4, V // 2, 3 * V // 4, V - 1], atol=2)
    assert token_R.max() < V


def test_keys_differ_in_every_number():
    base = {"seed": 1, "step": 2, "prompt": 3, "sample": 4, "turn": 5}
    changed = [base] + [{**base, name: 7} for name in base] + [{**base, "prompt": 4, "sample": 3}]

    def key(seed, step, prompt, sample, turn):
        one = jax.jit(turn_keys)(
            jnp.int32(seed), jnp.int32(step), *(jnp.array([n], jnp.int32) for n in (prompt, sample, turn))
        )
        return tuple(np.asarray(jax.random.key_data(one))[0].tolist())

    assert len({key(**numbers) for numbers in changed}) == 7
    assert key(**base) == key(**base)


def reference(logits_V, seen_V, temperature, top_p, top_k, min_p, penalty, forbidden_V):
    """The probabilities of one draw, step by step in float64: penalty, temperature, min_p, top_k, top_p."""
    logits = [
        -math.inf if bad else float(x) - penalty * bool(s)
        for x, s, bad in zip(logits_V, seen_V, forbidden_V, strict=True)
    ]
    if temperature == 0:
        return [float(i == int(np.argmax(logits))) for i in range(len(logits))]
    scaled = [x / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    weights = [w if w >= min_p * max(weights) else 0.0 for w in weights]
    if top_k:
        least = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    p = [w / sum(weights) for w in weights]
    kept, mass = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass < top_p:
            kept.add(i)
        mass += p[i]
    p = [x if i in kept else 0.0 for i, x in enumerate(p)]
    return [x / sum(p) for x in p]


@jax.jit
def limited_draws(logits_V, seen_V, temperature, top_p, forbidden_V, limits):
    keys = jax.random.split(jax.random.key(1), COUNT)
    many = lambda x_V: jnp.broadcast_to(x_V[None], (COUNT, len(x_V)))  # noqa: E731
    return draw(many(logits_V), keys, temperature, top_p, forbidden_V, limits, many(seen_V))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p", "penalty"),
    [
        (1.0, 1.0, 3, 0.0, 0.0), (0.7, 0.8, 20, 0.0, 1.5), (1.3, 1.0, 0, 0.2, 0.0), (0.5, 0.9, 4, 0.05, -0.7),
        (0.0, 1.0, 0, 0.0, 2.0), (1.0, 0.6, 2, 0.3, 0.0), (1.0, 1.0, 1, 0.0, 0.0), (1.0, 1.0, 10_000, 1.0, 0.5),
    ],
)  # fmt: skip
def test_limits_of_a_draw_are_those_of_a_plain_reference(temperature, top_p, top_k, min_p, penalty):
    rng = np.random.default_rng(top_k)
    logits_V = rng.normal(size=12).astype(np.float32) * 1.5
    seen_V, forbidden_V = rng.random(12) < 0.4, np.arange(12) == 5
    limits = DrawLimits(np.int32(top_k), np.float32(min_p), np.float32(penalty))
    token_R, logp_R = limited_draws(logits_V, seen_V, np.float32(temperature), np.float32(top_p), forbidden_V, limits)
    expected = np.array(reference(logits_V, seen_V, temperature, top_p, top_k, min_p, penalty, forbidden_V))
    found = np.bincount(token_R, minlength=12) / COUNT
    np.testing.assert_allclose(found, expected, atol=0.018)
    assert set(np.asarray(token_R)) <= set(np.flatnonzero(expected))
    # The log-probability is still that of the distribution at this temperature, without limits and penalty.
    whole = np.array(reference(logits_V, 0 * seen_V, temperature or 1.0, 1.0, 0, 0.0, 0.0, forbidden_V))
    np.testing.assert_allclose(logp_R, np.log(whole[token_R]), atol=1e-4)


def test_limits_that_limit_nothing_draw_the_same_tokens():
    limits = DrawLimits(np.int32(0), np.float32(0), np.float32(0))
    for temperature in (0.0, 0.8):
        token_R, _ = limited_draws(LOGITS_V, NONE_V, np.float32(temperature), np.float32(1), NONE_V, limits)
        keys = jax.random.split(jax.random.key(1), COUNT)
        plain_R, _ = jax.jit(draw)(
            jnp.broadcast_to(LOGITS_V[None], (COUNT, 4)), keys, np.float32(temperature), np.float32(1), NONE_V
        )
        # float32 sums divided once more: a number between two tokens may fall on either side.
        assert (np.asarray(token_R) != np.asarray(plain_R)).sum() <= 2
