"""Remake the pictures of the README and of docs/tour.md: `python docs/make/pictures.py`. About two minutes.

A training run of the `:test` setting is recorded (or taken from --run), a few questions are played, and all of it is
drawn into docs/images.
"""

import argparse
import tempfile
from pathlib import Path

import credit_figure
import tour_figures
from player import CONFIGS, make_player, watch

from tapo_jax.config import beside
from tapo_jax.train import train

IMAGES = Path(__file__).parents[1] / "images"
SLOTS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a run with recorded episodes; default: a new :test run")
    parser.add_argument("--out", type=Path, default=IMAGES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.run is None:
            config = beside(CONFIGS, "tapo_grpo.py")("test,steps=1")
            config.eval.update(at_start=False, at_end=False)
            train(config, folder)
        run = given.run or Path(folder)
        credit_figure.draw(sorted((run / "episodes").glob("step_*.npz")), given.out / "tapo.png")
    player = make_player(slots=SLOTS)
    tour_figures.draw_episode(player, given.out / "episode.png")
    watch(player, 4, 4, step=1)  # compiles
    tour_figures.draw_round(watch(player, 4, 4, step=2), SLOTS, given.out / "rollout.png")


if __name__ == "__main__":
    main()
