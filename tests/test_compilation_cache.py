"""Compiled programs are kept for the next start of a run: the second start compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import tiny_run

from tapo_jax import programs

ROOT = Path(__file__).parents[1]
PROGRAM = """
import collections, pathlib, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))
import tiny_run
from tapo_jax.train import train
tiny_run.patch(setattr)
train(tiny_run.config(pathlib.Path(sys.argv[1]), total_steps=1), sys.argv[2])
print(events["cache_hits"], events["cache_misses"])
"""


def start(tmp_path: Path, name: str) -> tuple[int, int]:
    """Run one step in a folder of its own. Returns (programs read from the disk, programs compiled)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env["JAX_NUM_CPU_DEVICES"] = "1"
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(tmp_path / name)],
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


def test_nothing_is_kept_where_it_is_off_and_the_environment_goes_first(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    programs.keep_compiled(str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    programs.keep_compiled("off")
    assert jax.config.jax_compilation_cache_dir == before
