"""The laboratory: when does credit transfer help? `python -m tapo_jax.lab COMMAND`.

run [QUESTION …]   simulate, keep the answers as OUT/QUESTION.json and draw OUT/QUESTION.png; all questions without one
draw [QUESTION …]  draw the figures again from the kept answers
predict RUN        measure the first recorded episodes of a training run, and say whether TAPO should help there
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tapo_jax.config import UserError
from tapo_jax.lab import figures
from tapo_jax.lab.predict import predict
from tapo_jax.lab.questions import QUESTIONS
from tapo_jax.records import write_whole


def run(names: Sequence[str], out: Path, share: float) -> None:
    """Answer questions, save the answers and draw them. share: of each question's seeds, at least four seeds."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        question = QUESTIONS[name]
        seeds = range(max(4, round(question.seeds * share)))
        wall, cpu = time.perf_counter(), time.process_time()
        answer = question.answer(seeds, question.updates)
        answer |= {"asks": question.asks, "seeds": len(seeds), "updates": question.updates}
        write_whole(out / f"{name}.json", json.dumps(answer) + "\n")
        figures.save(name, read(name, out), out)
        seconds = f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of processor time"
        print(f"{name}: {question.asks} {len(seeds)} seeds, {seconds}: {out / name}.json and .png", flush=True)


def read(name: str, out: Path) -> dict:
    path = out / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: run `python -m tapo_jax.lab run {name} --out={out}` first.")
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: Sequence[str]) -> None:
    """Run one command. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tapo_jax.lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "draw"):
        command = commands.add_parser(name)
        command.add_argument("questions", nargs="*", choices=[[], *QUESTIONS], metavar="QUESTION")
        command.add_argument("--out", type=Path, default=Path("lab"), help="folder of answers and figures")
        if name == "run":
            command.add_argument("--seeds", type=float, default=1.0, help="share of each question's seeds, e.g. 0.25")
    command = commands.add_parser("predict")
    command.add_argument("run", type=Path)
    command.add_argument("--episodes", type=int, default=256, help="at least so many of the first recorded ones")
    command.add_argument("--out", type=Path, default=None, help="folder of predict.json and predict.png; RUN without")
    given = parser.parse_args(arguments)
    if given.command == "predict":
        if not given.run.is_dir():
            raise UserError(f"{given.run} is no directory: give the folder of a training run.")
        out = given.out or given.run
        out.mkdir(parents=True, exist_ok=True)
        print(predict(given.run, out, least=given.episodes))
    elif given.command == "run":
        run(given.questions or list(QUESTIONS), given.out, given.seeds)
    else:
        for name in given.questions or list(QUESTIONS):
            print(figures.save(name, read(name, given.out), given.out))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
