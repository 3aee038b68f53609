import functools

import jax
import jax.numpy as jnp
import numpy as np
import pinned_losses
import pytest

from tapo_jax.learn import losses


def policy_loss(*arrays, denominator=None, weight_BxT=None, **numbers):
    return losses.policy_loss(*arrays, losses.Settings(**numbers), denominator=denominator, weight_BxT=weight_BxT)


INPUTS = {name: np.array(value, np.float64) for name, value in pinned_losses.INPUTS.items()}
CLIP = dict(clip_low=0.2, clip_high=0.28)
VERL = {
    "grpo_dual3 token-mean": dict(CLIP, clip_dual=3.0),
    "grpo_dual3 seq-mean-token-mean": dict(CLIP, clip_dual=3.0, aggregation="seq_mean_token_mean"),
    "grpo_dual3 seq-mean-token-sum-norm": dict(CLIP, clip_dual=3.0, aggregation="seq_mean_token_sum_norm"),
    "grpo_dual2 token-mean": dict(CLIP, clip_dual=2.0),
    "grpo_nodual token-mean": CLIP,
    "grpo_dual3 weighted token-mean": dict(CLIP, clip_dual=3.0, weight_BxT=INPUTS["weight"]),
    "gspo token-mean": dict(algorithm="gspo", clip_low=0.03, clip_high=0.04, aggregation="token_mean"),
    "gspo seq-mean-token-mean": dict(CLIP, algorithm="gspo"),
    "sapo seq-mean-token-mean": dict(algorithm="sapo"),
    "cispo token-mean": dict(CLIP, algorithm="cispo"),
    "grpo_dual3 token-mean denominator 40": dict(CLIP, clip_dual=3.0, denominator=40),
    "grpo_dual3 seq-mean-token-mean denominator 7": dict(
        CLIP, clip_dual=3.0, aggregation="seq_mean_token_mean", denominator=7
    ),
}
TRL = {
    "grpo": dict(CLIP, aggregation="seq_mean_token_mean"),
    "bnpo": CLIP,
    "dapo": CLIP,
    "dr_grpo": dict(CLIP, aggregation="seq_mean_token_sum_norm"),
    "sapo": dict(algorithm="sapo"),
    "cispo": dict(algorithm="cispo", clip_low=1.0, clip_high=0.28),  # TRL bounds the ratio from above only, at 1.28
    "grpo delta 3": dict(CLIP, clip_dual=3.0, aggregation="seq_mean_token_mean"),
    "dapo weighted": dict(CLIP, weight_BxT=INPUTS["weight"]),
}


def value_and_grad(advantage=INPUTS["advantage"], jit=False, kl=0.0, **options):
    def loss(logp):
        value = policy_loss(logp, INPUTS["old"], advantage, INPUTS["mask"], **options)[0]
        if kl:
            term = losses.aggregate(losses.kl(logp, INPUTS["ref"]), INPUTS["mask"], options["aggregation"])
            value = value + kl * term
        return value

    with jax.enable_x64(True):
        function = jax.value_and_grad(loss)
        value, grad = (jax.jit(function) if jit else function)(INPUTS["logp"])
        assert grad.dtype == np.float64
        return float(value), np.asarray(grad)


