"""Parse one assistant turn: a thought, then calls or an answer. Nothing here raises: the text is the policy's."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from tapo_jax.tools.values import MAX_DEPTH, MAX_DIGITS, too_deep, whole_text
from tapo_jax.types import ToolCall

_TAG = re.compile(r"<(think|tool_call|answer)>")
_WHOLE = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*(?:<tool_call>(?:(?!<tool_call>).)*</tool_call>|<answer>(?:(?!<answer>).)*</answer>)\s*",
    re.DOTALL,
)
_WHOLE_CALLS = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*(?:<tool_call>(?:(?!<tool_call>).)*</tool_call>\s*)+", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class WrittenCall:
    """One of several calls of a turn."""

    call: ToolCall | None
    error: str | None
    """What is wrong with it, if it is no call."""
    stop: int
    """Where it ends in the text that was parsed."""


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """What a turn asks for: a call, an answer, or an error that the policy can read."""

    think: str = ""
    call: ToolCall | None = None
    answer: str | None = None
    error: str | None = None
    format_ok: bool = False
    """Exactly `<think>…</think>`, then a `<tool_call>…</tool_call>` with a readable call or an `<answer>…</answer>`."""
    calls: tuple[WrittenCall, ...] = ()
    """The calls, if there are several and several are allowed; `call` is then None."""


def parse_turn(text: str, opening: str | None = None, *, most_calls: int = 1) -> ParsedTurn:
    """Parse one assistant turn, its stop token already removed.

    opening: what the chat template wrote at the beginning of the turn (`Chat.opening`); thinking models open the
        thought there. None: not known; a turn whose first tag closes a thought is then taken to have opened it.
    most_calls: how many calls a turn may have.

    Calls and answers inside a thought are only mentioned and do not count.
    """
    text = whole_text(text)
    if opening is None:
        opening = "<think>" if _closes_first(text) else ""
    text = opening + text
    parts, unclosed = _parts(text)
    calls = [body for kind, body, _ in parts if kind == "tool_call"]
    answers = [body for kind, body, _ in parts if kind == "answer"]
    think = next((body.strip() for kind, body, _ in parts if kind == "think"), "")
    if "think" in unclosed:
        return ParsedTurn(think=think, error="The thought is not closed by </think>: close it, then call or answer.")
    if 1 < len(calls) <= most_calls and not answers and "tool_call" not in unclosed:
        return _several(text, think, parts, len(opening))
    if most_calls > 1 and len(calls) > 1:
        return ParsedTurn(think=think, error=f"Write up to {most_calls} whole <tool_call> or one <answer> in a turn.")
    if len(calls) + len(answers) > 1:
        return ParsedTurn(think=think, error="Write one <tool_call> or one <answer> in a turn, not several.")
    format_ok = _WHOLE.fullmatch(text) is not None
    if answers:
        return ParsedTurn(think=think, answer=answers[0].strip(), format_ok=format_ok)
    if calls:
        call, error = _parse_call(calls[0])
        return ParsedTurn(think=think, call=call, error=error, format_ok=format_ok and error is None)
    if "tool_call" in unclosed:
        return ParsedTurn(think=think, error="The <tool_call> is not closed by </tool_call>.")
    return ParsedTurn(think=think)


def _several(text: str, think: str, parts: Sequence[tuple[str, str, int]], before: int) -> ParsedTurn:
    calls = tuple(WrittenCall(*_parse_call(body), stop - before) for kind, body, stop in parts if kind == "tool_call")
    format_ok = _WHOLE_CALLS.fullmatch(text) is not None and all(written.call is not None for written in calls)
    return ParsedTurn(think=think, calls=calls, format_ok=format_ok)


def _parts(text: str) -> tuple[list[tuple[str, str, int]], set[str]]:
    """Return (kind, body, end) of the outermost tags from left to right, and the kinds of tag that are left unclosed.

    Takes time proportional to the length of any text.
    """
    parts, unclosed, at = [], set(), 0
    while tag := _TAG.search(text, at):
        kind = tag[1]
        stop = -1 if kind in unclosed else text.find(f"</{kind}>", tag.end())
        if stop >= 0:
            at = stop + len(kind) + 3
            parts.append((kind, text[tag.end() : stop], at))
            continue
        unclosed.add(kind)
        if kind == "think":
            break  # everything after it is inside the thought
        at = tag.end()
    return parts, unclosed


def _closes_first(text: str) -> bool:
    """Return whether the first think tag is the closing one, and is not just part of a call's or an answer's text."""
    close = text.find("</think>")
    if close < 0 or "<think>" in text[:close]:
        return False
    inside = any(
        text.rfind(f"<{kind}>", 0, close) > text.rfind(f"</{kind}>", 0, close) for kind in ("tool_call", "answer")
    )
    return not inside or "<tool_call>" in text[close:] or "<answer>" in text[close:]


def _parse_call(body: str) -> tuple[ToolCall | None, str | None]:
    try:
        value = json.loads(body, parse_constant=_refuse, parse_int=_integer, parse_float=_float)
        if too_deep(value):
            return None, f"The tool call is nested deeper than {MAX_DEPTH} levels."
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return None, "The tool call has half of a surrogate pair (\\ud800 to \\udfff), which is no character."
    except (ValueError, RecursionError) as error:
        return None, f"The tool call is not valid JSON: {str(error)[:120]}."
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, 'A tool call is a JSON object with the fields "name" and "arguments".'
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None, '"arguments" must be a JSON object.'
    return ToolCall(value["name"], arguments), None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value
