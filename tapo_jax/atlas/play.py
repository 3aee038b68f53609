"""A world to play in: its scenes and questions, and the tools that search it."""

import dataclasses

import numpy as np

from tapo_jax.atlas import closed
from tapo_jax.atlas.questions import Question, ask, corpus
from tapo_jax.atlas.scene import Placed, draw_outline, draw_scene
from tapo_jax.atlas.world import ATTRIBUTES, World
from tapo_jax.tools.base import Tool
from tapo_jax.tools.image_search import ImageSearch
from tapo_jax.tools.text_search import TextSearch
from tapo_jax.tools.zoom import ZoomTool
from tapo_jax.types import Prompt, root_image


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and difficulty of the questions and tools."""

    hops: tuple[int, ...] = (1, 2)
    """Numbers of look-ups that a question may need, equally often."""
    outlines: int = 2
    """Countries in a scene."""
    size: int = 256
    """Side of the scene in pixels."""
    outline: tuple[float, float] = (0.24, 0.36)
    """Min and max long side of an outline, as a share of the scene."""
    zoom_size: int = 64
    image_top_k: int = 1
    thumbnails: int = 0
    text_top_k: int = 1
    text_budget: int = 400
    mix: tuple[tuple[str, float], ...] = ()
    """Shares of the kinds of question, "open" and `closed.KINDS`, in any unit; empty: all are open."""


def make_tools(world: World, settings: Settings) -> list[Tool]:
    """Return the three tools over all countries of a world."""
    names = sorted(world.countries)
    pictures = [draw_outline(world.countries[name]) for name in names]
    passages = corpus(world)
    if settings.mix:
        passages += [passage for name in names for passage in closed.passages(world.countries[name])]
    return [
        ZoomTool(size=settings.zoom_size),
        ImageSearch(names, pictures, top_k=settings.image_top_k, thumbnails=settings.thumbnails),
        TextSearch(passages, top_k=settings.text_top_k, budget=settings.text_budget),
    ]


def make_prompt(
    world: World, settings: Settings, rng: np.random.Generator
) -> tuple[Prompt, Question, tuple[Placed, ...]]:
    """Draw a scene and a question about it, until the facts allow the kind of question and the number of hops."""
    kind = _draw_kind(settings.mix, rng)
    if kind == "open":
        pixels, question, scene = _draw_open(world, settings, rng)
    else:
        pixels, question, scene = _draw_closed(world, kind, settings, rng)
    image = root_image(pixels)
    prompt = Prompt(
        id="/".join([question.attribute, *question.chain, f"{image.root & 0xFFFFFFFF:08x}"]),
        question=question.text,
        images=(pixels,),
        answers=question.answers,
        hops=question.hops if kind == "open" else closed.look_ups(question),
        meta={"chain": list(question.chain), "relations": list(question.relations), "attribute": question.attribute},
    )
    return prompt, question, scene


def _draw_kind(mix: tuple[tuple[str, float], ...], rng: np.random.Generator) -> str:
    """Draw a kind of question by the shares; without shares nothing is drawn."""
    if not mix:
        return "open"
    shares = np.array([share for _, share in mix])
    return mix[int(rng.choice(len(mix), p=shares / shares.sum()))][0]


def _draw_open(
    world: World, settings: Settings, rng: np.random.Generator
) -> tuple[np.ndarray, Question, tuple[Placed, ...]]:
    hops = int(rng.choice(settings.hops))
    while True:
        names = rng.choice(world.asked, settings.outlines, replace=False).tolist()
        pixels, scene = draw_scene(
            [world.countries[n] for n in names], size=settings.size, outline=settings.outline, rng=rng
        )
        question = ask(world, names[0], scene[0].colour, hops, rng)
        if question is not None:
            return pixels, question, scene


def _draw_closed(
    world: World, kind: str, settings: Settings, rng: np.random.Generator
) -> tuple[np.ndarray, Question, tuple[Placed, ...]]:
    while True:
        found = closed.draw(world, kind, int(rng.choice(settings.hops)), settings.outlines, rng)
        if found is not None:
            break
    names, chain, relations = found
    pixels, scene = draw_scene(
        [world.countries[n] for n in names], size=settings.size, outline=settings.outline, rng=rng
    )
    return pixels, closed.write(world, kind, chain, relations, scene), scene


def parse_id(prompt_id: str) -> tuple[str, list[str]]:
    """Return the attribute and the chain of countries of an Atlas prompt. Raises ValueError for other prompts."""
    attribute, *chain = prompt_id.split("/")[:-1] or [""]
    if attribute not in (*ATTRIBUTES, *closed.KINDS) or not chain:
        raise ValueError(f"'{prompt_id}' is no question of Atlas")
    return attribute, chain
