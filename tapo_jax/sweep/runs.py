"""Keep the plan and the state of a sweep in files: rows × seeds, each a run with a folder of its own.

OUT/sweep.json                      rows, their base and reference, their seeds: what `report sweep OUT` reads
OUT/<row>/seed_<n>/result.json      of a finished run: small (`results.condense`), with the config and the model
OUT/<row>/seed_<n>/failed.json      of a run that failed: {"error": one sentence, "config", "model"}
WORKDIR/<row>/seed_<n>/             the run itself: asked.json, log.txt, and the files of `launch/train.py`

WORKDIR may be OUT. Every file is written whole or not at all. The processes are in `processes.py`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tapo_jax.config import UserError, flat
from tapo_jax.records import read_json, write_whole
from tapo_jax.report import results

LOCATION_FIELDS = ("data.dir", "model.path")  # locations are not part of a run's identity


@dataclasses.dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int
    result: Path
    workdir: Path
    command: tuple[str, ...]
    """The command that runs it, without its folder."""
    asked: Mapping[str, Any]
    """The flat config as JSON stores it."""
    model: str
    """`fingerprint` of the model that the run starts from."""


def parse_seeds(text: str) -> list[int]:
    """Parse seeds such as "0,1,2", "0-4" or both, "0-2,7". Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part.strip())
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise UserError(f"--seeds is '{text}': give numbers and ranges, such as 0,1,2 or 0-4.")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return list(dict.fromkeys(seeds))


def parse_sweeps(text: str, sweeps: Mapping[str, Sequence[str]], rows: Mapping[str, Any]) -> list[str]:
    """Return the rows of one or several sweeps or single rows, such as "support,beta_0.4", each once.

    Raises UserError for a name that is neither.
    """
    names = text.split(",")
    for name in names:
        if name not in sweeps and name not in rows:
            raise UserError(
                f"--sweep is '{name}': the sweeps of configs/ablations.py are {', '.join(sweeps)}; "
                f"single rows are {', '.join(rows)}."
            )
    return list(dict.fromkeys(row for name in names for row in sweeps.get(name, (name,))))


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Return the flat config as it is read back from a file: lists for tuples."""
    return flat(json.loads(config.to_json_best_effort()))


def fingerprint(directory: Path) -> str:
    """Return a hash of the names and contents of a model directory's files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# The state of a run.


def state(run: Run) -> str:
    """Return "done", "failed" or "waiting" (also for an interrupted run, which resumes from its checkpoint)."""
    if (run.result / "result.json").exists():
        return "done"
    return "failed" if (run.result / "failed.json").exists() else "waiting"


def check_same(run: Run) -> None:
    """Raise UserError if the run's folders hold a run of another config or another model.

    Fields that only one of the two configs has do not count: another version of this program added or removed them.
    """
    for path in (run.result / "result.json", run.result / "failed.json", run.workdir / "asked.json"):
        if not path.exists():
            continue
        found = read_json(path, way=results.AGAIN, needs=("config",))
        way = f"give another --out and --workdir, or delete {path.parent}."
        for name, value in run.asked.items():
            was = found.get("config", {}).get(name, value)
            if was != value and name not in LOCATION_FIELDS:
                raise UserError(f"{path} is of a run with {name} {was!r}, and {value!r} is asked for: {way}")
        if found.get("model", run.model) != run.model:
            raise UserError(f"{path} is of a run that began with another model than the one asked for: {way}")


def begin(run: Run) -> None:
    """Save the requested config and model, before the run has written anything."""
    save(run.workdir / "asked.json", {"config": dict(run.asked), "model": run.model})


def keep_result(run: Run, cores: int) -> None:
    """Save the result of a run. Raises UserError if the run has not finished."""
    found = results.condense(run.workdir, run.row, run.seed)
    save(run.result / "result.json", found | {"model": run.model, "cores": cores})


def keep_failure(run: Run, sentence: str) -> None:
    save(run.result / "failed.json", {"error": sentence, "config": dict(run.asked), "model": run.model})


def save_plan(out: Path, rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], seeds: Sequence[int]) -> None:
    """Add rows and seeds to OUT/sweep.json. rows: all rows, in their order."""
    path = out / "sweep.json"
    known = results.read_plan(path).get("seeds", {})
    wanted = {row: sorted({*known.get(row, []), *(seeds if row in names else [])}) for row in rows}
    wanted = {row: numbers for row, numbers in wanted.items() if numbers}
    plan: dict[str, Any] = {"rows": list(wanted), "seeds": wanted}
    for kind in ("base", "reference"):
        plan[kind] = {row: rows[row][kind] for row in wanted if rows[row][kind] in wanted}
    save(path, plan)


def save(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, json.dumps(value, separators=(",", ":")) + "\n")