def assert_pinned(result, pinned):
    np.testing.assert_allclose(result[0], pinned[0], atol=1e-8, rtol=0)
    np.testing.assert_allclose(result[1], pinned[1], atol=1e-8, rtol=0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("case", VERL)
def test_equal_to_verl(case, jit):
    assert_pinned(value_and_grad(jit=jit, **VERL[case]), pinned_losses.VERL[case])


@pytest.mark.parametrize("case", TRL)
def test_equal_to_trl(case):
    assert_pinned(value_and_grad(**TRL[case]), pinned_losses.TRL[case])


def test_equal_to_trl_with_kl():
    result = value_and_grad(kl=0.1, aggregation="seq_mean_token_mean", **CLIP)
    assert_pinned(result, pinned_losses.TRL["grpo kl 0.1"])


def test_gspo_of_constant_rows_equals_trl_sequence_form():
    # With one advantage a row, the token form and the sequence form have the same value and the same gradient.
    advantage = np.broadcast_to(INPUTS["advantage_row"][:, None], (3, 5))
    assert_pinned(value_and_grad(advantage, algorithm="gspo", **CLIP), pinned_losses.TRL["gspo rows"])


def test_gspo_token_form_sends_each_advantage_to_its_own_token():
    # One row, two tokens, on-policy: s = 1. Loss = -(1·2 + 1·(-1)) / 2; d/dlp_t = -A_t / 2.
    # The sequence form -s·mean(A) has the same value, and -mean(A)/2 as the gradient of both tokens.
    zero, advantage, mask = jnp.zeros((1, 2)), jnp.array([[2.0, -1.0]]), jnp.ones((1, 2), bool)
    value, grad = jax.value_and_grad(lambda x: policy_loss(x, zero, advantage, mask, algorithm="gspo")[0])(zero)
    assert float(value) == -0.5
    np.testing.assert_allclose(grad, [[-1.0, 0.5]])


@pytest.mark.parametrize("estimator", losses.KL_ESTIMATORS)
def test_kl_equal_to_verl(estimator):
    with jax.enable_x64(True):
        value = losses.kl(jnp.asarray(INPUTS["logp"]), INPUTS["ref"], estimator)
        grad = jax.grad(lambda x: losses.kl(x, INPUTS["ref"], estimator).sum())(INPUTS["logp"])
    assert_pinned((value, grad), pinned_losses.VERL_KL[estimator])


def test_k3_keeps_its_digits_near_zero():
    # d = 1e-4: k3 = d²/2 + d³/6 = 5.00017e-9; e^d - d - 1 written out gives 0 or 1.2e-7 in float32.
    value = losses.kl(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-4), "k3")
    np.testing.assert_allclose(value, 5.000167e-9, rtol=2e-3)


@pytest.mark.parametrize("algorithm", losses.LOSSES)
def test_values_on_policy(algorithm):
    # r = 1 at every token, A = (1, -2), both tokens in one row, logp = -1.
    logp, advantage, mask = jnp.full((1, 2), -1.0), jnp.array([[1.0, -2.0]]), jnp.ones((1, 2), bool)

    def objective(x):
        return policy_loss(x, logp, advantage, mask, algorithm=algorithm)[0]

    loss, grad = jax.value_and_grad(objective)(logp)
    expected = {
        "grpo": 0.5,  # -(1 - 2) / 2
        "gspo": 0.5,
        "sapo": (-2 / 1.0 * 1 + 2 / 1.05 * 2) / 2,  # -(4/tau)·sigmoid(0)·A = -2A/tau
        "cispo": -0.5,  # -(A·lp) / 2 = -(-1 + 2) / 2
    }
    np.testing.assert_allclose(loss, expected[algorithm], rtol=1e-6)
    # On policy every one of them has REINFORCE's gradient, -A / tokens: SAPO's factor 4/tau · sigmoid'(0) · tau = 1.
    np.testing.assert_allclose(grad, [[-0.5, 1.0]], rtol=1e-6)


def test_clipping_by_hand():
    # r = 2, 2, 0.5, 0.5, 4 with A = +, -, +, -, -; clip 0.8..1.28, dual 3. All terms are -min(rA, clip(r)A):
    #   A=+1, r=2: 1.28, no gradient; A=-1, r=2: 2, gradient r; A=+1, r=.5: -.5, gradient -r; A=-1, r=.5: .8, none;
    #   A=-1, r=4: 4 capped at 3, none.
    log_ratio = jnp.log(jnp.array([[2.0, 2.0, 0.5, 0.5, 4.0]]))
    advantage, mask = jnp.array([[1.0, -1.0, 1.0, -1.0, -1.0]]), jnp.ones((1, 5), bool)

    def loss(x):
        return policy_loss(x, jnp.zeros((1, 5)), advantage, mask, clip_dual=3.0, denominator=1, **CLIP)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(log_ratio)
    np.testing.assert_allclose(value, -1.28 + 2 - 0.5 + 0.8 + 3, rtol=1e-6)
    np.testing.assert_allclose(grad, [[0, 2, -0.5, 0, 0]], atol=1e-6)
    assert [round(float(metrics[f"clip_fraction_{name}"]), 6) for name in ("high", "low", "dual")] == [0.2, 0.2, 0.2]
    np.testing.assert_allclose(metrics["ratio_mean"], 9 / 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["effective_sample_size"], 81 / (5 * (4 + 4 + 0.25 + 0.25 + 16)), rtol=1e-6)
    assert float(metrics["tokens"]) == 5 and round(float(metrics["ratio_max"]), 5) == 4


