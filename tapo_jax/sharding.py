"""Make the mesh and lay out arrays over it by a table. The only file that knows PartitionSpec.

Three mesh axes: `data` (replicas), `fsdp` (parameters and batch split), `tensor` (heads, hidden units, vocabulary
split). A model names the logical axes of its parameters (`models/parameters.py`); RULES maps logical axes to mesh axes.
A new strategy is one edit in RULES. A rollout may have a mesh of its own over the same devices (`rollout_mesh`).
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tapo_jax.config import UserError

MESH_AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None

# Logical axis -> mesh axes. An axis that is not in the table is never split.
RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "drawn": MESH_AXES,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
}


# Halfway from the layout of training to that of a rollout: split over `tensor` already, not yet gathered over `data`.
HALFWAY = RULES | {"embed": "data", "vision_embed": "data"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """Return a (data, fsdp, tensor) mesh. If only one axis is longer than 1, each process's devices lie together.

    data, fsdp, tensor: sizes of the axes; at most one may be -1, which takes the remaining devices.
    devices: default all devices of every process.

    Raises UserError if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1:
        raise UserError(
            f"mesh is data={data}, fsdp={fsdp}, tensor={tensor}: give positive sizes, at most one of them -1, the rest."
        )
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise UserError(
            f"mesh data={data} × fsdp={fsdp} × tensor={tensor} does not fit {len(devices)} devices: "
            "change the mesh fields so that their product is the number of devices (-1 takes the rest)."
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    mesh = jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    if sorted(sizes)[-2] > 1:  # with several axes the order follows the links between the devices
        return mesh
    together = sorted(mesh.devices.flat, key=_process)
    return Mesh(np.array(together, object).reshape(sizes), MESH_AXES, axis_types=mesh.axis_types)


def rollout_mesh(mesh: Mesh, *, data: int = -1, tensor: int = 0) -> Mesh:
    """Return the mesh of a rollout: the devices of `mesh`, in the same order, as data × tensor.

    mesh: that of training.
    data: -1 takes the devices that `tensor` leaves.
    tensor: 0 returns `mesh` itself.

    Raises UserError if the product of the sizes is not the number of devices.
    """
    if tensor == 0:
        return mesh
    count = mesh.size // tensor if data == -1 else data
    if count * tensor != mesh.size:
        raise UserError(
            f"rollout.mesh data={data} × tensor={tensor} does not fit {mesh.size} devices: change the fields so that "
            "their product is the number of devices (data -1 takes the rest; tensor 0 is the mesh of training)."
        )
    return _as_shape(mesh, count, tensor)


def rows_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh over which processes put their rows of a sampler's calls; `mesh` itself if each can use that.

    A process has rows of its own, but where the devices of a `tensor` group belong to several processes they work on
    the same rows. Then rows are split further, so far that every piece belongs to one process; the programs gather
    them within the group.
    """
    processes = [_process(device) for device in mesh.devices.flat]
    tensor = mesh.shape["tensor"]
    sizes = (size for size in range(tensor, 0, -1) if tensor % size == 0)
    own = next(s for s in sizes if all(len(set(processes[i : i + s])) == 1 for i in range(0, mesh.size, s)))
    return mesh if own == tensor else _as_shape(mesh, mesh.size // own, own)


def _process(device: jax.Device) -> int:
    return device.process_index


def _as_shape(mesh: Mesh, data: int, tensor: int) -> Mesh:
    return Mesh(mesh.devices.reshape(data, 1, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def one_device() -> Mesh:
    """Return the mesh of this process's first device."""
    return make_mesh(1, 1, 1, devices=jax.local_devices()[:1])


def batch_shards(mesh: Mesh) -> int:
    """Return the number of pieces into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes("batch"))


def rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is rows of the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def layout(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Mapping[str, MeshAxes] = RULES
) -> NamedSharding:
    """Return the sharding of one parameter.

    A dimension that its mesh axes do not divide stays whole, and so does a vector (a norm's scale, a bias; stacked or
    not): splitting it saves nothing and costs a gather.
    """
    if sum(axis not in (None, "layers") for axis in axes) < 2:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*_split(axes, shape, mesh, rules)))


def parameters(tree: Any, axes: Mapping[tuple[str, ...], tuple[str | None, ...]], mesh: Mesh) -> Any:
    """Return a NamedSharding for every leaf of a tree of parameters or of an optimizer state.

    The paths of an optimizer's moments end like those of the parameters. A leaf with another path (a counter) is
    replicated.

    axes: logical axes by parameter path.
    """

    def leaf(path: tuple, value: Any) -> NamedSharding:
        names = tuple(path_name(path).split("/"))
        for start in range(len(names)):
            if names[start:] in axes:
                return layout(mesh, axes[names[start:]], value.shape)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def path_name(path: tuple) -> str:
    """Return a tree path as "decoder/q". The `.value` of a parameter object (nnx.State) is left out."""
    return "/".join(re.sub(r"[^\w]", "", str(part)) for part in path if str(part) != ".value")


def on(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Return the context in which `constrain` pins intermediate values of a traced program to this mesh.

    Nothing is pinned on one device.
    """
    return contextlib.nullcontext() if mesh.size == 1 else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the layout of an intermediate value by its logical axes. Does nothing outside of `on`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*_split(axes, array.shape, mesh)))


