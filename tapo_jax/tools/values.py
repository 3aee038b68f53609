"""Check which JSON values of a model can be compared, recorded and shown. Imports nothing of the project."""

import math
import re
from typing import Any

MAX_DEPTH = 32  # of the arguments of a call; deeper ones break the code that records and compares them
MAX_DIGITS = 300  # of a number; a float holds 308
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: not a character, and no encoder accepts it
_LARGEST = 10**MAX_DIGITS


def whole_text(text: str) -> str:
    """Return the text with halves of surrogate pairs replaced by U+FFFD."""
    return SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def too_deep(value: Any) -> bool:
    """Return whether lists and objects are nested deeper than MAX_DEPTH. No recursion: the policy sets the depth."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def problem(value: Any) -> str | None:
    """Return what is wrong with a JSON value, to follow "has" in a message; None if it can be compared and recorded."""
    if too_deep(value):
        return f"lists or objects nested deeper than {MAX_DEPTH} levels"
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            if SURROGATE.search(found):
                return "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        elif isinstance(found, float):
            if not math.isfinite(found):
                return "a number that is not finite"
        elif isinstance(found, int):
            if abs(found) >= _LARGEST:
                return f"a number of more than {MAX_DIGITS} digits"
        elif isinstance(found, dict):
            if not all(isinstance(name, str) for name in found):
                return "a name that is no string"
            waiting += [*found, *found.values()]
        elif isinstance(found, list):
            waiting += found
        elif found is not None:
            return f"a {type(found).__name__}, which is no JSON value"
    return None


def recordable(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a copy that JSON, UTF-8 and a page can hold: anything else is replaced by a word for it."""
    if isinstance(value, str):
        return whole_text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < _LARGEST else f"a number of more than {MAX_DIGITS} digits"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict | list | tuple) and depth == 0:
        return "\N{HORIZONTAL ELLIPSIS}"
    if isinstance(value, dict):
        return {
            whole_text(name) if isinstance(name, str) else type(name).__name__: recordable(inner, depth - 1)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [recordable(inner, depth - 1) for inner in value]
    return type(value).__name__
