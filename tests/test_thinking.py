"""Thoughts: opened by the chat template, mentioned calls, and the budget after which one is closed by force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rollout_world as world
from flax import nnx

from tapo_jax import rewards, sharding
from tapo_jax.learn import batches
from tapo_jax.learn.logprobs import token_logp
from tapo_jax.models import qwen3_vl
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.chat import Chat, parse_turn
from tapo_jax.rollout.episode import Conversation, Limits, Opening
from tapo_jax.rollout.players import Players
from tapo_jax.rollout.rounds import rollout
from tapo_jax.rollout.sampler import Sampler, make_shapes
from tapo_jax.rollout.schedule import Sampling
from tapo_jax.types import Episode, Prompt, ToolCall, ToolResult, Turn

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
THINKING = world.TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
NO_THINKING = world.TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}")
OPENED = Chat(world.chat().tokenizer, THINKING)


def episode(texts: list[str], opening: str | None) -> Episode:
    turns = [Turn(i, i + 1, text, opening=opening) for i, text in enumerate(texts)]
    for turn in turns[:-1]:
        turn.call, turn.result = ToolCall("f", {}), ToolResult("ok")
    empty = np.zeros(0, np.float32)
    prompt = Prompt("p", "?", (), ("Lima",))
    return Episode(prompt, 0, empty.astype(int), empty.astype(bool), empty, [], [], turns, "Lima", "answer")


def test_the_opening_of_a_template_is_found():
    assert OPENED.opening == "<think>\n" and world.chat().opening == ""
    assert Chat(world.chat().tokenizer, NO_THINKING).opening == "<think>\n\n</think>\n\n"
    assert OPENED.decode(OPENED.prompt_ids("who?", [], [])).endswith("<|im_start|>assistant\n<think>\n")
    assert OPENED.decode(OPENED.tool_response_ids("who", [])).endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("opening", ["<think>\n", None])
def test_a_thought_that_the_template_opened_has_the_form(opening):
    called = parse_turn(f"I zoom.\n</think>\n\n{CALL}", opening)
    assert called.call == ToolCall("f", {}) and called.format_ok and called.think == "I zoom."
    answered = parse_turn("It is Lima.\n</think>\n\n<answer>Lima</answer>", opening)
    assert answered.answer == "Lima" and answered.format_ok and answered.think == "It is Lima."


@pytest.mark.parametrize("opening", ["<think>\n", None])
@pytest.mark.parametrize("mention", [CALL, "<answer>Rome</answer>", "<tool_call>", CALL + CALL, "<answer>"])
def test_what_a_thought_mentions_counts_for_nothing(opening, mention):
    turn = parse_turn(f"A {mention} would help.\n</think>\n\n<answer>Lima</answer>", opening)
    assert turn.call is None and turn.answer == "Lima" and turn.error is None and turn.format_ok
    turn = parse_turn(f"A {mention} would help.\n</think>\n\n{CALL}", opening)
    assert turn.call == ToolCall("f", {}) and turn.answer is None and turn.format_ok
    turn = parse_turn(f"A {mention} would help.\n</think>\n\nI do not know.", opening)
    assert turn.call is None and turn.answer is None and not turn.format_ok


@pytest.mark.parametrize(
    ("text", "opening"),
    [(f"I need {CALL}", "<think>\n"), (f"<think>I need {CALL}", None), ("<answer>x</answer>", "<think>")],
)
def test_a_thought_that_is_never_closed_does_nothing(text, opening):
    turn = parse_turn(text, opening)
    assert turn.call is None and turn.answer is None and "not closed by </think>" in turn.error and not turn.format_ok


def test_an_argument_may_spell_the_tags():
    for text in ("</think>", "<think>", "<answer>x</answer>", "<think>x</think>"):
        call = '{"name": "f", "arguments": {"q": "TEXT"}}'.replace("TEXT", text)
        turn = parse_turn(f"<think>t</think><tool_call>{call}</tool_call>")
        assert turn.call == ToolCall("f", {"q": text}), text
    turn = parse_turn('<tool_call>{"name": "f", "arguments": {"q": "</think>"}}</tool_call>')
    assert turn.call == ToolCall("f", {"q": "</think>"}) and not turn.format_ok


def test_the_format_reward_knows_who_opened_the_thought():
    opened = [f"I zoom.\n</think>\n\n{CALL}", "It is Lima.\n</think>\n\n<answer>Lima</answer>"]
    assert rewards.format_score(episode(opened, "<think>\n")) == 1.0
    assert rewards.format_score(episode(opened, None)) == 1.0
    assert rewards.format_score(episode(opened, "")) == 0.0  # nobody opened it
    written = [f"<think>{opened[0]}", f"<think>{opened[1]}"]
    assert rewards.format_score(episode(written, "")) == 1.0
    assert rewards.format_score(episode(["<answer>Lima</answer>"], "<think>\n\n</think>\n\n")) == 0.0  # no call
    assert rewards.format_score(episode([CALL, "<answer>Lima</answer>"], "<think>\n\n</think>\n\n")) == 1.0


def begin(chat: Chat, **limits) -> Conversation:
    ids = np.array(chat.prompt_ids("where?", [], []), np.int32)
    opening = Opening(Prompt("q", "where?", (), ("Peru",)), ids, (), ())
    budget = Limits(**{"max_turns": 4, "max_new_tokens": 80, "max_length": 400, "max_think_tokens": 12} | limits)
    return Conversation(opening, 0, limits=budget, chat=chat, image_tokens=lambda image: 1)


def write(conversation: Conversation, text: str, stop: bool = False) -> None:
    ids = OPENED.tokenizer.encode(text, add_special_tokens=False).ids + [OPENED.stop_ids[0]] * stop
    conversation.add_sampled(ids, [-0.5] * len(ids))


def test_a_call_mentioned_in_an_opened_thought_is_not_executed():
    conversation = begin(OPENED, max_think_tokens=None)
    write(conversation, f"I could {CALL}", stop=True)
    assert conversation.end_turn() is None and conversation.turns[0].call is None
    assert conversation.turns[0].result.error == "unparsable" and conversation.turns[0].opening == "<think>\n"


def test_a_long_thought_is_closed_outside_of_the_mask():
    conversation = begin(OPENED)
    start = len(conversation.token)
    assert conversation.allowance == 12
    write(conversation, "12345678")
    assert conversation.allowance == 4 and len(conversation.token) == start + 8
    write(conversation, "9abc")
    closing = list(OPENED.end_of_thought)
    assert conversation.token[start + 12 :] == closing and OPENED.decode(closing) == "\n</think>\n\n"
    assert conversation.allowance == 80 - 12 - len(closing)
    write(conversation, "<answer>Peru</answer>", stop=True)
    assert conversation.end_turn() is None and conversation.answer == "Peru"
    turn, done = conversation.turns[0], conversation.episode()
    assert turn.forced == (start + 12, start + 12 + len(closing))
    assert parse_turn(turn.opening + turn.text).format_ok
    forced_T = np.zeros(len(done.token_T), bool)
    forced_T[slice(*turn.forced)] = True
    assert not done.mask_T[forced_T].any() and done.mask_T[start:][~forced_T[start:]].all()
    assert not done.sampler_logp_T[forced_T].any()
    batches.check_episode(done, world.config())


def test_a_thought_closed_in_time_has_no_budget_any_more():
    conversation = begin(OPENED)
    write(conversation, "a</think>bc")
    assert conversation.allowance == 80 - 11
    write(conversation, "x" * 20)
    assert conversation._forced is None


def test_a_turn_without_a_thought_has_no_budget():
    conversation = begin(world.chat())
    write(conversation, "<answer>")
    assert conversation.allowance == 80 - 8
    written = begin(world.chat())
    write(written, "<think>12345")
    assert written._forced is not None


def test_where_the_closing_does_not_fit_the_turn_runs_out():
    conversation = begin(OPENED, max_new_tokens=12 + len(OPENED.end_of_thought))
    write(conversation, "x" * 12)
    assert conversation._forced is None and conversation.allowance == len(OPENED.end_of_thought)


def test_every_turn_has_the_budget_anew():
    conversation = begin(OPENED)
    write(conversation, "123456789abc")
    write(conversation, CALL, stop=True)
    call = conversation.end_turn()
    conversation.add_result(call, ToolResult("ok"))
    assert conversation.allowance == 12 and conversation._forced is None


# In a rollout: the cache, the keys and the trainer with tokens that nobody drew.

CAPACITY = 160
STOPS = 12


def thinking_chat() -> Chat:
    return Chat(world.chat().tokenizer, THINKING, stop_ids=range(256 - STOPS, 256))


def play(chat: Chat, chunk: int, slots: int, budget: int | None):
    shapes = {"slots": slots, "capacity": CAPACITY, "chunk": chunk, "image_patches": 36, "most_patches": 4 * CAPACITY}
    mesh = sharding.one_device()
    shapes = make_shapes(world.config(), mesh, **shapes)
    sampler = Sampler(world.model(), mesh, shapes, stop_ids=chat.stop_ids, forbidden_V=chat.forbidden_V(272))
    limits = Limits(3, 40, CAPACITY, max_think_tokens=budget)
    players = Players(sampler, chat, world.pixels(), world.runner(), limits)
    return rollout(players, world.params(), world.prompts(4), 2, Sampling(temperature=0.8, seed=3))[0]


def test_forced_tokens_in_a_rollout(monkeypatch):
    """The cache holds them where the trainer reads them, and neither chunks nor slots change an episode."""
    monkeypatch.setattr(episode_module, "parse_turn", world.read_turn)
    chat = thinking_chat()
    episodes = play(chat, chunk=5, slots=6, budget=9)
    forced = [turn.forced for episode in episodes for turn in episode.turns if turn.forced]
    assert len(forced) > 5
    for episode in episodes:
        for turn in episode.turns:
            if turn.forced:
                assert episode.token_T[slice(*turn.forced)].tolist() == chat.end_of_thought
                assert turn.forced[0] == turn.start + 9 and turn.stop > turn.forced[1]
    batch = batches.pack(episodes, world.config(), world.pixels(), length=CAPACITY, patches=256, steps=3)
    model = nnx.merge(nnx.graphdef(world.model()), world.params())

    @jax.jit
    def logp(inputs):
        hidden_BxTxD = qwen3_vl.hidden_states(model, inputs)
        forbidden_V = jnp.array(chat.forbidden_V(272))
        return token_logp(model, hidden_BxTxD, inputs.token_BxT, temperature=0.8, forbidden_V=forbidden_V)[0]

    wanted_BxT = np.where(batch.mask_BxT, logp(batch.inputs), 0)
    np.testing.assert_allclose(batch.sampler_logp_BxT, wanted_BxT, atol=1e-4, rtol=0)
    again = play(chat, chunk=16, slots=2, budget=9)
    for one, other in zip(episodes, again, strict=True):
        assert np.array_equal(one.token_T, other.token_T) and np.array_equal(one.mask_T, other.mask_T)
    plain = play(chat, chunk=5, slots=6, budget=None)
    assert not any(turn.forced for episode in plain for turn in episode.turns)
    episode = next(episode for episode in episodes if any(turn.forced for turn in episode.turns))
    turns = [dataclasses.replace(turn, forced=None) for turn in episode.turns]
    with pytest.raises(ValueError, match="not the union"):
        batches.check_episode(dataclasses.replace(episode, turns=turns), world.config())
