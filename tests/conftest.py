"""Tests run on the CPU with eight fake devices, unless JAX_PLATFORMS says otherwise. Set before jax is imported
anywhere."""

import os
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "agg")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
FLAGS = (
    # Devices that share two busy cores may wait for each other longer than the 40 seconds after which XLA gives up.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Most of the suite is compilation of small programs: their code is not optimised.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

# Files with whole runs, longest first: they begin before the others, so that no process is left alone with them.
LONG = (
    "test_train_carry", "test_train", "test_algorithms", "test_faulty_search", "test_notebooks", "test_benchmarks",
    "test_sweep", "test_compilation_cache", "test_judged_run", "test_train_step", "test_mcp", "test_parallel_calls",
)  # fmt: skip


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # several processes: keep the order below
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
