"""Check whether a run fits its machines: compile its programs for a TPU topology, on a machine without a TPU.

    python launch/compile_check.py --config=configs/tapo_grpo.py:qwen3_vl_4b --topology=v5e:8x8

Prints, for one chip: memory (GiB) of arguments and temporaries, and the peak next to the chip's memory; flops (10¹²),
with loops multiplied out and kernels included, next to the model's own count; collectives (number, GB received); and
the seconds that peak flops, memory and network allow. Then how fast a whole rollout and a whole step can be, and what
limits them. Exits with code 1 if a program does not fit. Needs the TPU
compiler: pip install 'tapo_jax[tpu]'.
"""

import os

from absl import flags
from ml_collections import config_flags

from tapo_jax.config import UserError, run_main

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, with its argument: FILE.py:qwen3_vl_4b.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips and their arrangement: v5e:8x8, v6e:8x8, v5p:4x4x4, tpu7x:4x4x4."
)
PROGRAMS = flags.DEFINE_list("programs", [], "Of train, log_probs, reshard, extend, decode; left out: all of the run.")
WRITTEN = flags.DEFINE_integer("written", 4000, "Tokens that the policy writes in an episode.", lower_bound=1)
SHORT = flags.DEFINE_bool("short", False, "Fewer columns and nothing beside the table.")
OUT = flags.DEFINE_string("out", "", "A JSON file for the numbers.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    del argv
    prepare_environment()
    from tapo_jax.compile_check.check import run_check  # noqa: PLC0415 - jax reads the environment when it is imported

    options = {"written": WRITTEN.value, "out": OUT.value, "short": SHORT.value}
    if not run_check(CONFIG.value, TOPOLOGY.value, tuple(PROGRAMS.value), **options):
        raise UserError("A program does not fit the memory of its chips: see the table.")


def prepare_environment() -> None:
    """Set the environment so that jax runs on the CPU, finds the TPU compiler, and shares it between processes."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    try:
        import libtpu  # noqa: PLC0415 - only here
    except ImportError as error:
        raise UserError("The TPU compiler is missing: install tapo_jax[tpu] (x86-64 Linux).") from error
    os.environ["TPU_LIBRARY_PATH"] = libtpu.get_library_path()


if __name__ == "__main__":
    run_main(main)
