"""Read and write *.safetensors as memory maps: one tensor at a time, any slice of it, bfloat16 included."""

import collections
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from tapo_jax.config import UserError
from tapo_jax.models.model_files import check_no_pointer, read_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
SHARD_BYTES = 5 * 10**9


def open_all(directory: Path) -> dict[str, np.ndarray]:
    """Map every tensor of a directory's safetensors files by name, read-only; no data is read yet.

    A `model.safetensors.index.json` says which files belong to the model; without it all *.safetensors do.
    Raises FileNotFoundError if there is no file, ValueError for a dtype that is not a float, UserError naming a file
    that is missing, cut short or only a pointer.
    """
    files = _files(directory)
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors file (other weight files are not read)")
    return {name: tensor for file in files for name, tensor in _open(file).items()}


def stored_dtype(directory: Path) -> str:
    """Return the dtype of most bytes of a directory's weights: "bfloat16" for a published model."""
    sizes = collections.Counter()
    for tensor in open_all(directory).values():
        sizes[tensor.dtype.name] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _files(directory: Path) -> list[Path]:
    """Return the files of the model. Raises UserError naming the first one that is missing."""
    index = directory / "model.safetensors.index.json"
    found = sorted(file.name for file in directory.glob("*.safetensors"))
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise UserError(f"{index} has no weight_map: download it again.")
        names = sorted(set(where.values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} names a file outside of its folder: download it again.")
    else:
        counts = {match[1]: int(match[2]) for name in found if (match := _SHARD.fullmatch(name))}
        names = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for stem, n in counts.items() for i in range(1, n + 1)]
        names += [name for name in found if not _SHARD.fullmatch(name)]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"The model directory {directory} lacks {missing[0]} ({len(missing)} of {len(names)} files of weights are "
            "missing): finish its download."
        )
    return [directory / name for name in names]


def _open(file: Path) -> dict[str, np.ndarray]:
    check_no_pointer(file)
    length = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        text = stream.read(size) if length >= 8 + size else b""
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + size + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is cut or is no safetensors file ({length} bytes): download it again.") from error
    if length < end:
        raise UserError(f"{file} is cut: it has {length} bytes and its header speaks of {end}: download it again.")
    data = np.memmap(file, np.uint8, mode="r", offset=8 + size) if length > 8 + size else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f'{file.name}: tensor "{name}" has dtype {entry["dtype"]}, expected one of {list(DTYPES)} '
                "(quantised weights are not read)"
            )
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
    """Write model.safetensors, or numbered files with an index if it would exceed shard_bytes.

    directory: where to write.
    shapes: the shape of every tensor by name.
    dtype: dtype of all tensors.
    read: returns a tensor by name; called in the order of `shapes`, so that one tensor is in memory at a time.
    shard_bytes: max bytes of a file.
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
    """Write one safetensors file of the tensors of `shapes`, all in `dtype`."""
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
