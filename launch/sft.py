"""Train the cold start of the tiny Atlas model: `python launch/sft.py --config=configs/sft_atlas.py --workdir=DIR`."""

from absl import flags, logging
from ml_collections import config_flags

from tapo_jax.cold_start import sft
from tapo_jax.config import run_main

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, with its argument: configs/sft_atlas.py or configs/sft_atlas.py:ARGUMENT."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.INFO)
    sft.run(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    run_main(main)
