"""What a config says reaches the player of episodes."""

from types import SimpleNamespace

import jax

from configs import tapo_grpo
from tapo_jax import agent, sharding
from tapo_jax.models import shipped
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
        return [SimpleNamespace(answer="Lima")], {}

    monkeypatch.setattr(agent, "rollout", rollout)
    prompts = [Prompt("1", "?", (), ("Lima",))]
    (episode,), _ = made.play(None, prompts, 1, Sampling())
    assert seen["system"] == "Be brief."
    assert episode.rewards == {"accuracy": 1.0, "format": 0.0, "letters": 4.0} and episode.reward == 1.0


def test_the_recipes_tell_a_published_model_how_to_answer():
    for size in tapo_grpo.SIZES:
        assert "<answer>" in tapo_grpo.get_config(size).rollout.system
    assert tapo_grpo.get_config().rollout.system == ""  # the tiny model has learnt it