def pieces(logical: str) -> int:
    """Return the number of pieces into which the traced program's mesh splits a logical axis; 1 outside of `on`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _mesh_axes(logical))


def on_shards(function: Callable, axes: Sequence[tuple[str | None, ...]], *arrays: jax.Array) -> jax.Array:
    """Apply a function to each device's shard of the arrays, for kernels that the compiler cannot split.

    Outside of `on` this is function(*arrays).

    function: its result is laid out like the first array.
    axes: the logical axes of each array.
    arrays: its arguments.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays)
    specs = tuple(PartitionSpec(*_split(names, array.shape, mesh)) for names, array in zip(axes, arrays, strict=True))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def on_rows(function: Callable, shared: Any, *rows: jax.Array) -> Any:
    """Apply `function(shared, *rows)` to every shard of the batch separately.

    `shared` (arrays that all rows read) is gathered once before, and its gradient is summed once after, instead of in
    every iteration of a loop inside the function. Outside of `on` this is function(shared, *rows).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows[0].shape[0] % pieces("batch"):
        return function(shared, *rows)
    batch = PartitionSpec(_mesh_axes("batch"))
    specs = (PartitionSpec(), *[batch] * len(rows))
    axes = set(_mesh_axes("batch"))
    return jax.shard_map(function, in_specs=specs, out_specs=batch, axis_names=axes, check_vma=False)(shared, *rows)


def _mesh_axes(logical: str | None, rules: Mapping[str, MeshAxes] = RULES) -> tuple[str, ...]:
    axes = rules.get(logical)
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _split(
    logical: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any, rules: Mapping[str, MeshAxes] = RULES
) -> list:
    """Return the mesh axes of each dimension; None if a dimension has no rule or is not divisible."""
    spec = []
    for name, size in zip(logical, shape, strict=True):
        axes = _mesh_axes(name, rules)
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        spec.append((axes if len(axes) > 1 else axes[0]) if axes and divides else None)
    return spec


# Between this process's numpy rows and arrays of the whole mesh.


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Return the sorted int64 indices of those of `count` batch rows that this process holds."""
    held = set()
    for index, *_ in rows(mesh).addressable_devices_indices_map((count,)).values():
        held.update(range(*index.indices(count)))
    return np.array(sorted(held), np.int64)


def put_rows(tree: Any, mesh: Mesh, count: int) -> Any:
    """Put this process's rows (numpy, in the order of `local_rows`) into arrays of `count` rows over the mesh.

    If the mesh does not divide `count` (say, few prompts on many devices), every device gets all rows.
    """
    if count % batch_shards(mesh):
        if jax.process_count() > 1:
            tree = jax.tree.map(lambda local: multihost_utils.process_allgather(local, tiled=True), tree)
        return put_replicated(tree, mesh)
    position = {row: at for at, row in enumerate(local_rows(mesh, count))}

    def leaf(local: np.ndarray) -> jax.Array:
        local = np.asarray(local)

        def shard(index: tuple) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            first = position[start]
            return local[first : first + stop - start]

        with jax.transfer_guard("allow"):  # an explicit transfer, like device_put
            return jax.make_array_from_callback((count, *local.shape[1:]), rows(mesh), shard)

    return jax.tree.map(leaf, tree)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Put the same host values on every device; every process must give the same."""

    def leaf(value: Any) -> jax.Array:
        value = np.asarray(value)
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

    return jax.tree.map(leaf, tree)


def to_host(array: jax.Array) -> np.ndarray:
    """Return the whole array in every process, wherever its shards are. Every process must call this."""
    if array.is_fully_addressable:
        return jax.device_get(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
