"""Train an agent: `python launch/train.py --config=configs/tapo_grpo.py --workdir=DIR`.

The same command resumes a run that was stopped.
"""

from absl import flags
from ml_collections import config_flags

from tapo_jax import processes
from tapo_jax.config import run_main

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, with its argument: FILE.py or FILE.py:ARGUMENT."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of this run is kept.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    del argv
    processes.join()
    from tapo_jax.train import train  # noqa: PLC0415 - jax may start its devices only after the processes have joined

    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    run_main(main)
