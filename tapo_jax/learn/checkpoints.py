"""Checkpoints of a run with orbax: {state, data, run}, each written whole or not at all.

A checkpoint after step n (`WORKDIR/checkpoints/n/`) has `state`, the TrainState with its layout over the mesh; `data`,
the host's state (position of the data iterator, memory of witnesses); `run`, the step, the seed and a fingerprint
of the state; `flight`, the conversations that are in flight then, if there are any. There is no generator state: all
random numbers are folded from (seed, step, prompt, sample, turn).

What is in flight in the middle of the rollout of step n + 1 is saved next to checkpoint n, without the state, which has
not changed: `WORKDIR/in_flight/`, of which only the newest is kept.

The order of resuming, which `train.py` follows:
1. build mesh, model and optimizer from the config, so that shapes and layouts are known;
2. find the newest complete checkpoint (a folder that a kill left half-written has a temporary name and is removed);
3. restore the state into the layout and compare its fingerprint;
4. restore the data iterator, the memory of witnesses, and what is in flight;
5. cut metrics.jsonl after step n;
6. continue with step n + 1, whose keys are folded from n + 1.
So a run that was killed after any step and resumed writes what the uninterrupted run would have written.
"""

import gc
import json
import logging
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from tapo_jax import sharding
from tapo_jax.config import UserError
from tapo_jax.learn import blobs
from tapo_jax.learn.state import TrainState


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """Return a uint32 hash of the bits of every leaf.

    It changes when any bit of the state does, except by a coincidence of 1 in 4 billion."""

    def leaf(array: jax.Array) -> jax.Array:
        kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
        bits = jax.lax.bitcast_convert_type(array, kinds[array.dtype.itemsize]).astype(jnp.uint32)
        weight = jnp.ones(array.shape, jnp.uint32)
        for axis in range(array.ndim):  # an odd weight for each index, so that swapped values change the hash
            place = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            weight *= place * jnp.uint32(2 * (40503 + 2 * axis)) + jnp.uint32(1)
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    total = jnp.uint32(0)
    for array in jax.tree.leaves(tree):
        total = total * jnp.uint32(1664525) + leaf(array)
    return total


class _RaisedLater(logging.Filter):
    """Leaves out what a thread of orbax logs of its failure: a page for each array, and `wait` raises it, once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and Path(record.pathname).name in _SAVING)


_SAVING = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")  # of orbax
_raised_later = _RaisedLater()


class Checkpoints:
    """The checkpoints of one run. Every process makes one and calls every method.

    directory: of the checkpoints; the folder `in_flight` is next to it.
    keep: number of checkpoints that are kept.
    mesh: that of the state, for what is in flight.
    """

    def __init__(self, directory: Path, *, keep: int, mesh: Mesh | None = None) -> None:
        self.directory, self._mesh = directory.absolute(), mesh
        self._manager = _manager(self.directory, keep)
        self._flights = self._open_flights() if self._folder.exists() else None
        logging.getLogger("absl").addFilter(_raised_later)  # once, however often
        _silence_late_futures()

    @property
    def _folder(self) -> Path:
        return self.directory.parent / "in_flight"

    def _open_flights(self) -> Any:
        return _manager(self._folder, 1)

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None in a fresh folder."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, *, data: dict[str, Any], seed: int, flight: bytes | None = None
    ) -> None:
        """Start writing; the state may be donated as soon as this returns. Raises UserError if it cannot be written.

        A fingerprint of only the parameters is saved too, for programs that read nothing else. Does nothing if the step
        is saved already.
        """
        if step in self._manager.all_steps():
            return
        state_mark, params_mark = jax.device_get((fingerprint(state), fingerprint(state.params)))
        run = {"step": step, "seed": seed, "fingerprint": int(state_mark), "params_fingerprint": int(params_mark)}
        self._write(self._manager, step, run, data, flight, state=ocp.args.StandardSave(state))

    def save_flight(
        self,
        step: int,
        state: TrainState,
        *,
        data: dict[str, Any],
        seed: int,
        flight: bytes,
        slots: Any = None,
    ) -> None:
        """Start writing what is in flight in the middle of the rollout after `step`, and the state if it is not saved.

        slots: the sampler's arrays, so that the rollout can go on with them; None: without them.

        A checkpoint that is new holds the same, without the slots. Raises UserError if it cannot be written.
        """
        self.save(step, state, data=data, seed=seed, flight=flight)
        run = {"step": step, "seed": seed, "params_fingerprint": int(jax.device_get(fingerprint(state.params)))}
        self._flights = self._flights or self._open_flights()
        items = {} if slots is None else {"slots": ocp.args.StandardSave(slots)}
        run["slots"] = _shapes(slots)
        self._write(self._flights, (self._flights.latest_step() or 0) + 1, run, data, flight, **items)

    def _write(
        self, manager: Any, number: int, run: dict[str, Any], data: dict[str, Any], flight: bytes | None, **items: Any
    ) -> None:
        run["data_check"] = _check(data)
        if flight is not None:
            array = blobs.put_bytes(flight, self._mesh)
            run["flight"] = list(array.shape)
            items["flight"] = ocp.args.StandardSave({"bytes": array})
        items |= {"data": ocp.args.JsonSave(data), "run": ocp.args.JsonSave(run)}
        try:
            manager.save(number, args=ocp.args.Composite(**items), force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Wait until everything saved is on the disk. Raises UserError if it could not be written."""
        try:
            for manager in self._managers:
                manager.wait_until_finished()
                manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    @property
    def _managers(self) -> list[Any]:
        return [self._manager] if self._flights is None else [self._manager, self._flights]

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """Return (state, data, run) of a step.

        like: a state of the same shapes; the restored one gets its layout.

        Raises UserError if the checkpoint cannot be read."""
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore(), run=ocp.args.JsonRestore()
        )
        problem = None
        try:
            found = self._manager.restore(step, args=items)
            state, data, run = found["state"], found["data"], found["run"]
            if int(jax.device_get(fingerprint(state))) != run["fingerprint"] or _check(data) != run["data_check"]:
                problem = "its content is not what was saved"
        except Exception as error:  # orbax and its readers raise many kinds for a damaged file
            problem = _first_line(error)
        if problem is not None:
            _forget_failed_reads()
            raise self._unreadable(step, problem)
        return state, data, run

    def restore_flight(self, run: dict[str, Any], slots: Any = None) -> tuple[bytes | None, dict[str, Any] | None, Any]:
        """Return the newest of what this process had in flight after the step of `run`, the data and slots of then.

        slots: the sampler's arrays as shapes with layouts.

        The bytes are None if nothing was in flight, the data if they are those of the checkpoint, and the slots if they
        were not saved or had other shapes. Raises UserError if it was saved from another mesh or cannot be read.
        """
        try:
            number = self._flights.latest_step() if self._flights is not None else None
            if number is not None:
                items = ocp.args.Composite(data=ocp.args.JsonRestore(), run=ocp.args.JsonRestore())
                found = self._flights.restore(number, args=items)
                same = all(found["run"][name] == run[name] for name in ("step", "seed", "params_fingerprint"))
                if same and _check(found["data"]) == found["run"]["data_check"]:
                    held = None
                    if slots is not None and found["run"]["slots"] == _shapes(slots):
                        items = ocp.args.Composite(slots=ocp.args.StandardRestore(slots))
                        held = self._flights.restore(number, args=items)["slots"]
                    return self._flight(self._flights, number, found["run"]), found["data"], held
                self._flights.delete(number)  # of a rollout that has ended, or of another run
            return self._flight(self._manager, run["step"], run), None, None
        except Exception as error:  # orbax and its readers raise many kinds for a damaged file
            problem = _first_line(error)
        _forget_failed_reads()
        raise self._unreadable(run["step"], problem)

    def _flight(self, manager: Any, number: int, run: dict[str, Any]) -> bytes | None:
        """Return what this process had in flight. Raises ValueError if it was saved from another mesh."""
        if "flight" not in run or self._mesh is None:
            return None
        shards = sharding.batch_shards(self._mesh)
        if run["flight"][0] != shards:
            raise ValueError(
                f"what is in flight was split {run['flight'][0]} ways by the mesh (mesh.data × mesh.fsdp), and is now "
                f"split {shards} ways"
            )
        like = {"bytes": blobs.abstract(tuple(run["flight"]), self._mesh)}
        found = manager.restore(number, args=ocp.args.Composite(flight=ocp.args.StandardRestore(like)))
        return blobs.take_bytes(found["flight"]["bytes"])

    def close(self) -> None:
        self.wait()
        for manager in self._managers:
            manager.close()

    def _unreadable(self, step: int, reason: str) -> UserError:
        older = [other for other in self._manager.all_steps() if other < step]
        way = f"the run goes on from step {max(older)}" if older else "the run starts again"
        return UserError(
            f"The checkpoint {self.directory / str(step)} cannot be read into this model and optimizer ({reason}): "
            f"use the config that wrote it, or delete that folder, and {way}."
        )

    def _unwritten(self, error: Exception) -> UserError:
        return UserError(
            f"The checkpoint in {self.directory} could not be written ({_first_line(error)}): "
            "make room on the disk and run the same command again; older checkpoints are intact."
        )


