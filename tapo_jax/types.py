"""What travels on the host: prompts, images with provenance, tool calls, turns, episodes.

Plain dataclasses of numpy arrays; nothing here imports jax. Arrays that live on the device are in `batch.py`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Image:
    """One image of a conversation and where it came from.

    pixels: uint8 [H, W, 3].
    root: int32 content hash of the image that this one was cut from (itself, when it was not cut).
    box: (x1, y1, x2, y2) of this image in its root, each in 0..1. A crop of a crop composes.
    """

    pixels: np.ndarray
    root: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def root_image(pixels_HxWx3: np.ndarray) -> Image:
    """An image that was cut from nothing: its root is the hash of its own pixels and shape."""
    content = pixels_HxWx3.tobytes() + repr(pixels_HxWx3.shape).encode()
    digest = hashlib.blake2b(content, digest_size=4).digest()
    return Image(pixels_HxWx3, int.from_bytes(digest, "little", signed=True))


class Images(Sequence):
    """Images that are decoded whenever they are looked at, and not kept: a set of questions holds none of their pixels.

    sources: one function an image, which gives uint8 [H, W, 3] or raises `config.BadImage`.
    """

    def __init__(self, sources: Sequence[Callable[[], np.ndarray]]):
        self.sources = tuple(sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index):
        return Images(self.sources[index]) if isinstance(index, slice) else self.sources[index]()


class BadPrompt(TypeError):
    """Fields of a question that are no question."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question. `answers` are all accepted answers; `meta` is free (scene, chain of facts, benchmark name).

    images: uint8 [H, W, 3] each, a tuple of arrays or `Images`. A question that holds as many `<image>` marks as there
    are images has each image where its mark stands; otherwise the images come before the text.
    Raises BadPrompt for answers that are no list: the letters of a string would all be accepted.
    """

    id: str
    question: str
    images: Sequence[np.ndarray]
    answers: tuple[str, ...]
    hops: int = 1
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        fits = isinstance(self.answers, Sequence) and all(isinstance(answer, str) for answer in self.answers)
        if isinstance(self.answers, str) or not fits:
            raise BadPrompt(f"the answers of question '{self.id}' are {self.answers!r}: give a tuple of strings")
        object.__setattr__(self, "answers", tuple(self.answers))


# The parameters of an executed call, as TAPO compares them (the table in `tapo.py`).


@dataclasses.dataclass(frozen=True)
class Region:
    root: int
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Text:
    value: str


@dataclasses.dataclass(frozen=True)
class Identity:
    value: str


@dataclasses.dataclass(frozen=True)
class Number:
    value: float
    low: float
    high: float


Parameter = Region | Text | Identity | Number


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call as the policy wrote it. `parameters` is filled by the tool that accepted it; () where nothing ran."""

    name: str
    arguments: dict[str, Any]
    parameters: tuple[Parameter, ...] = ()


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What a tool gives back. `error` is None or one word for the metrics ("timeout", "bad_arguments", …);
    an error's readable sentence is in `text`, because the policy reads it. `parts`: text and images in the order in
    which they are shown, where they alternate; text and images are taken from them then. Without parts the images come
    before the text."""

    text: str = ""
    images: tuple[Image, ...] = ()
    error: str | None = None
    seconds: float = 0.0
    parts: tuple[str | Image, ...] = ()

    def __post_init__(self) -> None:
        if self.parts:
            object.__setattr__(self, "text", "".join(part for part in self.parts if isinstance(part, str)))
            object.__setattr__(self, "images", tuple(part for part in self.parts if not isinstance(part, str)))


@dataclasses.dataclass
class Turn:
    """One assistant turn: token_T[start:stop] of its episode were written by the policy, the stop token included.

    opening: what the chat template wrote before them at the beginning of the turn ("<think>\\n" for thinking models);
    None: not known. forced: the tokens token_T[forced[0]:forced[1]] inside of the turn closed a thought that was too
    long; the policy did not write them.
    """

    start: int
    stop: int
    text: str
    call: ToolCall | None = None
    result: ToolResult | None = None
    opening: str | None = None
    forced: tuple[int, int] | None = None

    @property
    def is_step(self) -> bool:
        """A tool step for TAPO: a call that was parsed and executed."""
        return self.call is not None and self.result is not None and self.result.error is None


@dataclasses.dataclass
class Episode:
    """One finished conversation. T tokens, exactly the ids that the sampler saw.

    mask_T: True where the policy wrote the token. sampler_logp_T: its log-probability when sampled, 0 elsewhere.
    images: every image of the conversation in order of appearance (`img_idx` counts them);
    image_start: index in token_T of each image's first placeholder.
    finish: "answer", "length" (token budget), "turns" (turn budget) or "malformed" (neither call nor answer).
    rewards: named floats, e.g. {"accuracy": 1.0, "format": 1.0}; reward is their weighted sum.
    judged: False where nobody could say whether the answer is right, for example because a judge did not reply. Such an
        episode is no wrong answer: it leaves the statistics of its group, and the loss.
    """

    prompt: Prompt
    sample: int
    token_T: np.ndarray
    mask_T: np.ndarray
    sampler_logp_T: np.ndarray
    images: list[Image]
    image_start: list[int]
    turns: list[Turn]
    answer: str | None
    finish: str
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    reward: float = 0.0
    judged: bool = True

    @property
    def success(self) -> bool:
        """Success for TAPO: the accuracy part of the reward, not the total."""
        return self.judged and self.rewards["accuracy"] >= 1.0
