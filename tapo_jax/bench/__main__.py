"""Run a benchmark: `python -m tapo_jax.bench NAME` runs NAME.py of this folder, prints a table and writes JSON."""

import argparse
import importlib
import json
import os
import platform
from pathlib import Path

import jax

NAMES = ("tapo", "losses", "model", "rollout", "carry", "search")


def table(rows: list[dict]) -> str:
    """Return rows as aligned text."""
    head = list(rows[0])
    body = [[f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in head] for row in rows]
    lines = [head, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tapo_jax.bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True)
    for name in NAMES:
        module = importlib.import_module(f"tapo_jax.bench.{name}")
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        command.add_argument("--out", default=f"bench_{name}.json", help="JSON file to write")
        command.add_argument("--repeats", type=int, default=15, help="timed calls after warm-up; the median counts")
        module.add_arguments(command)
    args = parser.parse_args(argv)
    rows = importlib.import_module(f"tapo_jax.bench.{args.name}").run(args)
    machine = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    Path(args.out).write_text(json.dumps({"benchmark": args.name, "machine": machine, "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(table(rows))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
