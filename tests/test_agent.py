"""What a config says reaches the player of episodes."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from configs import tapo_grpo
from tapo_jax import agent, sharding
from tapo_jax.data import sources
from tapo_jax.models import shipped
from tapo_jax.rewards.judged import Scored
from tapo_jax.rewards.pool import ScorePool
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.types import Prompt


def my_score(episode):
    return {"accuracy": 1.0, "format": 0.0, "letters": float(len(episode.answer))}


def test_instructions_and_rewards_of_ones_own(monkeypatch):
    config = tapo_grpo.get_config("test")
    config.rollout.system, config.reward.source = "Be brief.", "tests.test_agent:my_score"
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, _ = agent.load_model(shipped.DIRECTORY, config.model, mesh)
    made = agent.make_agent(config, shipped.DIRECTORY, model, [], mesh)
    seen = {}

    def rollout(players, *_):
        seen["system"] = players.system
        return [SimpleNamespace(answer="Lima", turns=[])], {}

    monkeypatch.setattr(agent, "rollout", rollout)
    prompts = [Prompt("1", "?", (), ("Lima",))]
    (episode,), _ = made.play(None, prompts, 1, Sampling())
    assert seen["system"] == "Be brief."
    assert episode.rewards == {"accuracy": 1.0, "format": 0.0, "letters": 4.0} and episode.reward == 1.0


def test_the_recipes_tell_a_published_model_how_to_answer():
    for size in tapo_grpo.SIZES:
        assert "<answer>" in tapo_grpo.get_config(size).rollout.system
    assert tapo_grpo.get_config().rollout.system == ""  # the tiny model has learnt it


def test_an_episode_is_scored_while_others_still_play(monkeypatch):
    """The first episode's scorer ends before the rollout does, or the rollout would wait for ever."""
    config = tapo_grpo.get_config("test")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, _ = agent.load_model(shipped.DIRECTORY, config.model, mesh)
    scored = threading.Event()

    def score(episode):
        scored.set()
        return {"accuracy": float(episode.answer == "Lima"), "format": 0.0}

    made = dataclasses.replace(agent.make_agent(config, shipped.DIRECTORY, model, [], mesh), score=score)

    def rollout(players, params, prompts, group_size, sampling, on_episode):
        episodes = [SimpleNamespace(answer="Lima", turns=[]), SimpleNamespace(answer="Quito", turns=[])]
        on_episode(episodes[0])
        assert scored.wait(timeout=10)
        on_episode(episodes[1])
        return episodes, {}

    monkeypatch.setattr(agent, "rollout", rollout)
    episodes, metrics = made.play(None, [], 2, Sampling())
    assert [episode.reward for episode in episodes] == [1.0, 0.0]
    assert 0.0 <= metrics["time/reward"] < 10


@pytest.mark.parametrize("workers", [1, 3])
def test_a_reward_of_ones_own_is_on_as_many_threads_as_the_config_says(workers):
    config = tapo_grpo.get_config("test")
    config.reward.update(source="tests.test_agent:my_score", workers=workers)
    lock, running, most = threading.Lock(), 0, 0

    def score(episode):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return Scored({"accuracy": 1.0, "format": 0.0}, judged=False)

    episodes = [SimpleNamespace(judged=True) for _ in range(6)]
    pool = ScorePool(score, sources.score_workers(config))
    for episode in episodes:
        pool.submit(episode)
    pool.wait(episodes)
    pool.close()
    assert most == workers and not any(episode.judged for episode in episodes)
