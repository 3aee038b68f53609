"""The answers of an evaluation as a file: one JSON object a line, written when an episode ends. Imports no jax."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.records import write_whole

FILE = "answers.jsonl"
Key = tuple[str, str, int]
# Kinds of errors that are no fault of the policy: a tool or a service failed.
SERVICES = ("timeout", "service", "replay_miss", "exception", "internal")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One episode in numbers."""

    benchmark: str
    question: str
    """The question's id."""
    sample: int
    asked: str
    """A hash of the question and its accepted answers: answers are paired only where they answer the same."""
    answer: str | None
    judged: bool
    """False if there is no verdict; then `rewards` says nothing about whether the answer is right."""
    judge: str
    """The judge's word; "" if it was not asked."""
    rewards: dict[str, float]
    """Each reward; "accuracy" is whether the answer is right."""
    reward: float
    exact_match: float
    exact_match_published: float
    calls: dict[str, int]
    """Calls by tool."""
    errors: dict[str, int]
    """Calls that became an error, by kind."""
    turns: int
    tokens: int
    """Of the whole conversation, images and tool results included."""
    written: int
    """Tokens that the policy wrote."""
    finish: str

    @property
    def key(self) -> Key:
        return self.benchmark, self.question, self.sample

    @property
    def right(self) -> bool:
        return self.judged and self.rewards["accuracy"] >= 1.0

    @property
    def service_failures(self) -> int:
        return sum(count for kind, count in self.errors.items() if kind in SERVICES)

    @property
    def policy_faults(self) -> int:
        return sum(count for kind, count in self.errors.items() if kind not in SERVICES)


def line(answer: Answer) -> str:
    """Return the line of an answer. Half a surrogate pair and a number that is not finite are escaped or null."""
    fields = dataclasses.asdict(answer)
    fields["rewards"] = {name: value if math.isfinite(value) else None for name, value in answer.rewards.items()}
    fields["reward"] = answer.reward if math.isfinite(answer.reward) else None
    return json.dumps(fields) + "\n"


_NUMBER = (int, float)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "benchmark": str, "question": str, "sample": int, "asked": str, "answer": (str, type(None)), "judged": bool,
    "judge": str, "rewards": dict, "reward": _NUMBER, "exact_match": _NUMBER, "exact_match_published": _NUMBER,
    "calls": dict, "errors": dict, "turns": int, "tokens": int, "written": int, "finish": str,
}  # fmt: skip


def from_json(fields: Any) -> Answer:
    """Return the answer of a line that was read from JSON. Raises ValueError if it is none."""
    if not isinstance(fields, dict) or not _TYPES.keys() <= fields.keys():
        raise ValueError("it is no answer with its numbers")
    fields = dict(fields)
    if isinstance(fields["rewards"], dict):
        fields["rewards"] = {name: math.nan if x is None else x for name, x in fields["rewards"].items()}
    fields["reward"] = math.nan if fields["reward"] is None else fields["reward"]
    for name, kind in _TYPES.items():
        value = fields[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {value!r:.40}")
    counts = [*fields["rewards"].values(), *fields["calls"].values(), *fields["errors"].values()]
    if "accuracy" not in fields["rewards"] or not all(type(value) in (int, float) for value in counts):
        raise ValueError("rewards, calls or errors are no numbers")
    return Answer(**{name: fields[name] for name in _TYPES})


def read(path: Path) -> list[Answer]:
    """Read the answers of a file, each (benchmark, question, sample) once; none if there is no file.

    A last line without a newline was cut short by a kill and is left out. Other damaged lines are left out and named on
    stderr.
    """
    try:
        *whole, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"The answers {path} cannot be read ({error.strerror}).") from error
    found: dict[Key, Answer] = {}
    for number, text in enumerate(whole, start=1):
        try:
            answer = from_json(json.loads(text))
        except (ValueError, RecursionError) as error:
            if text.strip():
                print(f"{path}, line {number} is left out: {error}", file=sys.stderr)
        else:
            found[answer.key] = answer
    return list(found.values())


def read_folder(folder: Path) -> list[Answer]:
    """Read the answers in a folder: those of its process 0, and those of further processes of an unfinished run."""
    found: dict[Key, Answer] = {}
    for path in sorted(folder.glob("answers*.jsonl")):
        found |= {answer.key: answer for answer in read(path)}
    return list(found.values())


def write(path: Path, answers: Iterable[Answer]) -> None:
    """Write all answers of a file at once."""
    write_whole(path, "".join(line(answer) for answer in answers))


def given(path: Path) -> list[Answer]:
    """Return the answers that a user means by a path: an answer file, or a folder with answers.

    A folder of one data set has NAME.jsonl for each checkpoint; it has to hold one. Raises UserError.
    """
    if path.is_dir():
        answers = read_folder(path)
        others = [] if answers else sorted(path.glob("*.jsonl"))
        if len(others) > 1:
            raise UserError(f"{path} holds several answer files: give one of {', '.join(p.name for p in others)}.")
        answers = answers or [answer for other in others for answer in read(other)]
    elif path.is_file():
        answers = read(path)
    else:
        raise UserError(f"{path} does not exist: give the folder of an evaluation, or its file of answers.")
    if not answers:
        raise UserError(f"{path} holds no answers: give the folder that launch/eval.py wrote, or its file of answers.")
    return answers


def by_question(answers: Sequence[Answer]) -> dict[tuple[str, str], list[Answer]]:
    """Group answers by benchmark and question, in order of appearance; samples ascend."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.sample):
        groups.setdefault((answer.benchmark, answer.question), []).append(answer)
    return groups


def as_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return answers as JSON objects, to be sent between processes."""
    return [json.loads(line(answer)) for answer in answers]
