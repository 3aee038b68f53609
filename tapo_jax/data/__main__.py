"""Checks data sets before a run.

    python -m tapo_jax.data check NAME DIR --split=SPLIT         decodes every image; exit code 1 if one is bad
    python -m tapo_jax.data describe NAME DIR --split=SPLIT      rows, images, sizes, answers, three examples
    python -m tapo_jax.data convert-cache FILE OUT               a published cache of image searches -> JSON lines

NAME: atlas, jsonl, fvqa, mars, mmsearch, hr_mmsearch, infoseek, simplevqa, livevqa, mat_search.
"""

import argparse
import sys
from pathlib import Path

from tapo_jax.config import UserError
from tapo_jax.data.convert_cache import convert
from tapo_jax.data.inspect import check, describe
from tapo_jax.data.readers import BENCHMARK_SPLIT, READERS, read


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if something cannot be read or shown."""
    parser = argparse.ArgumentParser(
        prog="python -m tapo_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "describe"):
        command = commands.add_parser(name)
        command.add_argument("name", choices=list(READERS))
        command.add_argument("dir")
        command.add_argument("--split", default=None, help="the benchmark's own split, or train")
    command = commands.add_parser("convert-cache")
    command.add_argument("file", type=Path)
    command.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.command == "convert-cache":
            counts = convert(given.file, given.out)
            print(
                ", ".join(f"{counts[name]} {name}" for name in ("questions", "titles", "thumbnails")), end="; skipped: "
            )
            print(", ".join(f"{counts[name]} {name}" for name in ("addresses", "unreadable", "odd")))
            return 0
        split = given.split or BENCHMARK_SPLIT.get(given.name, "train")
        prompts = read(given.name, given.dir, split)
        if given.command == "describe":
            print(describe(prompts, title=f"{given.name}, {split}"))
            return 0
        return 1 if check(prompts) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that cannot write a question's letters
    sys.exit(main())
