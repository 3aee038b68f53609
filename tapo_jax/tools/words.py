"""What a word is, for the text search."""

import re

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text as they are indexed and searched."""
    return _WORD.findall(text.lower())
