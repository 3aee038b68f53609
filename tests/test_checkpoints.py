"""Saving and restoring a state over a mesh, and everything that can be wrong with a checkpoint or a disk."""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapo_jax import sharding
from tapo_jax.config import UserError
from tapo_jax.learn.checkpoints import Checkpoints, fingerprint, read_params
from tapo_jax.learn.state import TrainState

DATA = {"next_index": 7}


def make_state(seed: int = 0, rows: int = 64) -> TrainState:
    mesh = sharding.make_mesh(4, 2, 1)
    weights = np.random.default_rng(seed).normal(size=(rows, 256)).astype(np.float32)
    number = lambda n: sharding.put_replicated(np.int32(n), mesh)  # noqa: E731
    return TrainState(
        update=number(3),
        params={"w": sharding.put_rows(weights, mesh, rows)},
        opt_state={"m": number(1)},
        skipped=number(0),
        skipped_in_a_row=number(0),
    )


def saved(folder: Path, steps: tuple[int, ...] = (1, 2)) -> Checkpoints:
    made = Checkpoints(folder, keep=2)
    for step in steps:
        made.save(step, make_state(step), data=DATA, seed=5)
    made.wait()
    return made


def test_what_is_restored_is_what_was_saved_in_the_layout_of_the_mesh(tmp_path):
    saved(tmp_path).close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == 2
    state, data, run = again.restore(2, make_state())
    np.testing.assert_array_equal(state.params["w"], make_state(2).params["w"])
    assert state.params["w"].sharding == make_state().params["w"].sharding
    assert (int(state.update), data, run["step"], run["seed"]) == (3, DATA, 2, 5)
    assert run["params_fingerprint"] == int(fingerprint(state.params))


def test_only_the_newest_are_kept_and_a_fresh_folder_has_none(tmp_path):
    assert Checkpoints(tmp_path / "fresh", keep=2).latest() is None
    saved(tmp_path / "run", (1, 2, 3)).close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["2", "3"]


def test_a_donated_state_does_not_reach_the_checkpoint(tmp_path):
    """Writing goes on in the background while the next update reuses the arrays' memory."""
    made, state = Checkpoints(tmp_path, keep=2), make_state(1, rows=4096)
    want = np.array(state.params["w"])
    made.save(1, state, data=DATA, seed=0)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    made.close()
    np.testing.assert_array_equal(
        Checkpoints(tmp_path, keep=2).restore(1, make_state(1, rows=4096))[0].params["w"], want
    )


def test_what_a_kill_left_half_written_is_passed_over(tmp_path):
    saved(tmp_path).close()
    (tmp_path / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert Checkpoints(tmp_path, keep=2).latest() == 2


def array_file(folder: Path) -> Path:
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["cut", "one bit", "gone", "not json", "other data position"])
def test_a_damaged_checkpoint_is_one_sentence_that_names_the_way_out(tmp_path, damage):
    saved(tmp_path).close()
    array, run, data = (
        array_file(tmp_path / "2"),
        tmp_path / "2" / "run" / "metadata",
        tmp_path / "2" / "data" / "metadata",
    )
    if damage == "cut":
        array.write_bytes(array.read_bytes()[: array.stat().st_size // 2])
    elif damage == "one bit":
        content = bytearray(array.read_bytes())
        content[len(content) // 2] ^= 1
        array.write_bytes(content)
    elif damage == "gone":
        array.unlink()
    elif damage == "not json":
        run.write_text(run.read_text()[:-5])
    else:
        data.write_text(data.read_text().replace("7", "8"))
    with pytest.raises(
        UserError, match=r"/2 cannot be read into this model.*delete that folder, and the run goes on from step 1"
    ) as raised:
        Checkpoints(tmp_path, keep=2).restore(2, make_state())
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_another_shape_is_one_sentence(tmp_path):
    saved(tmp_path, (1,)).close()
    with pytest.raises(
        UserError, match=r"use the config that wrote it, or delete that folder, and the run starts again"
    ):
        Checkpoints(tmp_path, keep=2).restore(1, make_state(rows=32))


def test_a_full_disk_is_one_sentence_and_older_checkpoints_stay(tmp_path):
    """No file may grow past 64 KiB from here on, as on a disk that has no more room; the array has 8 MiB."""
    made = saved(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        sentence = r"could not be written .* make room on the disk .* older checkpoints are intact"
        with pytest.raises(UserError, match=sentence):  # noqa: PT012 - whichever of the two notices
            made.save(3, make_state(3, rows=8192), data=DATA, seed=5)
            made.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == 2
    np.testing.assert_array_equal(again.restore(2, make_state())[0].params["w"], make_state(2).params["w"])


FULL = """
import pathlib, resource, sys
import test_checkpoints as here
from tapo_jax.config import run_main

def main(argv):
    made = here.saved(pathlib.Path(argv[1]), (1,))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
    made.save(2, here.make_state(2, rows=4096), data=here.DATA, seed=5)
    made.close()

run_main(main, words=True)
"""


def test_on_a_full_disk_a_program_prints_one_line(tmp_path):
    """Threads of orbax log a page for each array that they could not write."""
    path = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"
    env = os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "8"}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # its files would be cut too
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ended = subprocess.run(command, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if "Waiting for previous save" not in line]  # a slow machine
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: The checkpoint in ") and "make room on the disk" in lines[0]


def test_the_fingerprint_sees_a_flipped_bit_and_swapped_values():
    x = jnp.arange(12.0).reshape(3, 4)
    base = int(fingerprint({"a": x}))
    assert base == int(fingerprint({"a": x}))
    assert base != int(fingerprint({"a": x.at[1, 2].set(np.nextafter(np.float32(6), np.float32(7)))}))
    assert base != int(fingerprint({"a": x[::-1]})) and base != int(fingerprint({"a": x[:, ::-1]}))
    assert int(fingerprint((x, x + 1))) != int(fingerprint((x + 1, x)))


def test_the_fingerprint_is_that_of_any_mesh():
    state = make_state(1)
    host = dataclasses.replace(state, params=jax.device_get(state.params))
    assert int(fingerprint(state.params)) == int(fingerprint(host.params))


def test_weights_that_the_run_did_not_train_are_one_sentence(tmp_path):
    """The run trained everything and the config asks for low-rank parameters, which its checkpoint does not have."""
    saved(tmp_path)
    like = make_state().params | {"lora": make_state().params["w"]}
    with pytest.raises(UserError, match="cannot be read into the model of this config"):
        read_params(tmp_path / "2", like)
