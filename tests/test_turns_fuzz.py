"""Nothing raises on what a policy writes or a tool gives back: some hundreds of cases here, 100,000 nightly."""

import json

import numpy as np
import pytest
import rollout_world as world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapo_jax import records, rewards
from tapo_jax.learn.batches import check_episode
from tapo_jax.rollout.chat import Chat, parse_turn
from tapo_jax.rollout.episode import Conversation, Limits, Opening
from tapo_jax.rollout.turns import MAX_DEPTH
from tapo_jax.types import Image, Prompt, ToolResult

TAGS = [f"<{slash}{tag}>" for tag in ("think", "tool_call", "answer", "tool_response") for slash in ("", "/")]
OPENINGS = [None, "", "<think>\n", "<think>\n\n</think>\n\n"]
CHATS = [
    world.chat(),
    Chat(world.chat().tokenizer, world.TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")),
]
PIXELS = world.pixels()

any_text = st.text(st.characters(exclude_categories=()), max_size=20)  # halves of surrogate pairs too
numbers = st.one_of(
    st.integers(), st.floats(), st.integers(295, 310).map(lambda n: 10**n), st.integers(390, 410).map(lambda n: 10**n)
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)),
    max_leaves=8,
)
deep = st.tuples(st.integers(1, 3000), st.sampled_from(["[", '{"a":'])).map(
    lambda made: made[1] * made[0] + "1" + {"[": "]", '{"a":': "}"}[made[1]] * made[0]
)
arguments = st.one_of(
    values.map(lambda value: json.dumps(value, ensure_ascii=False)),
    values.map(json.dumps),
    deep,
    st.sampled_from(["1e999", "-1e999", "NaN", "Infinity", "1" * 400, "1" * 5000, "0." + "1" * 5000, "[" * 50_000, ""]),
)
calls = st.tuples(any_text, arguments).map(
    lambda made: '<tool_call>\n{"name": %s, "arguments": %s}\n</tool_call>' % (json.dumps(made[0]), made[1])  # noqa: UP031
)
pieces = st.one_of(
    st.sampled_from(TAGS),
    st.sampled_from([*CHATS[0].tokenizer.get_vocab(), "<|im_end|>", "<image>", "\x00", "\x01assistant\x01"]),
    any_text,
    calls,
    arguments.map(lambda text: f"<tool_call>{text}</tool_call>"),
)
turns = st.lists(pieces, max_size=8).map("".join)


def check_turn(text: str, opening: str | None) -> None:
    parsed = parse_turn(text, opening)
    assert sum(found is not None for found in (parsed.call, parsed.answer, parsed.error)) <= 1
    assert not parsed.format_ok or parsed.call is not None or parsed.answer is not None
    for said in (parsed.think, parsed.answer or "", parsed.error or ""):
        said.encode()
    if parsed.call is not None:
        parsed.call.name.encode()
        json.dumps(parsed.call.arguments, ensure_ascii=False, allow_nan=False).encode()
        assert depth(parsed.call.arguments) < MAX_DEPTH
        for value in leaves(parsed.call.arguments):
            float(value)  # any number in it is one that a tool can compute with


def depth(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, inner), default=0) if isinstance(value, dict | list) else 0


def leaves(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    elif isinstance(value, int | float):
        yield value


images = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 9)).map(
    lambda made: Image(np.zeros((made[0], made[1] * (1 + 30 * (made[2] == 0)), 3), np.uint8), 1)
)
contents = st.one_of(any_text, st.sampled_from(["<|image_pad|>", "<|im_end|>", "\x01assistant\x01", "word " * 300]))
results = st.one_of(
    st.builds(ToolResult, text=contents, images=st.lists(images, max_size=2).map(tuple)),
    st.builds(ToolResult, parts=st.lists(st.one_of(contents, images), max_size=4).map(tuple)),
)


