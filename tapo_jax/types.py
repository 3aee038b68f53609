"""Data on the host: prompts, images with provenance, tool calls, turns, episodes.

Plain dataclasses of numpy arrays; nothing here imports jax. Device arrays are in `batch.py`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ZOOM, IMAGE_SEARCH, TEXT_SEARCH, VISIT = "image_zoom_in_tool", "image_search_tool", "text_search_tool", "visit"
"""Names of the shipped tools, as the policy writes them."""


@dataclasses.dataclass(frozen=True)
class Image:
    """One image of a conversation and where it came from."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    root: int
    """int32 content hash of the image that this one was cropped from; its own if it was not cropped."""
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """(x1, y1, x2, y2) of this image in its root, each in 0..1; also for a crop of a crop."""


def root_image(pixels_HxWx3: np.ndarray) -> Image:
    """Return an image that was not cropped: its root is the hash of its own pixels and shape."""
    content = pixels_HxWx3.tobytes() + repr(pixels_HxWx3.shape).encode()
    digest = hashlib.blake2b(content, digest_size=4).digest()
    return Image(pixels_HxWx3, int.from_bytes(digest, "little", signed=True))


class Images(Sequence):
    """Images that are decoded at every access and not kept, so that a data set holds none of their pixels.

    sources: one function for each image, which returns uint8 [H, W, 3] or raises `config.BadImage`.
    """

    def __init__(self, sources: Sequence[Callable[[], np.ndarray]]):
        self.sources = tuple(sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index):
        return Images(self.sources[index]) if isinstance(index, slice) else self.sources[index]()


class BadPrompt(TypeError):
    """The error for fields that do not make a question."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question.

    Raises BadPrompt unless `answers` is a sequence of strings; the letters of one string would all be accepted.
    """

    id: str
    question: str
    """If it has as many `<image>` marks as there are images, each image replaces its mark; else images come first."""
    images: Sequence[np.ndarray]
    """uint8 [H, W, 3] each, a tuple of arrays or `Images`."""
    answers: tuple[str, ...]
    """All accepted answers."""
    hops: int = 1
    """Look-ups that the answer needs."""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Free: scene, chain of facts, benchmark name, …"""

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
    """A call as the policy wrote it."""

    name: str
    arguments: dict[str, Any]
    parameters: tuple[Parameter, ...] = ()
    """Filled by the tool that accepted the call; () if nothing ran."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the result of a service came from, or its failure."""

    service: str
    """The name of the service in metrics, such as "search-r1"."""
    source: str
    """One of "live", "cache", "joined" (an equal call was under way) or "replay"."""
    retries: int = 0
    """Requests after the first one."""


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What a tool returns."""

    text: str = ""
    """What the policy reads; for an error, a readable sentence."""
    images: tuple[Image, ...] = ()
    """Shown before the text unless `parts` gives another order."""
    error: str | None = None
    """None, or one word for the metrics ("timeout", "bad_arguments", …)."""
    seconds: float = 0.0
    parts: tuple[str | Image, ...] = ()
    """Text and images in the order in which they are shown; `text` and `images` are then taken from them."""
    text_from: Callable[[int], str] | None = dataclasses.field(default=None, compare=False, repr=False)
    """Returns the text for another number of the result's first image; None: the text names no number.

    Of several calls of a turn, a later one does not know how many images the earlier ones give."""
    origin: Origin | None = None
    """None if no service was involved."""

    def __post_init__(self) -> None:
        if self.parts:
            object.__setattr__(self, "text", "".join(part for part in self.parts if isinstance(part, str)))
            object.__setattr__(self, "images", tuple(part for part in self.parts if not isinstance(part, str)))


@dataclasses.dataclass
class Turn:
    """One assistant turn: the policy wrote token_T[start:stop] of its episode, the stop token included."""

    start: int
    stop: int
    text: str
    call: ToolCall | None = None
    result: ToolResult | None = None
    opening: str | None = None
    """What the chat template wrote at the beginning of the turn ("<think>\\n" for thinking models); None if unknown."""
    forced: tuple[int, int] | None = None
    """The policy did not write token_T[forced[0]:forced[1]] of the turn: they closed a thought that was too long."""
    continues: bool = False
    """Whether it is a further call of the same message: of several calls each has its own span, call and result."""

    @property
    def is_step(self) -> bool:
        """Return whether the turn is a tool step for TAPO: a call that was parsed and executed."""
        return self.call is not None and self.result is not None and self.result.error is None


@dataclasses.dataclass
class Episode:
    """One finished conversation of T tokens."""

    prompt: Prompt
    sample: int
    """Index of the episode in its group."""
    token_T: np.ndarray
    """Exactly the ids that the sampler saw."""
    mask_T: np.ndarray
    """True where the policy wrote the token."""
    sampler_logp_T: np.ndarray
    """Log-probability of such a token when it was sampled, 0 elsewhere."""
    images: list[Image]
    """Every image of the conversation in order of appearance (`img_idx` counts them)."""
    image_start: list[int]
    """Index in token_T of each image's first placeholder."""
    turns: list[Turn]
    answer: str | None
    finish: str
    """One of "answer", "length" (token budget), "turns" (turn budget) or "malformed" (neither call nor answer)."""
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    """Named parts, e.g. {"accuracy": 1.0, "format": 1.0}."""
    reward: float = 0.0
    """Their weighted sum."""
    judged: bool = True
    """False where nobody could say whether the answer is right, for example because a judge did not reply.

    Such an episode is no wrong answer: it leaves the statistics of its group, and the loss.
    """
    word: str = ""
    """What the judge said, "" where it was not asked."""
    policy_T: np.ndarray | None = None
    """int32, the step of training whose weights drew the token, or read it for the first time; None: not known."""

    @property
    def success(self) -> bool:
        """Return whether TAPO takes the episode as a success: by the accuracy part of the reward, not the total."""
        return self.judged and self.rewards["accuracy"] >= 1.0

    def forget_images(self) -> None:
        """Release the images of the conversation, for statistics that need their tokens and turns only."""
        self.images = []
        for turn in self.turns:
            if turn.result is not None:
                turn.result = dataclasses.replace(turn.result, images=(), parts=())
