"""Reinforcement learning of tool-using vision-language agents in JAX, with TAPO's credit transfer as a library.

`from tapo_jax import tapo` is the method alone: it needs no model, no config and no trainer. The names below are
imported at first use, so that `import tapo_jax` does not import jax.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from tapo_jax.config import UserError
    from tapo_jax.types import (
        Episode,
        Identity,
        Image,
        Number,
        Prompt,
        Region,
        Text,
        ToolCall,
        ToolResult,
        Turn,
        root_image,
    )

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["data", "learn", "models", "report", "rewards", "rollout", "tapo", "tools", "train", "types", "viewer"],
    submod_attrs={
        "config": ["UserError"],
        "types": [
            "Episode",
            "Identity",
            "Image",
            "Number",
            "Prompt",
            "Region",
            "Text",
            "ToolCall",
            "ToolResult",
            "Turn",
            "root_image",
        ],
    },
)