def check_conversation(chat: Chat, question: str, played: list[tuple[str, ToolResult]], think: int | None) -> None:
    """Plays scripted turns to their end. The episode fits together and can be recorded, whatever was written."""
    ids = chat.prompt_ids(question, [], [])
    limits = Limits(4, 4000, 6000, max_think_tokens=think)
    opening = Opening(Prompt("q", question, (), ("x",)), np.array(ids, np.int32), (), ())
    conversation = Conversation(opening, 0, limits=limits, chat=chat, image_tokens=PIXELS.tokens)
    forbidden_V = chat.forbidden_V(272)
    for text, result in played:
        if conversation.finish is not None:
            break
        written = [
            i for i in chat.tokenizer.encode(chat_text(text)).ids if not forbidden_V[i] and i not in chat.stop_ids
        ]
        while written and conversation.allowance > 0:
            drawn, written = written[: conversation.allowance], written[conversation.allowance :]
            conversation.add_sampled(drawn, [-1.0] * len(drawn))
        if conversation.allowance > 0:
            conversation.add_sampled([chat.stop_ids[0]], [-1.0])
        call = conversation.end_turn()
        if call is not None:
            conversation.add_result(call, result)
    conversation.finish = conversation.finish or "turns"
    episode = conversation.episode()
    check_episode(episode, world.config())
    episode.rewards = rewards.score(episode)
    kept = records.record(episode, step=0, prompt=0, advantage=0.0, credit=())
    json.dumps([turn.__dict__ for turn in kept.turns])


def chat_text(text: str) -> str:
    """As a tokenizer takes it: a policy writes tokens, which decode to whole characters."""
    return text.encode("utf-8", "replace").decode()


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=400, **COMMON)
@given(turns, st.sampled_from(OPENINGS))
def test_no_turn_raises(text, opening):
    check_turn(text, opening)


@settings(max_examples=100, **COMMON)
@given(
    st.sampled_from(CHATS), any_text, st.lists(st.tuples(turns, results), max_size=4), st.sampled_from([None, 1, 5, 40])
)
def test_no_conversation_raises(chat, question, played, think):
    check_conversation(chat, question, played, think)


@pytest.mark.nightly
@settings(max_examples=80_000, **COMMON)
@given(turns, st.sampled_from(OPENINGS))
def test_no_turn_raises_nightly(text, opening):
    check_turn(text, opening)


@pytest.mark.nightly
@settings(max_examples=20_000, **COMMON)
@given(
    st.sampled_from(CHATS), any_text, st.lists(st.tuples(turns, results), max_size=4), st.sampled_from([None, 1, 5, 40])
)
def test_no_conversation_raises_nightly(chat, question, played, think):
    check_conversation(chat, question, played, think)


@pytest.mark.parametrize("depth_of", [MAX_DEPTH - 2, MAX_DEPTH + 1, 300, 480, 900, 100_000])
def test_deep_nesting_is_an_error_that_the_policy_reads(depth_of):
    body = '{"name": "f", "arguments": {"q": %s}}' % ("[" * depth_of + "]" * depth_of)
    turn = parse_turn(f"<think>t</think><tool_call>{body}</tool_call>")
    assert (turn.call is not None) == (depth_of < MAX_DEPTH)
    if turn.call is None:
        assert "nested deeper" in turn.error or "not valid JSON" in turn.error


@pytest.mark.parametrize("number", ["1" * 400, "-" + "9" * 400, "1e400", "-1e999", "NaN", "Infinity", "-Infinity"])
def test_a_number_that_no_float_holds_is_an_error_that_the_policy_reads(number):
    turn = parse_turn('<tool_call>{"name": "f", "arguments": {"n": ' + number + "}}</tool_call>")
    assert turn.call is None and "number" in turn.error


def test_reading_a_turn_takes_time_in_proportion_to_its_length():
    """A quadratic reading would take minutes for these."""
    for text in ("<think>" * 200_000, "<tool_call>" * 200_000, "<answer>" * 200_000, "<think></think>" * 100_000):
        parse_turn(text)
        parse_turn(text, "<think>\n")
