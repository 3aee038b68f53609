"""The work of the rollout benchmark: conversations whose lengths are given, and what is measured of playing them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Conversation, Opening
from tapo_jax.rollout.players import Players
from tapo_jax.tools.base import ToolRunner, function_schema
from tapo_jax.types import Image, Prompt, ToolCall, ToolResult, Turn


@dataclasses.dataclass(frozen=True)
class Work:
    """Conversations of random tokens in groups that share a question. Row = question · group + sample."""

    group: int
    """Conversations of a question."""
    question: list[list[int]]
    """Ids of each question."""
    written: list[list[int]]
    """By row: the tokens to write in each turn."""
    response: list[list[list[int]]]
    """By row: the ids that follow each turn but the last."""

    @property
    def rows(self) -> int:
        return len(self.written)

    @property
    def capacity(self) -> int:
        """Return the tokens of the longest conversation."""
        return max(
            len(self.question[row // self.group]) + sum(self.written[row]) + sum(map(len, self.response[row]))
            for row in range(self.rows)
        )

    @property
    def total_written(self) -> int:
        return sum(map(sum, self.written))

    @property
    def distinct(self) -> int:
        """Return the tokens that have to be pre-filled once: questions, responses, and the last token of each turn
        that has a response, which is fed with it."""
        return sum(map(len, self.question)) + sum(1 + len(ids) for row in self.response for ids in row)


def make_work(
    config: Qwen3VLConfig,
    *,
    questions: int,
    group: int,
    turns: int,
    question: int,
    written: int,
    response: int,
    uneven: bool,
) -> Work:
    """Return conversations of random tokens.

    questions, group: conversations are questions × group.
    turns: of a conversation; at most, where lengths are uneven.
    question, written, response: tokens of a question, of a turn and of a response; means, where lengths are uneven:
        they are then spread evenly from a quarter to seven quarters of it.
    """
    rng = np.random.default_rng(0)
    allowed = np.flatnonzero(~forbidden(config))

    def size(mean: int) -> int:
        return int(rng.integers(max(1, mean // 4), max(1, 2 * mean - mean // 4) + 1)) if uneven else mean

    def ids(count: int) -> list[int]:
        return rng.choice(allowed, count).tolist()

    rows = questions * group
    turns_of = [int(rng.integers(1, turns + 1)) if uneven else turns for _ in range(rows)]
    return Work(
        group=group,
        question=[ids(size(question)) for _ in range(questions)],
        written=[[size(written) for _ in range(count)] for count in turns_of],
        response=[[ids(size(response)) for _ in range(count - 1)] for count in turns_of],
    )


def forbidden(config: Qwen3VLConfig) -> np.ndarray:
    """Return which tokens neither side may write: those of images. No token ends a turn: lengths are given."""
    forbidden_V = np.zeros(config.vocab, bool)
    forbidden_V[[config.image_token, config.video_token, config.vision_start, config.vision_end]] = True
    return forbidden_V


@dataclasses.dataclass(frozen=True)
class Played:
    """The measurements of one whole rollout."""

    seconds: float
    cpu_s: float
    """CPU seconds of all threads."""
    prefill_s: float | None
    """None where one program does both."""
    decode_s: float | None
    prefilled: int
    """Tokens that were given to pre-filling calls."""
    computed: int
    """The same with the padding of the calls."""
    idle: float
    """Share of decoding steps × slots in which no token was written."""
    written: list[list[int]]
    """By row: the ids that were written."""


class Side(Protocol):
    """A way to play the work."""

    name: str

    def play(self, *, temperature: float, seed: int) -> Played: ...


# The rollout's own machinery, with lengths that are given.


class Numbers(Chat):
    """A chat whose texts are ids, written as numbers: no tokenizer takes part."""

    def __init__(self, image_token: int):
        self.image_token, self.stop_ids, self.opening, self.end_of_thought = image_token, (), "", []

    def prompt_ids(self, question: str, *_: Any) -> list[int]:
        return _read(question)

    def tool_responses_ids(self, responses: Sequence[tuple]) -> list[int]:
        return [token for text, *_ in responses for token in _read(text)]


def _read(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def _write(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


class Script(Conversation):
    """A conversation whose turns end after given numbers of tokens, each but the last with a call.

    row: its place in the work.
    written: the tokens of each turn.
    """

    def __init__(self, opening: Opening, sample: int, *, row: int, written: Sequence[int], **rest: Any):
        self._row, self._written = row, written
        super().__init__(opening, sample, **rest)

    @property
    def allowance(self) -> int:
        return self._written[len(self.turns)] - self.turn_tokens

    def end_turns(self) -> list[ToolCall]:
        turn = Turn(start=self._turn_start, stop=len(self.token), text="")
        self.turns.append(turn)
        if len(self.turns) == len(self._written):
            self.finish = "turns"
            return []
        turn.call = ToolCall(LookUp.name, {"row": self._row, "turn": len(self.turns) - 1})
        self._answers = [(turn, None)]
        return [turn.call]


@dataclasses.dataclass(frozen=True)
class ScriptPlayers(Players):
    """Players whose conversations are those of the work."""

    work: Work | None = None

    def converse(self, opening: Opening, sample: int, policy: int = 0) -> Conversation:
        row = int(opening.prompt.id) * self.work.group + sample
        common = {"limits": self.limits, "chat": self.chat, "image_tokens": self.pixels.tokens, "policy": policy}
        return Script(opening, sample, row=row, written=self.work.written[row], **common)


class LookUp:
    """The tool: it answers with the response of the work."""

    name = "look_up"
    schema = function_schema(
        "look_up",
        "",
        {name: {"type": "integer", "x-kind": "identity"} for name in ("row", "turn")},
        ("row", "turn"),
    )
    repeatable = False  # no result is kept for the next round

    def __init__(self, work: Work):
        self.work = work

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        return ToolResult(_write(self.work.response[arguments["row"]][arguments["turn"]]))


def look_up_runner(work: Work) -> ToolRunner:
    return ToolRunner([LookUp(work)], workers=2, timeout_s=60.0, retries=0, threaded=False)


def prompts(work: Work) -> list[Prompt]:
    return [Prompt(str(number), _write(ids), (), ()) for number, ids in enumerate(work.question)]
