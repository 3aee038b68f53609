"""A world to play in: its scenes and questions, and the tools that search it."""

import dataclasses

import numpy as np

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


def make_tools(world: World, settings: Settings) -> list[Tool]:
    """Return the three tools over all countries of a world."""
    names = sorted(world.countries)
    pictures = [draw_outline(world.countries[name]) for name in names]
    return [
        ZoomTool(size=settings.zoom_size),
        ImageSearch(names, pictures, top_k=settings.image_top_k, thumbnails=settings.thumbnails),
        TextSearch(corpus(world), top_k=settings.text_top_k, budget=settings.text_budget),
    ]


def make_prompt(
    world: World, settings: Settings, rng: np.random.Generator
) -> tuple[Prompt, Question, tuple[Placed, ...]]:
    """Draw a scene and a question about one of its countries, until the facts allow the number of hops."""
    hops = int(rng.choice(settings.hops))
    while True:
        names = rng.choice(world.asked, settings.outlines, replace=False).tolist()
        pixels, scene = draw_scene(
            [world.countries[n] for n in names], size=settings.size, outline=settings.outline, rng=rng
        )
        question = ask(world, names[0], scene[0].colour, hops, rng)
        if question is not None:
            break
    image = root_image(pixels)
    prompt = Prompt(
        id="/".join([question.attribute, *question.chain, f"{image.root & 0xFFFFFFFF:08x}"]),
        question=question.text,
        images=(pixels,),
        answers=question.answers,
        hops=hops,
        meta={"chain": list(question.chain), "relations": list(question.relations), "attribute": question.attribute},
    )
    return prompt, question, scene


def parse_id(prompt_id: str) -> tuple[str, list[str]]:
    """Return the attribute and the chain of countries of an Atlas prompt. Raises ValueError for other prompts."""
    attribute, *chain = prompt_id.split("/")[:-1] or [""]
    if attribute not in ATTRIBUTES or not chain:
        raise ValueError(f"'{prompt_id}' is no question of Atlas")
    return attribute, chain
