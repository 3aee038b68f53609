"""The laboratory: its arithmetic is the trainer's, its first policy is the asked one, and it agrees with the theory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapo_jax import tapo
from tapo_jax.lab import episodes, measure, methods, simulate, theory, worlds
from tapo_jax.lab.methods import Method
from tapo_jax.lab.simulate import Runs
from tapo_jax.lab.worlds import World
from tapo_jax.learn import advantages, losses
from tapo_jax.types import Identity

WORLD = World(guess=0.4, lookup=0.7, skill=0.6, reading=0.5, steps=2)

assign_credit = jax.jit(methods.assign_credit)  # one compilation in place of one for every operation
play = jax.jit(episodes.play, static_argnums=(2, 3))


def played(world=WORLD, prompts=4, group=8, seed=0):
    parameters = worlds.first_parameters(world, jax.random.key(7))
    logits_QxCxM = worlds.policy_logits(world, parameters)
    return parameters, play(world, logits_QxCxM, prompts, group, jax.random.key(seed))


def test_a_transfer_is_that_of_the_same_calls_through_the_whole_of_tapo():
    """Encoded as calls of K tools with one identity parameter, the steps give the laboratory's similarities too."""
    _, batch = played()
    P, G = batch.success_PxG.shape
    option_PxGxC = np.asarray(batch.option_BxT).reshape(P, G, -1)
    groups = [
        [
            [(f"tool {k}", (Identity(str(row[1 + k])),)) if row[0] == 0 else None for k in range(WORLD.steps)]
            for row in group
        ]
        for group in option_PxGxC
    ]
    steps = tapo.encode_steps(groups, steps=WORLD.steps)
    valid_PxS = np.asarray(batch.valid_PxS)
    both_PxSxS = valid_PxS[:, :, None] & valid_PxS[:, None, :]
    sim_PxSxS = np.asarray(tapo.pairwise_similarity(steps))
    np.testing.assert_array_equal(sim_PxSxS[both_PxSxS], np.asarray(batch.sim_PxSxS)[both_PxSxS])
    advantage_PxG = advantages.group_advantages(batch.success_PxG.astype(jnp.float32))
    whole = tapo.transfer(steps, batch.success_PxG, advantage_PxG)
    credit = assign_credit(Method(group=G, rollouts=P * G), batch, jax.random.key(0))
    np.testing.assert_array_equal(credit.corrected_PxS, whole.corrected_PxS)
    assert np.asarray(whole.corrected_PxS).any()
    expected_BxT = tapo.token_advantages(advantage_PxG, whole.advantage_PxS, batch.step_BxT)
    mask_BxT = np.asarray(batch.mask_BxT)
    np.testing.assert_array_equal(np.asarray(credit.advantage_BxT)[mask_BxT], np.asarray(expected_BxT)[mask_BxT])


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "sapo"])
@pytest.mark.parametrize("part", [0, 1])
def test_loss_and_gradient_are_those_of_learn_on_the_same_arrays(algorithm, part):
    """Two updates a batch: rows part, part + 2, … as in training, old log-probabilities from before the first one."""
    method = Method(algorithm=algorithm, group=8, rollouts=32, updates_per_batch=2)
    parameters, batch = played()
    credit = assign_credit(method, batch, jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), parameters)
    old_logp_BxT = episodes.token_logp(WORLD, worlds.policy_logits(WORLD, parameters), batch)
    value, gradient = jax.value_and_grad(simulate.loss_of, argnums=2)(
        WORLD, method, moved, batch, credit.advantage_BxT, old_logp_BxT, part
    )

    def by_learn(parameters):
        logp_QxCxM = jax.nn.log_softmax(worlds.policy_logits(WORLD, parameters), axis=2)
        logp_BxT = logp_QxCxM[0][jnp.arange(WORLD.choices)[None, :], batch.option_BxT]
        arrays = (logp_BxT, old_logp_BxT, credit.advantage_BxT, batch.mask_BxT)
        return losses.policy_loss(*(array_BxT[part::2] for array_BxT in arrays), losses.Settings(algorithm))[0]

    expected_value, expected_gradient = jax.value_and_grad(by_learn)(moved)
    assert abs(float(value)) > 1e-3
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), gradient, expected_gradient)


