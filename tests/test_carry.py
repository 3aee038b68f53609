"""Episodes that two policies have played, with the real sampler: whose tokens they are, and what a stop changes."""

import numpy as np
import pytest
import rollout_world as world
import test_rollout

from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.flight import Flight
from tapo_jax.rollout.players import Players, Wish
from tapo_jax.rollout.rounds import Stopped, play_groups
from tapo_jax.rollout.schedule import Sampling

P, G, STEPS = 3, 3, 3


@pytest.fixture(autouse=True)
def random_text_means_something(monkeypatch):
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)


@pytest.fixture(scope="module")
def sampler():
    return test_rollout.make_sampler()


class Questions:
    """The questions of `rollout_world`, P a step."""

    def __init__(self):
        self.skipped, self.rows, self._all = 0, [], world.prompts(P * STEPS)

    def __next__(self):
        self.rows = [row + P for row in self.rows] if self.rows else list(range(P))
        return [self.read(row) for row in self.rows]

    def read(self, row):
        return self._all[row]


def make_flight() -> Flight:
    return Flight(
        Questions(), local=range(P), batch=P, group_size=G, carry=2, max_staleness=2, total=STEPS
    )  # fmt: skip


def make_players(sampler, wish=lambda: Wish.NOTHING) -> Players:
    limits, chat = test_rollout.LIMITS, test_rollout.CHAT
    return Players(sampler, chat, world.pixels(), world.runner(), limits, wish=wish)


def one_step(players, flight, step, temperature=0.8):
    """The groups that a step trains on; every step has other weights."""
    groups, sampling = flight.begin(step), Sampling(temperature, seed=3, step=step)
    play_groups(players, world.params(step), groups, sampling, until=flight.until, counts=flight.counts)
    players.sampler.release()
    return flight.take()


def played(sampler, temperature=0.8):
    players, flight = make_players(sampler), make_flight()
    groups = [group for step in range(1, STEPS + 1) for group in one_step(players, flight, step, temperature)]
    return [episode for group in groups for episode in group.episodes]


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_every_token_is_that_of_the_policy_that_drew_it(sampler, temperature):
    """Drawn: it has exactly the log-probability that this policy's plain forward pass gives it, though another policy
    wrote what came before. Greedy: it is this policy's choice."""
    episodes = played(sampler, temperature)
    mixed = sum(len(set(e.policy_T[e.mask_T].tolist())) > 1 for e in episodes)
    images = sum(test_rollout.middle_images(e) for e in episodes if len(set(e.policy_T.tolist())) > 1)
    assert len(episodes) == P * G * STEPS and mixed >= 2 and images >= 1
    batch = test_rollout.pack(episodes)
    policy_BxT = np.zeros(batch.mask_BxT.shape, np.int32)
    for b, episode in enumerate(episodes):
        policy_BxT[b, : len(episode.policy_T)] = episode.policy_T
    for step in range(1, STEPS + 1):
        best_BxT, logp_BxT = test_rollout.full_forward(world.params(step), batch.inputs)
        here = batch.mask_BxT & (policy_BxT == step)
        assert here.sum() > 30
        if temperature:
            np.testing.assert_allclose(np.asarray(logp_BxT)[here], batch.sampler_logp_BxT[here], atol=1e-4, rtol=0)
        else:
            before, after = np.asarray(best_BxT)[:, :-1], batch.inputs.token_BxT[:, 1:]
            assert np.array_equal(before[here[:, 1:]], after[here[:, 1:]])


def test_a_stopped_rollout_goes_on_with_the_tokens_that_it_would_have_drawn(sampler):
    """Log-probabilities differ in rounding: keys and values are computed in other shapes."""
    want, got, flight, rounds = played(sampler), [], make_flight(), 0

    def wish():
        nonlocal rounds
        rounds += 1
        return Wish.STOP if rounds == 5 else Wish.NOTHING

    step = 1
    while step <= STEPS:
        try:
            got += [e for group in one_step(make_players(sampler, wish), flight, step) for e in group.episodes]
            step += 1
        except Stopped:
            sampler.release()
            data, rows = flight.pack(), flight._source.rows
            flight = make_flight()
            flight._source.rows = rows
            flight.unpack(data, make_players(sampler).reopen)
            flight.counts.places = None
    assert rounds > 8 and test_rollout.same_tokens(want, got)
    for one, other in zip(want, got, strict=True):
        np.testing.assert_allclose(one.sampler_logp_T, other.sampler_logp_T, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(one.policy_T, other.policy_T)