def _manager(directory: Path, keep: int) -> Any:
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(directory, options=options)


def read_params(checkpoint: Path, like: Any) -> Any:
    """Read the weights of one checkpoint of a run (WORKDIR/checkpoints/N), laid out like `like`, and nothing else.

    Raises UserError if they cannot be read, do not fit, or are not those that were saved.
    """
    wanted = {"params": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)}
    arguments = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            params = reader.restore(checkpoint.absolute() / "state", args=arguments)["params"]
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            saved = reader.restore(checkpoint.absolute() / "run")
        mark = int(jax.device_get(fingerprint(params)))  # fails where the run did not train what the config asks for
    except Exception as error:  # orbax and its readers raise many kinds for a damaged file
        reason = _first_line(error).split(" See full")[0].rstrip(".")
        _forget_failed_reads()
        raise _unfit(checkpoint, reason) from error
    if mark != saved["params_fingerprint"]:
        raise _unfit(checkpoint, "its arrays are not those that were saved")
    return params


def _unfit(checkpoint: Path, reason: str) -> UserError:
    return UserError(
        f"The checkpoint {checkpoint} cannot be read into the model of this config ({reason}): use the config that "
        "wrote it, or evaluate another checkpoint."
    )


def _forget_failed_reads() -> None:
    """Silence the half-run coroutines that a failed read leaves.

    Each prints a page of warnings when it is collected, in which the error's sentence would be lost."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook


def _silence_late_futures() -> None:
    """Print nothing of writes that end after the event loop of a failed save: its error says it all.

    They come on threads of their own when they please, so this holds from the first checkpoint to the end."""
    shown = sys.excepthook
    if shown.__name__ == "without_late_futures":
        return

    def without_late_futures(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            shown(kind, error, trace)

    ignored = sys.unraisablehook

    def ignored_without(found: Any) -> None:
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            ignored(found)

    sys.excepthook, sys.unraisablehook = without_late_futures, ignored_without


def _shapes(tree: Any) -> list[list[Any]]:
    """Return the shapes and dtypes of a tree as JSON-able values."""
    return [[*leaf.shape, str(leaf.dtype)] for leaf in jax.tree.leaves(tree)]


def _check(data: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
