"""Bytes of every process as one array over the mesh, so that a checkpoint can hold them."""

import jax
import numpy as np
from jax.sharding import Mesh

from tapo_jax import processes, sharding

HEAD = 8  # bytes in which the number of bytes that follow is written


def put_bytes(data: bytes, mesh: Mesh) -> jax.Array:
    """Return an array uint8 [row shards, bytes] in which every process's rows hold its bytes.

    Every process must call this.
    """
    shards = sharding.batch_shards(mesh)
    rows = len(sharding.local_rows(mesh, shards))
    (size,) = processes.largest(-(-(HEAD + len(data)) // rows))
    flat = np.zeros(rows * size, np.uint8)
    whole = len(data).to_bytes(HEAD, "little") + data
    flat[: len(whole)] = np.frombuffer(whole, np.uint8)
    return sharding.put_rows(flat.reshape(rows, size), mesh, shards)


def take_bytes(array: jax.Array) -> bytes:
    """Return this process's bytes of `put_bytes`."""
    by_start = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    flat = np.concatenate([by_start[start].reshape(-1) for start in sorted(by_start)])
    count = int.from_bytes(flat[:HEAD].tobytes(), "little")
    return flat[HEAD : HEAD + count].tobytes()


def abstract(shape: tuple[int, int], mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the shape and layout of an array of `put_bytes`, to restore it."""
    return jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding.rows(mesh))
