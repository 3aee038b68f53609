"""One process of a run with a judge: python judged_process.py WORKDIR MODEL_DIRECTORY JUDGE_ENDPOINT. Nothing that is
answered is right by exact match, so that every answer is judged."""

import dataclasses
from pathlib import Path

import rollout_world as world
import tiny_run

from tapo_jax import processes
from tapo_jax.config import run_main


def main(argv: list[str]) -> None:
    processes.join()
    from tapo_jax.data import sources
    from tapo_jax.train import train

    _, workdir, model, endpoint = argv
    tiny_run.patch(setattr)
    prompts = [dataclasses.replace(prompt, answers=("nothing that is said",)) for prompt in world.prompts(24)]
    sources.prompts = lambda config, split: prompts
    config = tiny_run.config(Path(model), total_steps=20, eval__at_start=False)
    config.data.prompts_per_step = 8
    config.reward.judge.update(endpoint=endpoint, model="m")
    train(config, workdir)


if __name__ == "__main__":
    run_main(main, words=True)