def test_sapo_temperature_follows_the_sign_of_the_token():
    # A = 0 counts as not positive, and gives no gradient either way.
    logp, mask = jnp.log(jnp.array([[1.5, 1.5, 1.5]])), jnp.ones((1, 3), bool)
    advantage = jnp.array([[1.0, -1.0, 0.0]])

    def loss(x):
        return policy_loss(x, jnp.zeros((1, 3)), advantage, mask, algorithm="sapo", tau_pos=2.0, tau_neg=4.0)[0]

    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    value, grad = jax.value_and_grad(loss)(logp)
    np.testing.assert_allclose(value, (-2 * sigmoid(1.0) + 1 * sigmoid(2.0)) / 3, rtol=1e-6)
    slope = lambda tau: 4 * sigmoid(tau / 2) * (1 - sigmoid(tau / 2)) * 1.5  # noqa: E731  dgate/dr · dr/dlogp
    np.testing.assert_allclose(grad, np.array([[-slope(2.0), slope(4.0), 0]]) / 3, rtol=1e-5)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
@pytest.mark.parametrize("algorithm", losses.LOSSES)
def test_all_zero_mask_gives_zero_loss_and_gradient(algorithm, aggregation):
    x, mask = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)
    function = functools.partial(policy_loss, algorithm=algorithm, aggregation=aggregation)
    for denominator in (None, 0, 7):
        loss = functools.partial(function, denominator=denominator)
        (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(x, x, x, mask)
        assert float(value) == 0 and (grad == 0).all()
        assert all(np.isfinite(float(v)) for v in metrics.values())


@pytest.mark.parametrize("bad", [1e4, -1e4, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("algorithm", losses.LOSSES)
def test_masked_token_with_any_log_probability_changes_nothing(algorithm, bad):
    old, advantage = jnp.zeros((1, 3)), jnp.array([[1.0, -1.0, 2.0]])
    mask = jnp.array([[True, True, False]])

    def run(logp):
        return jax.value_and_grad(
            lambda x: policy_loss(x, old, advantage, mask, algorithm=algorithm, clip_dual=3.0), has_aux=True
        )(logp)

    (value, metrics), grad = run(jnp.array([[0.1, -0.1, bad]]))
    (expected, expected_metrics), expected_grad = run(jnp.array([[0.1, -0.1, 0.0]]))
    assert float(value) == float(expected)
    np.testing.assert_array_equal(grad, expected_grad)
    assert grad[0, 2] == 0
    jax.tree.map(np.testing.assert_array_equal, metrics, expected_metrics)


@pytest.mark.parametrize("algorithm", losses.LOSSES)
def test_huge_ratio_of_a_real_token_stays_finite(algorithm):
    old, mask = jnp.zeros((1, 4)), jnp.ones((1, 4), bool)
    advantage, logp = jnp.array([[1.0, -1.0, 1.0, -1.0]]), jnp.array([[200.0, 200.0, -200.0, -200.0]])

    def objective(x):
        return policy_loss(x, old, advantage, mask, algorithm=algorithm)[0]

    value, grad = jax.value_and_grad(objective)(logp)
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
@pytest.mark.parametrize("algorithm", losses.LOSSES)
def test_micro_batches_with_the_global_denominator_add_up(algorithm, aggregation):
    key = jax.random.split(jax.random.key(0), 4)
    logp, old, advantage = (jax.random.normal(k, (6, 9)) * 0.3 for k in key[:3])
    # Rows of very different lengths, one of them empty.
    mask = jax.random.uniform(key[3], (6, 9)) < jnp.linspace(0, 1, 6)[:, None]

    def loss(x, rows, denominator):
        options = dict(algorithm=algorithm, aggregation=aggregation, denominator=denominator)
        return policy_loss(x[rows], old[rows], advantage[rows], mask[rows], **options)[0]

    whole, whole_grad = jax.value_and_grad(loss)(logp, slice(0, 6), None)
    total = losses.count(mask, aggregation)
    parts = [jax.value_and_grad(loss)(logp, slice(i, i + 2), total) for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(value for value, _ in parts), whole, rtol=1e-5)
    np.testing.assert_allclose(sum(grad for _, grad in parts), whole_grad, rtol=1e-5, atol=1e-7)
    mean_of_means = np.mean([float(loss(logp, slice(i, i + 2), None)) for i in (0, 2, 4)])
    assert abs(mean_of_means - float(whole)) > 1e-4  # the pitfall is real for these inputs


@pytest.mark.parametrize("algorithm", losses.LOSSES)
def test_padding_changes_nothing(algorithm):
    logp, old, advantage = (INPUTS[name].astype(np.float32) for name in ("logp", "old", "advantage"))
    mask = INPUTS["mask"].astype(bool)

    def pad(x, value):
        return np.pad(x, ((0, 2), (0, 3)), constant_values=value)

    plain = policy_loss(logp, old, advantage, mask, algorithm=algorithm)
    padded = policy_loss(pad(logp, -9.0), pad(old, 5.0), pad(advantage, 7.0), pad(mask, False), algorithm=algorithm)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), plain, padded)


def test_a_token_with_advantage_zero_gives_no_gradient():
    for algorithm in losses.LOSSES:
        grad = value_and_grad(algorithm=algorithm)[1]
        assert grad[2, 2] == 0  # INPUTS["advantage"][2, 2] is 0


def test_no_gradient_reaches_old_log_probabilities_advantages_or_weights():
    x, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)

    def loss(old, advantage, weight):
        return policy_loss(x, old, advantage, mask, weight_BxT=weight)[0]

    grads = jax.grad(loss, argnums=(0, 1, 2))(x * 0.9, x, x)
    assert all((grad == 0).all() for grad in grads)


