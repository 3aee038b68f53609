"""Compiled programs are kept for the next start of a run: the second start compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import tiny_run

ROOT = Path(__file__).parents[1]
PROGRAM = """
import collections, pathlib, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))
import tiny_run
from tapo_jax.train import train
tiny_run.patch(setattr)
train(tiny_run.config(pathlib.Path(sys.argv[1]), total_steps=1, compilation_cache=sys.argv[3]), sys.argv[2])
print(events["cache_hits"], events["cache_misses"])
"""


def start(tmp_path: Path, name: str, where: str = "") -> tuple[int, int]:
    """Run one step in a folder of its own. Returns (programs read from the disk, programs compiled)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(tmp_path / name), where],
        env=env, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    hits, misses = found.stdout.split()[-2:]
    return int(hits), int(misses)


def test_a_second_start_compiles_nothing_and_a_damaged_program_is_compiled_again(tmp_path):
    tiny_run.write_model(tmp_path / "model")
    _, compiled = start(tmp_path, "first")
    assert compiled > 10
    read, compiled = start(tmp_path, "second")
    assert compiled == 0 and read > 10
    kept = list((tmp_path / "cache" / "tapo_jax" / "compiled").rglob("*-cache"))
    for path in kept:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read, _ = start(tmp_path, "third")
    assert read == 0
    assert start(tmp_path, "fourth", "off") == (0, 0)
