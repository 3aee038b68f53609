from . import sources
from .jsonl import JsonlPrompts
from .pipeline import Prompts

__all__ = ["JsonlPrompts", "Prompts", "sources"]