def test_the_gradient_of_the_table_is_the_sum_over_tokens_in_float64():
    """d loss / d logit of option m = Σ over tokens of -A · ([chosen = m] - p_m) / tokens; to look up is one logit."""
    method = Method(group=8, rollouts=32)
    parameters, batch = played()
    credit = assign_credit(method, batch, jax.random.key(0))
    arguments = (batch, credit.advantage_BxT, None, 0)
    gradient = jax.grad(simulate.loss_of, argnums=2)(WORLD, method, parameters, *arguments)
    logits_CxM = np.asarray(worlds.policy_logits(WORLD, parameters)[0], np.float64)
    probability_CxM = np.exp(logits_CxM) / np.exp(logits_CxM).sum(axis=1, keepdims=True)
    mask_BxT, option_BxT = np.asarray(batch.mask_BxT), np.asarray(batch.option_BxT)
    expected_CxM = np.zeros_like(logits_CxM)
    for b, t in zip(*np.nonzero(mask_BxT), strict=True):
        for m in range(WORLD.options):
            chosen = float(option_BxT[b, t] == m)
            expected_CxM[t, m] -= float(credit.advantage_BxT[b, t]) * (chosen - probability_CxM[t, m]) / mask_BxT.sum()
    expected_CxM[0, 1:] = 0
    np.testing.assert_allclose(gradient["own_CxM"], expected_CxM, atol=1e-7)


@pytest.mark.parametrize("policy", ["table", "network"])
def test_the_first_policy_has_the_asked_probabilities(policy):
    world = dataclasses.replace(WORLD, policy=policy, skill=np.array([0.9, 0.4], np.float32), harmless=0.2)
    parameters = worlds.first_parameters(world, jax.random.key(0))
    right_QxC = worlds.skills(world, worlds.policy_logits(world, parameters))
    np.testing.assert_allclose(right_QxC, np.tile([0.7, 0.9, 0.4, 0.5], (world.questions, 1)), atol=1e-6)
    p_t = (0.9 + 0.1 * 0.2) * (0.4 + 0.6 * 0.2) * 0.5
    np.testing.assert_allclose(worlds.tool_success(world), p_t, rtol=1e-6)
    np.testing.assert_allclose(worlds.accuracy(world, right_QxC), 0.7 * p_t + 0.3 * 0.4, rtol=1e-5)


def test_played_episodes_succeed_as_often_as_the_policy_should():
    world = dataclasses.replace(WORLD, harmless=0.3)
    parameters, batch = played(world, prompts=2000)
    exact = worlds.accuracy(world, worlds.skills(world, worlds.policy_logits(world, parameters)))
    assert abs(float(batch.success_PxG.mean()) - float(exact)) < 4 * 0.5 / np.sqrt(16000)


