"""Evaluate a checkpoint: `python launch/eval.py --config=configs/tapo_grpo.py --checkpoint=WORKDIR`.

The checkpoint is a WORKDIR (its newest), a WORKDIR/checkpoints/N, or a model directory in Hugging Face form such as
WORKDIR/export. The results are in a folder named after the data, such as WORKDIR/eval/atlas-held_out.

With --config=configs/benchmarks.py --config.benchmarks.NAME=DIR … the questions are those of published benchmarks, all
in one run that can be killed and started again (docs/evaluate.md).
"""

from absl import flags
from ml_collections import config_flags

from tapo_jax import processes
from tapo_jax.config import run_main

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, with its argument: FILE.py or FILE.py:ARGUMENT."
)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A WORKDIR, a WORKDIR/checkpoints/N, or a model directory.")
OUT = flags.DEFINE_string("out", None, "Where the results are written; left out: the folder eval of the run.")
SAMPLES = flags.DEFINE_integer("samples", 1, "Answers to each question of a benchmark.", lower_bound=1)
PAGE = flags.DEFINE_bool("page", False, "Also write a page of the episodes.")
QUESTIONS = flags.DEFINE_list("questions", [], "With --page and benchmarks: the questions to show, as BENCHMARK/ID.")
flags.mark_flags_as_required(["config", "checkpoint"])


def main(argv: list[str]) -> None:
    del argv
    processes.join()
    from tapo_jax.evaluate import checkpoint  # noqa: PLC0415 - jax may start its devices only after the processes have joined

    checkpoint.run(
        CONFIG.value,
        CHECKPOINT.value,
        OUT.value,
        page=PAGE.value,
        samples=SAMPLES.value,
        questions=QUESTIONS.value,
    )


if __name__ == "__main__":
    run_main(main)
