"""config.data and config.tools -> the questions of a split and the tools that can answer them."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.data import atlas
from tapo_jax.data.atlas_world import Settings, make_tools
from tapo_jax.data.world import real_world
from tapo_jax.tools.base import Tool
from tapo_jax.types import Prompt


def prompts(config: Any, split: str) -> Sequence[Prompt]:
    """All questions of a split. Raises UserError for a data set or a split that does not exist."""
    if config.data.name != "atlas":
        raise UserError(f"data.name is '{config.data.name}': the data sets are atlas.")
    if split not in atlas.SPLITS:
        raise UserError(f"The split '{split}' does not exist: Atlas has {', '.join(atlas.SPLITS)}.")
    settings, sizes = atlas_settings(config), tuple(config.data.sizes)
    described = json.dumps([dataclasses.asdict(settings), config.data.world_seed, sizes])
    folder = hashlib.blake2b(described.encode(), digest_size=6).hexdigest()
    builder = atlas.prepare(_data_dir(config) / folder, settings=settings, seed=config.data.world_seed, sizes=sizes)
    return atlas.AtlasPrompts(builder, split)


def tools(config: Any) -> list[Tool]:
    """The tools of config.tools.names. Raises UserError for a name that does not exist."""
    made = {tool.name: tool for tool in make_tools(real_world("train"), atlas_settings(config))}
    for name in config.tools.names:
        if name not in made:
            raise UserError(f"tools.names has '{name}': the tools are {', '.join(made)}.")
    return [made[name] for name in config.tools.names]


def atlas_settings(config: Any) -> Settings:
    return Settings(
        hops=tuple(config.data.hops),
        outlines=config.data.outlines,
        size=config.data.size,
        outline=tuple(config.data.outline),
        zoom_size=config.tools.zoom_size,
        image_top_k=config.tools.image_top_k,
        thumbnails=config.tools.thumbnails,
        text_top_k=config.tools.text_top_k,
        text_budget=config.tools.text_budget,
    )


def _data_dir(config: Any) -> pathlib.Path:
    """config.data.dir, or a folder of the user's cache."""
    if config.data.dir:
        return pathlib.Path(config.data.dir)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "tapo_jax" / "atlas"
