"""One process of several that score together: python judged_process.py JUDGE_ENDPOINT. Its episodes have ended already;
nothing that was answered is right by exact match, so that the judge is asked about each of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tapo_jax import processes
from tapo_jax.config import beside, run_main
from tapo_jax.types import Episode, Prompt


def ended(number: int) -> Episode:
    nothing = np.zeros(0, np.float32)
    ids, mask = nothing.astype(np.int32), nothing.astype(bool)
    return Episode(Prompt(str(number), "?", (), ("x",)), 0, ids, mask, nothing, [], [], [], str(number), "answer")


def rollout(players, params, prompts, group_size, sampling, on_episode):
    episodes = [ended(number) for number in range(24)]
    for episode in episodes:
        on_episode(episode)
    return episodes, {}


def main(argv: list[str]) -> None:
    processes.join()
    from tapo_jax import agent  # importing it starts jax, which has to know of the other processes by then
    from tapo_jax.rollout.schedule import Sampling

    config = beside(str(Path(__file__).parents[1] / "configs" / "x"), "tapo_grpo.py")("test")
    config.eval.judge.update(endpoint=argv[1], model="m")
    agent.rollout = rollout
    players = SimpleNamespace(sampler=SimpleNamespace(release=lambda: None))
    made = agent.examiner(agent.Agent(players, None, {"accuracy": 1.0}), config)
    episodes, _ = made.play(None, [], 1, Sampling())
    print(f"all {len(episodes)} are scored")


if __name__ == "__main__":
    run_main(main, words=True)
