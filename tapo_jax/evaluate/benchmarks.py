"""Evaluate a checkpoint on the published benchmarks in one run that can be killed and resumed (`launch/eval.py`)."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from tapo_jax import processes, records, viewer
from tapo_jax.agent import Agent
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.data.readers import BENCHMARK_SPLIT, read
from tapo_jax.evaluate.asking import AnswerFile, Question, answer_of, ask, my_share, starts_of, without_unshowable
from tapo_jax.evaluate.measure import sampling_of
from tapo_jax.records import write_whole
from tapo_jax.report import answers, benchmarks
from tapo_jax.report.answers import Answer
from tapo_jax.types import Episode

# Benchmark -> the reader of its folder; the split is the one that published tables use.
READER = {
    "mmsearch": "mmsearch",
    "hr_mmsearch": "hr_mmsearch",
    "fvqa_test": "fvqa",
    "infoseek": "infoseek",
    "simplevqa": "simplevqa",
    "livevqa": "livevqa",
    "mat_search": "mat_search",
}
ABOUT = "evaluation.json"
# The fields that decide an answer. Others, such as rollout.slots, may differ when a run is resumed.
FIELDS = {
    "rollout": ("system", "max_turns", "max_new_tokens", "max_think_tokens", "max_length", "max_image_tokens",
                "max_pixels"),
    "tools": ("source", "names", "zoom_size", "image_top_k", "thumbnails", "text_top_k", "text_budget", "extra"),
    "reward": ("source", "weights", "extra"),
    "eval": ("temperature", "top_p", "top_k", "min_p", "presence_penalty"),
}  # fmt: skip


def named(config: ConfigDict) -> dict[str, str]:
    """Return the folder of every benchmark that the config names."""
    return {name: config.benchmarks[name] for name in READER if config.benchmarks[name]}


def questions_of(config: ConfigDict) -> list[Question]:
    """Return the questions of the benchmarks that the config names. Raises UserError."""
    found = []
    for name, folder in named(config).items():
        try:
            prompts = read(READER[name], folder, BENCHMARK_SPLIT[READER[name]])
        except UserError as error:
            raise UserError(f"benchmarks.{name}: {error}") from error
        count = min(config.benchmarks.limit or len(prompts), len(prompts))
        found += [Question(name, prompts[index]) for index in range(count)]
    return found


def settings_of(config: ConfigDict, checkpoint: Path, samples: int) -> dict[str, Any]:
    """Return what decides an answer besides the question, as values read from JSON; no addresses and no keys."""
    newest = max((int(path.stat().st_mtime) for path in checkpoint.rglob("*") if path.is_file()), default=0)
    found: dict[str, Any] = {"checkpoint": str(checkpoint.resolve()), "written": newest}
    found |= {"samples": samples, "seed": config.seed, "model.dtype": config.model.dtype}
    fields = json.loads(config.to_json_best_effort())
    found |= {f"{section}.{name}": fields[section][name] for section, names in FIELDS.items() for name in names}
    judge = sources.judge_settings(config, evaluating=True)
    return found | {"judge": judge.model if judge else None}


def run(agent: Agent, params: Any, config: ConfigDict, checkpoint: Path, out: Path, *, samples: int) -> None:
    """Ask all questions that `out` holds no answer to, and write the tables. Every process must call this.

    Raises UserError if `out` holds answers of another evaluation.
    """
    with processes.alone_in(out, lock="evaluation.lock", flag="--out"):
        questions, settings = questions_of(config), settings_of(config, checkpoint, samples)
        expected = _agreed(out, questions, settings)
        mine, rank, tools = my_share(questions), jax.process_index(), agent.players.runner.tools
        kept = processes.gather([answer.key for answer in answers.read_folder(out)])
        left = starts_of(mine, samples, {tuple(key) for keys in kept for key in keys})
        starts = without_unshowable(mine, left)
        path, total = out / (f"answers.{rank}.jsonl" if rank else answers.FILE), len(mine) * samples
        file = AnswerFile(path, answers.read(path), done=total - len(left), total=total - len(left) + len(starts))
        try:
            ask(agent, params, mine, starts, sampling_of(config), lambda q, e: file.add(answer_of(q, e, tools)))
        finally:
            file.close()
        each = processes.gather(answers.as_json(answers.read_folder(out)))
        if rank == 0:
            found = in_order([answers.from_json(one) for ones in each for one in ones], questions)
            print(_write(out, found, settings, expected), flush=True)


def in_order(found: Sequence[Answer], questions: Sequence[Question]) -> list[Answer]:
    """Return every answer once, by question and sample, so that nothing depends on which episode ended first."""
    place = {(question.benchmark, question.prompt.id): n for n, question in enumerate(questions)}
    once = {answer.key: answer for answer in found}.values()
    return sorted(once, key=lambda a: (place.get((a.benchmark, a.question), len(place)), *a.key))


def _agreed(out: Path, questions: Sequence[Question], settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of questions of each benchmark in `out`, and write what the evaluation is.

    Raises UserError in every process if `out` holds answers of another evaluation, or to other questions.
    """
    sentence, expected = "", {}
    if jax.process_index() == 0:
        before = {"settings": settings, "questions": {}}
        if (out / ABOUT).is_file():
            way = "remove the folder, or give another --out"
            before = records.read_json(out / ABOUT, way=way, needs=("settings", "questions"))
        sentence, expected = _conflict(out, before["settings"], settings, questions), dict(before["questions"])
        for name in dict.fromkeys(question.benchmark for question in questions):
            expected[name] = max(expected.get(name, 0), sum(question.benchmark == name for question in questions))
        if not sentence:
            write_whole(out / ABOUT, json.dumps({"settings": settings, "questions": expected}, indent=2) + "\n")
    sentence, expected = processes.gather([sentence, expected])[0]
    if sentence:
        raise UserError(sentence)
    return expected


