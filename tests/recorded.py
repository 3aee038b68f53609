"""Recorded episodes for tests: scripted players on real scenes with real tools, scored and corrected as in a run."""

import jax
import numpy as np
from rollout_world import chat, pixels

from tapo_jax import records, rewards, tapo
from tapo_jax.atlas.play import Settings
from tapo_jax.cold_start.batches import AtlasSession
from tapo_jax.cold_start.experts import Flaws, expert, play
from tapo_jax.learn.advantages import group_advantages
from tapo_jax.learn.batches import tool_steps
from tapo_jax.records import RecordedEpisode
from tapo_jax.rollout.episode import Limits, open_prompt
from tapo_jax.types import Episode

STEPS = 6
WEIGHTS = {"accuracy": 1.0, "format": 0.5}
LIMITS = Limits(max_turns=STEPS, max_new_tokens=512, max_length=8192)  # in bytes: the tokenizer has no merges


def played(groups: int, group_size: int, *, seed: int = 0, session: AtlasSession | None = None) -> list[list[Episode]]:
    """Scored episodes of `groups` questions by players that make mistakes."""
    session = session or AtlasSession.fictional(seed, Settings())
    rng, store = np.random.default_rng(seed), pixels()
    found = []
    for _ in range(groups):
        prompt, question, scene = session.prompt(rng)
        start = open_prompt(prompt, chat=chat(), image_tokens=store.tokens, tools=session.runner.schemas)
        group = []
        for sample in range(group_size):
            script = expert(question, scene, rng, Flaws())
            episode = play(start, script, runner=session.runner, chat=chat(), limits=LIMITS, image_tokens=store.tokens)
            episode.sample = sample
            episode.rewards = rewards.score(episode)
            episode.reward = rewards.total(episode.rewards, WEIGHTS)
            group.append(episode)
        found.append(group)
    return found


def recorded(
    groups: int, group_size: int, *, step: int = 20, seed: int = 0, session: AtlasSession | None = None
) -> list[RecordedEpisode]:
    """The episodes of one step, with TAPO's corrections."""
    episodes = played(groups, group_size, seed=seed, session=session)
    reward_PxG = np.array([[e.reward for e in group] for group in episodes], np.float32)
    success_PxG = np.array([[e.success for e in group] for group in episodes])
    calls = [[[(t.call.name, t.call.parameters) for t in tool_steps(e, STEPS)] for e in group] for group in episodes]
    advantage_PxG = jax.device_get(jax.jit(group_advantages)(reward_PxG))
    steps = tapo.encode_steps(calls, steps=STEPS, features=256)
    transfer = jax.device_get(jax.jit(tapo.transfer)(steps, success_PxG, advantage_PxG))
    made = []
    for p, group in enumerate(episodes):
        for g, episode in enumerate(group):
            credit = records.credit_fields(transfer, p, g, steps=STEPS, rollouts=group_size, pooled=False)
            made.append(
                records.record(episode, step=step, prompt=p, advantage=float(advantage_PxG[p, g]), credit=credit)
            )
    return made
