"""Files that are written whole or not at all. Imports no jax."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside it, and rename it. Makes the folder; text is UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode("utf-8", "replace") if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