def _conflict(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], questions: Sequence[Question]) -> str:
    """Return a sentence if the answers in `out` are not of this evaluation, else an empty text."""
    way = "give another --out, or remove that folder"
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            return f"{out} holds an evaluation whose {name} is {before.get(name)!r}, not {now.get(name)!r}: {way}."
    asked = {(question.benchmark, question.prompt.id): question.asked for question in questions}
    for answer in answers.read_folder(out):
        if asked.get((answer.benchmark, answer.question), answer.asked) != answer.asked:
            which = f"'{answer.question}' of {answer.benchmark}"
            return f"{out} holds an answer to another question {which}, from other data: {way}."
    return ""


def _write(out: Path, found: Sequence[Answer], settings: Mapping[str, Any], expected: Mapping[str, int]) -> str:
    """Write the answers in order and the tables, and return the text."""
    answers.write(out / answers.FILE, found)
    rows = benchmarks.rows(found, judged=settings["judge"] is not None)
    for name, row in rows.items():
        row["left_out"] = expected.get(name, row["questions"]) - row["questions"]
    write_whole(out / "benchmarks.json", json.dumps({"benchmarks": rows, "settings": settings}, indent=2) + "\n")
    text = benchmarks.table(rows, expected)
    write_whole(out / "benchmarks.md", text)
    return f"{text}\nwritten to {out}: benchmarks.json, benchmarks.md, {answers.FILE}"


def page(agent: Agent, params: Any, config: ConfigDict, out: Path, *, samples: int, wanted: Sequence[Question]) -> None:
    """Play the questions of `wanted` again, with the same random keys, and write OUT/episodes.html.

    Of several processes each writes its share (episodes.N.html), and all must call this. A question whose answer is
    another one now, because its tools gave something else, is named on stderr.
    """
    mine, rank = my_share(wanted), jax.process_index()
    played: list[tuple[Question, Episode]] = []
    ask(agent, params, mine, starts_of(mine, samples, ()), sampling_of(config), lambda q, e: played.append((q, e)))
    before = {answer.key: answer.answer for answer in answers.read_folder(out)}
    place = {question.key: n for n, question in enumerate(mine)}
    recorded = []
    for question, episode in sorted(played, key=lambda one: (place[one[0].key], one[1].sample)):
        name = f"{question.benchmark}/{episode.prompt.id}"
        if before.get((question.benchmark, episode.prompt.id, episode.sample), episode.answer) != episode.answer:
            print(f"{name}, sample {episode.sample}, was answered otherwise this time", file=sys.stderr)
        shown = dataclasses.replace(episode, prompt=dataclasses.replace(episode.prompt, id=name))
        recorded.append(records.record(shown, step=0, prompt=place[question.key], advantage=0.0, credit=()))
    if recorded:
        path = out / (f"episodes.{rank}.npz" if rank else "episodes.npz")
        records.save(path, recorded)
        viewer.write_page([path], path.with_suffix(".html"), max_groups=len(mine))
        print(f"written to {path.with_suffix('.html')}", flush=True)


def chosen(questions: Sequence[Question], ids: Sequence[str]) -> list[Question]:
    """Return the questions that a user names as BENCHMARK/ID, or as ID where only one has it. Raises UserError."""
    found = []
    for name in ids:
        fits = [q for q in questions if name in (q.prompt.id, f"{q.benchmark}/{q.prompt.id}")]
        if len(fits) != 1:
            what = "is asked by no benchmark here" if not fits else "is in several benchmarks"
            raise UserError(f"--questions names '{name}', which {what}: give BENCHMARK/ID, such as mmsearch/ID.")
        found += fits
    return list({question.key: question for question in found}.values())
