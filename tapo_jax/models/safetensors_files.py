"""Reading and writing *.safetensors as memory maps: one tensor at a time, any slice of it, bfloat16 included."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SHARD_BYTES = 5 * 10**9


def open_all(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory's safetensors files by name, as read-only memory maps: nothing is read yet.

    A `model.safetensors.index.json` says which files belong to the model; without it all *.safetensors do.
    Raises FileNotFoundError where there is no file, ValueError for a dtype that is no float.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors file")
    return {name: tensor for file in files for name, tensor in _open(file).items()}


def _open(file: Path) -> dict[str, np.ndarray]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    data = np.memmap(file, np.uint8, mode="r", offset=8 + size)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f'{file.name}: tensor "{name}" has dtype {entry["dtype"]}, expected one of {list(DTYPES)}')
        start, stop = entry["data_offsets"]
        tensors[name] = data[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_all(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    read: Callable[[str], np.ndarray],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or numbered files with an index where it would pass shard_bytes.

    `read(name)` is called for one tensor after another in the order of `shapes`, so one is in memory at a time.
    """
    bytes_of = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in bytes_of.items():
        if shards[-1] and sum(bytes_of[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        write(directory / "model.safetensors", shapes, dtype, read)
        return
    where = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(directory / file, {name: shapes[name] for name in names}, dtype, read)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write(file: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, read: Callable[[str], np.ndarray]) -> None:
    """One safetensors file of the tensors of `shapes`, all in `dtype`."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(np.ascontiguousarray(read(name).astype(dtype)).tobytes())
