"""Cut the text of a tool's result to a number of tokens. Plain Python, no jax."""

import dataclasses

from tapo_jax.rollout.chat import Chat
from tapo_jax.types import Image, ToolResult


def cut_result(result: ToolResult, most: int, chat: Chat) -> ToolResult:
    """Return the result with at most `most` tokens of text, cut between two tokens, with a mark where it is cut.

    The mark is among these tokens. Of a result in parts, the texts together have them; images are not cut.
    """
    texts = [part for part in result.parts if isinstance(part, str)] if result.parts else [result.text]
    counts = [chat.tokens(text) for text in texts]
    if sum(counts) <= most:
        return result
    mark = f"\n[Cut after {most} of {sum(counts)} tokens.]"
    if chat.tokens(mark) >= most:
        mark = ""  # no room for it
    left, marked = most - chat.tokens(mark), False
    parts: list[str | Image] = []
    for part in result.parts or (result.text,):
        if not isinstance(part, str):
            parts.append(part)
        elif not marked:
            count = chat.tokens(part)
            marked = count > left
            parts.append(chat.first_tokens(part, left) + mark if marked else part)
            left -= count
    if result.parts:
        return dataclasses.replace(result, parts=tuple(parts))
    return dataclasses.replace(result, text="".join(part for part in parts if isinstance(part, str)))
