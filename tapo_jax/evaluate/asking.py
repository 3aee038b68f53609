"""Ask a policy questions of several data sets in one stream: answers come out as episodes end, and can be resumed."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tapo_jax import rewards
from tapo_jax.agent import Agent
from tapo_jax.data.pipeline import showable
from tapo_jax.report import answers
from tapo_jax.report.answers import Answer, Key
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.types import Episode, Prompt


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a benchmark."""

    benchmark: str
    prompt: Prompt

    @property
    def key(self) -> int:
        """Return the number that stands for the question in the random keys, whatever else is asked."""
        name = f"{self.benchmark}\n{self.prompt.id}".encode("utf-8", "replace")
        return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little") >> 1

    @property
    def asked(self) -> str:
        """Return a hash of the question and its accepted answers."""
        text = json.dumps([self.prompt.question, self.prompt.answers])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def starts_of(questions: Sequence[Question], samples: int, done: Collection[Key]) -> list[tuple[int, int]]:
    """Return (index of the question, sample) of every answer that is not done."""
    return [
        (index, sample)
        for index, question in enumerate(questions)
        for sample in range(samples)
        if (question.benchmark, question.prompt.id, sample) not in done
    ]


def my_share(questions: Sequence[Question]) -> list[Question]:
    """Return the questions that this process asks."""
    part = np.array_split(np.arange(len(questions)), jax.process_count())[jax.process_index()]
    return [questions[index] for index in part]


def without_unshowable(questions: Sequence[Question], starts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the starts whose question has only images that can be shown; the others are named on stderr."""
    waiting = list(dict.fromkeys(index for index, _ in starts))
    bar = tqdm(waiting, desc="looking at the images", unit="", leave=False, disable=jax.process_index() > 0)
    kept = {index for index in bar if showable([questions[index].prompt])}
    return [start for start in starts if start[0] in kept]


def ask(
    agent: Agent,
    params: Any,
    questions: Sequence[Question],
    starts: Sequence[tuple[int, int]],
    sampling: Sampling,
    on_episode: Callable[[Question, Episode], None],
) -> None:
    """Ask `starts` (indices of questions, and samples). In a pod all processes must call this together.

    on_episode: called with the question and the scored episode when it has ended, for one at a time.
    """
    keyed = dataclasses.replace(sampling, prompt_keys=tuple(question.key for question in questions))
    prompts = [question.prompt for question in questions]
    agent.stream(
        params, prompts, starts, keyed, lambda index, episode: on_episode(questions[starts[index][0]], episode)
    )


def answer_of(question: Question, episode: Episode, tools: Collection[str]) -> Answer:
    """Return an episode in numbers. Calls of a tool that does not exist count only as an error."""
    calls = [turn for turn in episode.turns if turn.result is not None]
    return Answer(
        benchmark=question.benchmark,
        question=question.prompt.id,
        sample=episode.sample,
        asked=question.asked,
        answer=episode.answer,
        judged=episode.judged,
        judge=episode.word,
        rewards=dict(episode.rewards),
        reward=episode.reward,
        exact_match=rewards.accuracy(episode.answer, episode.prompt),
        exact_match_published=rewards.exact_match_published(episode.answer, episode.prompt.answers),
        calls=dict(Counter(turn.call.name for turn in calls if turn.call is not None and turn.call.name in tools)),
        errors=dict(Counter(turn.result.error for turn in calls if turn.result.error is not None)),
        turns=len(episode.turns),
        tokens=len(episode.token_T),
        written=int(episode.mask_T.sum()),
        finish=episode.finish,
    )


class AnswerFile:
    """The file that this process adds a line to when an episode ends, and the bar that shows how far it is.

    A line is in the file when `add` returns, so that a killed run loses the episodes in play and no other. `add` is
    called for one answer at a time.

    kept: the answers that the file begins with.
    done: answers that this process need not ask for.
    total: answers that this process gives in the end.
    """

    def __init__(self, path: Path, kept: Sequence[Answer], *, done: int, total: int):
        answers.write(path, kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open until close()
        self._right, self._judged = sum(one.right for one in kept), sum(one.judged for one in kept)
        hidden = jax.process_index() > 0
        self._bar = tqdm(total=total, initial=done, unit=" answers", dynamic_ncols=True, disable=hidden)

    def add(self, answer: Answer) -> None:
        self._file.write(answers.line(answer))
        self._file.flush()
        self._right, self._judged = self._right + answer.right, self._judged + answer.judged
        share = self._right / self._judged if self._judged else 0.0
        self._bar.set_postfix_str(f"{answer.benchmark}  right {100 * share:.1f} %", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
