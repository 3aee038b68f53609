"""Credit transfer on groups small enough to work out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapo_jax import tapo
from tapo_jax.learn import losses
from tapo_jax.types import Text

OPTIONS = dict(theta=0.7, alpha_min=0.25, beta=0.8)


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(tapo.transfer_from_similarity, settings=tapo.Settings(**options)))


def transfer(sim, success, advantage, valid=None, jit=True, **options):
    """One group with K = 2 steps a rollout; sim is an upper triangle as {(i, j): value}."""
    G = len(success)
    full = np.eye(2 * G, dtype=np.float32)
    for (i, j), value in sim.items():
        full[i, j] = full[j, i] = value
    valid = np.ones((1, 2 * G), bool) if valid is None else np.array([valid], bool)
    trajectory = np.array([np.arange(2 * G) // 2], np.int32)
    weight = options.pop("weight_PxG", np.ones((1, G), np.float32))
    options = {**OPTIONS, **options}
    function = (
        compiled(**options)
        if jit
        else functools.partial(tapo.transfer_from_similarity, settings=tapo.Settings(**options))
    )
    success, advantage = np.array([success], bool), np.array([advantage], np.float32)
    return function(full[None], trajectory, valid, success, advantage, weight_PxG=weight)


# Three rollouts, slots (0 1) (2 3) (4 5). The first two succeed with advantages 0.5 and 0.7, the third fails with -1.2.
# Slot 4 repeats what slots 0 and 2 did; slot 5 resembles slot 3 only.
SIM = {(0, 2): 0.9, (4, 0): 0.8, (4, 2): 0.75, (5, 3): 0.72}
SUCCESS, ADVANTAGE = [True, True, False], [0.5, 0.7, -1.2]


@pytest.mark.parametrize("jit", [False, True])
def test_by_hand(jit):
    result = transfer(SIM, SUCCESS, ADVANTAGE, jit=jit)
    # Clusters {0, 2}, {1}, {3}. Slot 4: sim 0.8 to {0, 2}, sup 2/2, Adv (0.5 + 0.7)/2 = 0.6: F = 0.48, A = -1.2 +
    # 0.8·0.48. Slot 5: sim 0.72 to {3}, sup 1/2: 0.36 ≥ 0.25; Adv 0.7: F = 0.252, A = -1.2 + 0.2016.
    np.testing.assert_allclose(result.advantage_PxS, [[0.5, 0.5, 0.7, 0.7, -0.816, -0.9984]], rtol=1e-6)
    assert result.corrected_PxS.tolist() == result.correctable_PxS.tolist() == [[False] * 4 + [True] * 2]
    np.testing.assert_allclose(result.sim_PxS, [[1, 1, 1, 1, 0.8, 0.72]], rtol=1e-6)
    assert result.support_PxS.tolist() == [[1, 0.5, 1, 0.5, 1, 0.5]]
    assert result.cluster_PxS.tolist() == [[0, 1, 0, 3, 0, 3]]
    assert result.witness_PxS.tolist() == [[0, 1, 2, 3, 0, 3]]
    assert result.clusters_P.tolist() == [3]


@pytest.mark.parametrize("aggregate, credit", [("mean", 0.6), ("max", 0.7), ("min", 0.5)])
def test_aggregates(aggregate, credit):
    result = transfer(SIM, SUCCESS, ADVANTAGE, aggregate=aggregate)
    np.testing.assert_allclose(result.advantage_PxS[0, 4], -1.2 + 0.8 * 0.8 * credit, rtol=1e-6)


def test_gates():
    # theta 0.75: slot 5 (0.72) is no match. alpha_min 0.4: slot 5 matches, but 0.72 · 1/2 < 0.4.
    high = transfer(SIM, SUCCESS, ADVANTAGE, theta=0.75)
    assert high.correctable_PxS.tolist() == high.corrected_PxS.tolist() == [[False] * 4 + [True, False]]
    rare = transfer(SIM, SUCCESS, ADVANTAGE, alpha_min=0.4)
    assert rare.correctable_PxS.tolist() == [[False] * 4 + [True, True]]
    assert rare.corrected_PxS.tolist() == [[False] * 4 + [True, False]]
    assert float(rare.advantage_PxS[0, 5]) == np.float32(-1.2)
    # Without support every cluster counts 1: slot 5 passes again and gets the whole 0.72 · 0.7.
    free = transfer(SIM, SUCCESS, ADVANTAGE, alpha_min=0.4, support=False)
    np.testing.assert_allclose(free.advantage_PxS[0, 5], -1.2 + 0.8 * 0.72 * 0.7, rtol=1e-6)


def test_clip_is_compensation_never_praise():
    # beta 4: slot 4 would get -1.2 + 4·0.48 = 0.72.
    assert float(transfer(SIM, SUCCESS, ADVANTAGE, beta=4.0).advantage_PxS[0, 4]) == 0
    free = transfer(SIM, SUCCESS, ADVANTAGE, beta=4.0, clip=False)
    np.testing.assert_allclose(free.advantage_PxS[0, 4], 0.72, rtol=1e-6)


def test_negative_cluster_advantage_gives_nothing():
    # A success can have a negative advantage (its format part was bad): F is 0, and nothing is punished more.
    result = transfer(SIM, SUCCESS, [-0.5, -0.7, -1.2])
    np.testing.assert_allclose(result.advantage_PxS[0, 4:], [-1.2, -1.2], rtol=1e-6)
    assert result.corrected_PxS[0, 4]


def test_failing_trajectory_with_positive_advantage_is_left_alone():
    result = transfer(SIM, SUCCESS, [0.5, 0.7, 0.3])
    np.testing.assert_allclose(result.advantage_PxS[0, 4:], [0.3, 0.3], rtol=1e-6)
    assert not result.corrected_PxS.any() and result.correctable_PxS[0, 4]


def test_components_chain_where_leaders_split():
    # 0 ~ 2 (0.8) and 2 ~ 1 (0.8), but 0 and 1 are 0.6 apart: one component; slot 1 finds leader 0 too far and leads,
    # slot 2 joins the leader it is most similar to: equal, so the earlier one.
    sim = {(0, 2): 0.8, (1, 2): 0.8, (0, 1): 0.6, (4, 1): 0.9}
    valid = [True, True, True, False, True, False]
    chain = transfer(sim, SUCCESS, ADVANTAGE, valid)
    assert chain.cluster_PxS.tolist() == [[0, 0, 0, -1, 0, -1]] and chain.clusters_P.tolist() == [1]
    greedy = transfer(sim, SUCCESS, ADVANTAGE, valid, cluster="leader")
    assert greedy.cluster_PxS.tolist() == [[0, 1, 0, -1, 1, -1]] and greedy.clusters_P.tolist() == [2]
    # cluster {1} is known to one of two successes: sup 1/2, Adv 0.5
    np.testing.assert_allclose(greedy.advantage_PxS[0, 4], -1.2 + 0.8 * 0.9 * 0.5 * 0.5, rtol=1e-6)
    # a wider cluster_theta joins 0 and 1 although theta is 0.7
    assert transfer(sim, SUCCESS, ADVANTAGE, valid, cluster="leader", cluster_theta=0.6).clusters_P.tolist() == [1]


def test_long_chain_is_one_component_in_any_order():
    S = 64
    order = np.random.default_rng(0).permutation(S)
    sim = np.eye(S, dtype=np.float32)
    sim[order[:-1], order[1:]] = sim[order[1:], order[:-1]] = 0.9
    trajectory = (np.arange(S, dtype=np.int32) // 8)[None]
    args = sim[None], trajectory, np.ones((1, S), bool), np.ones((1, 8), bool), np.ones((1, 8), np.float32)
    result = compiled(**OPTIONS)(*args)
    assert result.clusters_P.tolist() == [1] and (result.cluster_PxS == 0).all()


def test_ties_go_to_the_larger_support_then_to_the_lower_slot():
    # Slot 4 is 0.8 from slot 0 (alone, sup 1/2) and from slot 1, which shares a cluster with slot 2 (sup 1).
    result = transfer({(4, 0): 0.8, (4, 1): 0.8, (1, 2): 0.9}, SUCCESS, ADVANTAGE)
    assert int(result.cluster_PxS[0, 4]) == 1 and float(result.support_PxS[0, 4]) == 1
    # Equal support: the lower slot, and its advantage 0.5.
    result = transfer({(4, 1): 0.8, (4, 2): 0.8}, SUCCESS, ADVANTAGE)
    assert int(result.cluster_PxS[0, 4]) == int(result.witness_PxS[0, 4]) == 1
    np.testing.assert_allclose(result.advantage_PxS[0, 4], -1.2 + 0.8 * 0.8 * 0.5 * 0.5, rtol=1e-6)


def test_tools_stay_apart_at_theta_zero():
    result = transfer({(0, 2): 0.5}, SUCCESS, ADVANTAGE, theta=0.0)
    assert result.cluster_PxS.tolist()[0][:4] == [0, 1, 0, 3]


def test_groups_without_witness():
    nobody = transfer(SIM, [False] * 3, ADVANTAGE)
    assert nobody.cluster_PxS.tolist() == nobody.witness_PxS.tolist() == [[-1] * 6]
    assert not nobody.correctable_PxS.any() and (nobody.sim_PxS == 0).all()
    np.testing.assert_array_equal(nobody.advantage_PxS[0], np.repeat(np.float32(ADVANTAGE), 2))
    everybody = transfer(SIM, [True] * 3, ADVANTAGE)
    assert not everybody.correctable_PxS.any()
    np.testing.assert_array_equal(everybody.advantage_PxS[0], np.repeat(np.float32(ADVANTAGE), 2))


def test_weights_of_remembered_trajectories():
    # The second success counts half: sup({0, 2}) = 1.5/1.5, Adv = (0.5 + 0.5·0.7)/2; sup({3}) = 0.5/1.5, Adv = 0.35.
    result = transfer(SIM, SUCCESS, ADVANTAGE, alpha_min=0.0, weight_PxG=jnp.array([[1.0, 0.5, 1.0]]))
    np.testing.assert_allclose(result.advantage_PxS[0, 4], -1.2 + 0.8 * 0.8 * 0.425, rtol=1e-6)
    np.testing.assert_allclose(result.advantage_PxS[0, 5], -1.2 + 0.8 * 0.72 / 3 * 0.35, rtol=1e-6)


def test_token_advantages_by_hand():
    # P = 1, G = 2, K = 2: row g, slot g·2 + k.
    step = np.array([[-1, 0, 0, 1, -1], [0, -1, 1, 1, 1]], np.int32)
    result = tapo.token_advantages(np.float32([[5, -6]]), np.float32([[1, 2, -3, -4]]), step)
    assert result.tolist() == [[5, 1, 1, 2, 5], [-3, -6, -4, -4, -4]]


def test_diagnostics_by_hand():
    # A second group without success, whose failing rollouts have one step each.
    result = transfer(SIM, SUCCESS, ADVANTAGE)
    other = transfer({}, [False] * 3, [0, 0, 0], [1, 0, 1, 0, 1, 0])
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), result, other)
    trajectory = np.tile(np.arange(6, dtype=np.int32) // 2, (2, 1))
    valid = np.array([[1] * 6, [1, 0] * 3], bool)
    success = np.array([SUCCESS, [False] * 3])
    advantage = np.float32([ADVANTAGE, [0, 0, 0]])
    metrics = jax.jit(tapo.diagnostics)(both, trajectory, valid, success, advantage)
    expected = {
        "tapo/correctable_actions": 2 / 5,  # slots 4 and 5 of five failing steps
        "tapo/correctable_trajectories": 1 / 4,
        "tapo/corrected_actions": 2 / 5,
        "tapo/mean_compensation": (0.384 + 0.2016) / 2,
        "tapo/witness_clusters": 3,  # three clusters in the one group that has a witness
        "tapo/groups_without_witness": 1 / 2,
        "tapo/correctable_actions_at_0.5": 2 / 5,
        "tapo/correctable_actions_at_0.8": 1 / 5,
        "tapo/correctable_trajectories_at_0.8": 1 / 4,
        "tapo/correctable_actions_at_0.9": 0,
        "tapo/failing_actions": 5,
        "tapo/failing_trajectories": 4,
        "tapo/witnesses": 4,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(float(metrics[name]), value, rtol=1e-5, err_msg=name)
    # Counts of the two groups add up to the batch's.
    parts = [
        jax.jit(tapo.diagnostic_counts)(r, trajectory[:1], valid[i : i + 1], success[i : i + 1], advantage[i : i + 1])
        for i, r in enumerate((result, other))
    ]
    summed = tapo.diagnostics_from_counts(jax.tree.map(jnp.add, *parts))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), summed, metrics)


def test_nothing_failing_gives_zero_fractions():
    result = transfer(SIM, [True] * 3, ADVANTAGE)
    trajectory = np.arange(6, dtype=np.int32)[None] // 2
    valid, success = np.ones((1, 6), bool), np.ones((1, 3), bool)
    metrics = jax.jit(tapo.diagnostics)(result, trajectory, valid, success, np.float32([ADVANTAGE]))
    assert float(metrics["tapo/correctable_actions"]) == 0 and all(np.isfinite(float(v)) for v in metrics.values())


@pytest.mark.parametrize("algorithm", losses.LOSSES)
def test_gradient_reaches_each_token_by_its_own_step(algorithm):
    """From calls to the gradient: on policy every algorithm's gradient is -A / tokens of the token's own step."""
    right, other = (("search", (Text(query),)) for query in ("eiffel tower", "rome"))
    groups = [[[right], [right, other]]]
    steps = tapo.encode_steps(groups, steps=2)
    success, advantage = np.array([[True, False]]), np.float32([[1.0, -0.7]])

    @jax.jit
    def gradient(logp, step):
        result = tapo.transfer(steps, success, advantage)
        token = tapo.token_advantages(advantage, result.advantage_PxS, step)
        mask = jnp.ones(logp.shape, bool)
        return jax.grad(lambda x: losses.policy_loss(x, logp, token, mask, losses.Settings(algorithm))[0])(logp)

    step = np.array([[0, 0, -1], [0, 1, -1]], np.int32)
    # The failing rollout's first call is the successful one's: -0.7 + 0.8·1·1·1 > 0, clipped to 0: no gradient at all.
    # Its second call has nothing in common with it and keeps -0.7, as does its answer.
    expected = -np.array([[1, 1, 1], [0, -0.7, -0.7]]) / 6
    np.testing.assert_allclose(gradient(jnp.full((2, 3), -1.0), step), expected, rtol=1e-5, atol=1e-9)


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="components"):
        transfer(SIM, SUCCESS, ADVANTAGE, cluster="kmeans")
    with pytest.raises(ValueError, match="mean"):
        transfer(SIM, SUCCESS, ADVANTAGE, aggregate="median")
    steps = tapo.encode_steps([[[("a", ())], []]], steps=1)
    args = steps, np.array([[True, False]]), np.float32([[1, -1]])
    with pytest.raises(ValueError, match="prompt"):
        tapo.Settings(scope="world")
    with pytest.raises(ValueError, match="shuffled"):
        tapo.Settings(control="random")
    with pytest.raises(ValueError, match="key"):
        tapo.transfer(*args, tapo.Settings(control="shuffled"))
