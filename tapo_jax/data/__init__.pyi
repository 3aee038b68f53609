from . import sources
from .jsonl import JsonlPrompts
from .pipeline import Prompts
from .readers import read

__all__ = ["JsonlPrompts", "Prompts", "read", "sources"]