def test_the_closed_form_gives_the_numbers_of_the_example():
    """q = .5, p_g = .33, p_t = .2: GRPO pushes looking up by p_t - V = -.065 and guessing by +.065, TAPO by +.11."""
    found = theory.expected(0.33, 0.5, 0.2)
    assert (found.lookup, found.guess) == (pytest.approx(-0.065), pytest.approx(0.065))
    assert found.corrected == pytest.approx(0.112, abs=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_simulated_advantages_are_those_of_the_closed_form(beta):
    """Below TAPO's gates' and clip's reach, so that the mean of a group's advantage is that at the mean support."""
    world = World(guess=0.33, lookup=0.5, skill=0.9999, reading=0.2, steps=1)
    found = theory.expected(0.33, 0.5, 0.2, beta=beta, alpha_min=0.05)
    _, batch = played(world, prompts=300, group=64)
    method = Method(beta=beta, alpha_min=0.05, group=64, rollouts=300 * 64)
    credit = assign_credit(method, batch, jax.random.key(0))
    unit = np.sqrt(found.accuracy * (1 - found.accuracy))
    looked_B = np.asarray(batch.mask_BxT)[:, 1]
    step_advantage = unit * np.asarray(credit.advantage_BxT)[looked_B, 1].mean()
    guess_advantage = unit * np.asarray(credit.advantage_BxT)[~looked_B, 0].mean()
    assert step_advantage == pytest.approx(found.corrected, abs=0.007)
    assert guess_advantage == pytest.approx(found.guess, abs=0.007)


def test_tapo_moves_the_border_of_collapse_below_the_guess_rate():
    assert theory.border(0.33, 0.5, tapo=False) == pytest.approx(0.33, abs=1e-3)
    assert 0.08 < theory.border(0.33, 0.5, tapo=True) < 0.17


def test_beta_0_is_the_base_algorithm():
    off, zero = simulate.simulate([(WORLD, Method(tapo=False)), (WORLD, Method(beta=0.0))], range(4), 20)
    np.testing.assert_allclose(off.accuracy, zero.accuracy, atol=1e-5)


def test_a_seed_draws_the_same_numbers_in_every_chunk(monkeypatch):
    cells = [(WORLD, Method(rate=rate)) for rate in (1.0, 3.0)]
    whole = simulate.simulate(cells, range(4), 10)
    monkeypatch.setattr(simulate, "CHUNK", 3)
    for one, other in zip(whole, simulate.simulate(cells, range(4), 10), strict=True):
        np.testing.assert_allclose(one.accuracy, other.accuracy, atol=1e-6)
    assert np.abs(whole[0].accuracy - whole[1].accuracy).max() > 0.01


def test_the_first_simulation_is_found_again():
    """K = 2, guess .3, q .5, skill .6, reading .5, rate .5: .50 and .94 with GRPO, .60 and .95 with TAPO."""
    world = World(guess=0.3, lookup=0.5, skill=0.6, reading=0.5, steps=2)
    plain = {"rate": 0.5 * 4, "aggregation": "seq_mean_token_sum_norm"}
    cells = [(world, Method(tapo=flag, **plain)) for flag in (False, True)]
    grpo, with_tapo = simulate.simulate(cells, range(32), 100)
    assert grpo.accuracy[:, [30, 100]].mean(axis=0) == pytest.approx([0.50, 0.94], abs=0.04)
    assert with_tapo.accuracy[:, [30, 100]].mean(axis=0) == pytest.approx([0.60, 0.95], abs=0.04)


def test_controls_do_what_their_names_say():
    _, batch = played()
    key = jax.random.key(3)
    sizes = {"group": 8, "rollouts": 32}
    failing_PxS = tapo.controls.failing_steps(batch.trajectory_PxS, batch.valid_PxS, batch.success_PxG)
    zero = assign_credit(Method(control="zero_tools", **sizes), batch, key)
    is_tool_BxT = np.asarray(batch.step_BxT) >= 0
    assert np.asarray(zero.advantage_BxT)[is_tool_BxT].min() == 0
    plain = assign_credit(Method(**sizes), batch, key)
    shuffled = assign_credit(Method(control="shuffled", **sizes), batch, key)
    assert not np.array_equal(plain.corrected_PxS, shuffled.corrected_PxS)
    assert np.asarray(shuffled.corrected_PxS & ~failing_PxS).sum() == 0
    gigpo = assign_credit(Method(control="gigpo", **sizes), batch, key)
    assert not np.allclose(gigpo.advantage_BxT, plain.advantage_BxT)


@pytest.mark.parametrize("change", [{"policy": "network"}, {"sharing": 0.5, "spread": 0.5, "overlap": 0.3}])
def test_other_worlds_are_learnt_too(change):
    (runs,) = simulate.simulate([(dataclasses.replace(WORLD, **change), Method(rate=8.0))], range(4), 60)
    assert runs.accuracy[:, -1].mean() > runs.accuracy[:, 0].mean() + 0.1
    assert np.isfinite(runs.accuracy).all()


def runs_of(accuracy_NxU):
    accuracy_NxU = np.asarray(accuracy_NxU, float)
    return Runs(**{field.name: accuracy_NxU for field in dataclasses.fields(Runs)})


def test_updates_to_a_level_count_from_the_first_policy():
    runs = runs_of([[0.1, 0.5, 0.4, 0.9], [0.1, 0.2, 0.3, 0.4]])
    assert measure.updates_to(runs, 0.5).tolist() == [1, np.inf]
    assert measure.median(measure.updates_to(runs, 0.5)) is None
    assert measure.saved_updates(np.array([2.0, 2.0]), np.array([4.0, 4.0]))["mean"] == 0.5
    assert measure.saved_updates(np.array([np.inf, np.inf]), np.array([4.0, 4.0])) is None


def test_a_rate_is_chosen_on_the_other_seeds():
    """The odd seeds like rate 1, so the even ones are judged at it, and the other way round."""
    by_rate = {1.0: runs_of([[0, 0.2], [0, 0.9]]), 2.0: runs_of([[0, 0.8], [0, 0.1]])}
    _, merged = measure.at_best_rate(by_rate, measure.mean_accuracy)
    assert merged.accuracy[:, 1].tolist() == [0.2, 0.1]


@pytest.mark.parametrize(
    "kind, wrong", [(World, {"policy": "tree"}), (World, {"steps": 0}), (Method, {"control": "x"})]
)
def test_a_setting_that_does_not_exist_is_named(kind, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        kind(**wrong)


def test_a_batch_has_whole_groups():
    with pytest.raises(ValueError, match="64 rollouts"):
        Method(group=7)
