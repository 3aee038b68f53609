from .play import Settings, make_prompt, make_tools
from .world import Country, World, fictional_world, real_world

__all__ = ["Country", "Settings", "World", "fictional_world", "make_prompt", "make_tools", "real_world"]