def test_importance_weight_by_hand():
    # w = e^(old - sampler) = 4, 1/4, 1, (masked).
    old, sampler = jnp.log(jnp.array([[4.0, 0.25, 1.0, 9.0]])), jnp.zeros((1, 4))
    mask = jnp.array([[True, True, True, False]])
    weight, metrics = losses.importance_weight(old, sampler, mask)
    np.testing.assert_allclose(weight, [[2, 0.25, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(metrics["weight_mean"], 5.25 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight_clip_fraction"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight_effective_sample_size"], 3.25**2 / (3 * (4 + 0.0625 + 1)), rtol=1e-6)
    np.testing.assert_allclose(metrics["sampler_logp_difference"], 2 * np.log(4) / 3, rtol=1e-6)
    # k3 of the sampler against the trainer: w - 1 - log w
    np.testing.assert_allclose(metrics["sampler_kl"], (3 - np.log(4) - 0.75 + np.log(4)) / 3, rtol=1e-5)
    grad = jax.grad(lambda x: losses.importance_weight(x, sampler, mask)[0].sum())(old)
    assert (grad == 0).all()


def test_importance_weight_ignores_masked_infinities():
    mask = jnp.array([[True, False]])
    weight, metrics = losses.importance_weight(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, -jnp.inf]]), mask)
    assert weight.tolist() == [[1.0, 0.0]]
    assert all(np.isfinite(float(value)) for value in metrics.values())


def test_unknown_names_raise():
    x, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    for options, message in [
        (dict(algorithm="ppo"), "ppo"),
        (dict(aggregation="mean"), "token_mean"),
        (dict(clip_dual=1.0), "clip_dual"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy_loss(x, x, x, mask, **options)
    with pytest.raises(ValueError, match="k4"):
        losses.kl(x, x, "k4")
    with pytest.raises(ValueError, match="cap"):
        losses.importance_weight(x, x, mask, cap=0)
