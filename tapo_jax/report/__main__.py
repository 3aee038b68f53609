"""What a run or a sweep came to, from its files: `python -m tapo_jax.report COMMAND DIRECTORY`.

curve RUN    RUN/curve.png: reward, accuracy, held-out accuracy, TAPO, entropy, tool calls, seconds
credit RUN   the share of failing tool steps that a success made too, by threshold; RUN/credit.png, RUN/credit.json
truth RUN    of a run on Atlas, the share of punished tool steps that were right, and how many of them TAPO finds
page RUN     RUN/episodes.html: recorded episodes, turn by turn
sweep DIR    DIR/report.md, DIR/report.json and figures; `results.py` says what a sweep's directory holds
compare A B  two evaluations (folders or answer files of launch/eval.py), paired by question: a table in Markdown
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tapo_jax import viewer
from tapo_jax.config import UserError, write_to_any_terminal
from tapo_jax.report import compare, misplaced, tables, truth
from tapo_jax.report.curve import write_curve


def recordings(run: Path) -> list[Path]:
    """Return the recorded steps of a run, in order. Raises UserError if there are none."""
    found = sorted((run / "episodes").glob("step_*.npz"))
    if not found:
        raise UserError(
            f"{run} has no recorded episodes (episodes/step_*.npz): give the folder of a run; log.episodes_every says "
            "how often a step is recorded."
        )
    return found


def main(arguments: Sequence[str]) -> None:
    """Run one command. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tapo_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("curve", "credit", "truth", "page", "sweep"):
        command = commands.add_parser(name)
        command.add_argument("directory", type=Path)
        if name == "page":
            command.add_argument(
                "--questions", type=int, default=viewer.MAX_GROUPS, help="how many the page shows at most"
            )
    command = commands.add_parser("compare")
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "compare":
        print(compare.compare(given.first, given.second), end="")
        return
    if not given.directory.is_dir():
        raise UserError(f"{given.directory} is no directory: give the folder of a run or of a sweep.")
    if given.command == "curve":
        write_curve(given.directory / "metrics.jsonl", given.directory / "curve.png")
        print(given.directory / "curve.png")
    elif given.command == "sweep":
        print(tables.write_sweep(given.directory))
    else:
        paths = recordings(given.directory)
        if given.command == "page":
            viewer.write_page(paths, given.directory / "episodes.html", max_groups=given.questions)
            print(given.directory / "episodes.html")
        else:
            write = truth.write_truth if given.command == "truth" else misplaced.write_credit
            print(write(paths, given.directory))


if __name__ == "__main__":
    write_to_any_terminal()
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
