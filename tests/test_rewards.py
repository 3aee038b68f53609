"""Normalised exact match, and a format reward that tags alone do not earn."""

import numpy as np
import pytest

from tapo_jax import rewards
from tapo_jax.types import Episode, Prompt, ToolCall, ToolResult, Turn

CALL = '<think>t</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Lima", 1),
        (" lima. ", 1),
        ("the LIMA", 1),
        ("Brasilia", 1),
        ("Brasília", 1),
        ("Lima Peru", 0),
        ("", 0),
        ("the", 0),
        (None, 0),
        ("利马", 1),
    ],
)
def test_exact_match(answer, score):
    assert rewards.exact_match(answer, ("Lima", "Brasília", "利马")) == score


def episode(texts, executed=(), finish="answer", answer="Lima"):
    turns = [
        Turn(i, i + 1, text, ToolCall("f", {}), ToolResult("ok", error=None if i in executed else "exception"))
        for i, text in enumerate(texts)
    ]
    prompt = Prompt("p", "?", (), ("Lima",))
    empty = np.zeros(0, np.float32)
    return Episode(prompt, 0, empty.astype(np.int32), empty.astype(bool), empty, [], [], turns, answer, finish)


@pytest.mark.parametrize(
    ("given", "score"),
    [
        (episode([CALL, "<think>t</think><answer>Lima</answer>"], executed=(0,)), 1.0),
        (episode([CALL, "<think>t</think><answer>Lima</answer>"]), 0.0),  # the call was not executed
        (episode(["<think>t</think><answer>Lima</answer>"]), 0.0),  # no call at all
        (episode([CALL, "<answer>Lima</answer>"], executed=(0,)), 0.0),  # a turn without thinking
        (episode([CALL], executed=(0,), finish="length", answer=None), 0.0),
        (episode([], finish="length", answer=None), 0.0),
    ],
)
def test_format(given, score):
    assert rewards.score(given)["format"] == score


def test_total_is_the_weighted_sum():
    values = rewards.score(episode([CALL, "<think>t</think><answer>Lima</answer>"], executed=(0,)))
    assert rewards.total(values, {"accuracy": 1.0, "format": 0.5}) == 1.5
    with pytest.raises(KeyError):
        rewards.total(values, {"style": 1.0})


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("1889", 1), ("1,889 m", 1), ("about 1889.5 metres.", 1), ("(1889)", 1), ("1889, I think", 1),
        ("in 1700 or 1800", 0), ("1700-1800", 0), ("-1889", 0), ("\N{MINUS SIGN}1889", 0), ("18,89", 0), ("2100", 0),
        ("", 0), (None, 0), ("many", 0), ("nan", 0), ("9" * 400, 0),
    ],
)  # fmt: skip
def test_a_number_is_right_in_its_range(answer, right):
    """InfoSeek's numeric questions: one number, between the ends."""
    assert rewards.in_range(answer, [[1700.1, 2077.9]]) == right
    assert rewards.in_range(answer, []) == 0
