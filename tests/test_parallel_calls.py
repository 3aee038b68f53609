"""Several calls in one turn: each has its tokens, its call, its result and its credit."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import rollout_world as world
import tiny_run
from chat_templates import VISION

from tapo_jax import check, records, rewards, tapo
from tapo_jax.config import UserError
from tapo_jax.learn.batches import pack, tool_steps
from tapo_jax.learn.outcomes import turn_anchors
from tapo_jax.rollout import episode as episode_module
from tapo_jax.rollout.chat import Chat, ParsedTurn, parse_turn
from tapo_jax.rollout.episode import Conversation, Limits, Opening
from tapo_jax.rollout.summary import summary
from tapo_jax.rollout.turns import WrittenCall
from tapo_jax.tools import ToolRunner, ZoomTool
from tapo_jax.train import train
from tapo_jax.types import Episode, Identity, Prompt, ToolCall, ToolResult, root_image
from tapo_jax.viewer import write_page

CHAT, PIXELS = world.chat(), world.pixels()
STOP = CHAT.stop_ids[0]
ANSWER = "<think>so</think><answer>Peru</answer>"


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


ONE, TWO, BAD = call("say", length=3), call("say", length=4), "<tool_call>{</tool_call>"


def begin(parallel: int = 4, turns: int = 4, length: int = 2000) -> Conversation:
    shown = (root_image(world.picture(0)),)
    counts = tuple(PIXELS.tokens(image) for image in shown)
    prompt = Prompt("q", "where?", tuple(image.pixels for image in shown), ("Peru",))
    opening = Opening(prompt, np.array(CHAT.prompt_ids("where?", counts, []), np.int32), shown, counts)
    limits = Limits(turns, 500, length, parallel_calls=parallel)
    return Conversation(opening, 0, limits=limits, chat=CHAT, image_tokens=PIXELS.tokens)


def write(conversation: Conversation, text: str) -> list[ToolCall]:
    token_N = [*CHAT.tokenizer.encode(text, add_special_tokens=False).ids, STOP]
    conversation.add_sampled(token_N, [-0.5] * len(token_N))
    return conversation.end_turns()


def play(*texts: str, **settings) -> Episode:
    """An episode in which `say` answers with its length, and every call has its length as what TAPO compares."""
    conversation = begin(**settings)
    for text in texts:
        calls = write(conversation, text)
        if calls:
            ran = [ToolCall(c.name, c.arguments, (Identity(str(c.arguments["length"])),)) for c in calls]
            conversation.add_results([(c, ToolResult("s" * c.arguments["length"])) for c in ran])
    return conversation.episode()


# Parsing.


def test_the_calls_of_a_turn_are_read_with_their_ends():
    text = f"<think>a</think>\n{ONE}\n{BAD}{TWO}"
    parsed = parse_turn(text, most_calls=3)
    assert parsed.call is None and parsed.error is None and parsed.think == "a" and not parsed.format_ok
    assert [written.call and written.call.arguments["length"] for written in parsed.calls] == [3, None, 4]
    assert "not valid JSON" in parsed.calls[1].error
    assert [text[: written.stop].endswith(body) for written, body in zip(parsed.calls, (ONE, BAD, TWO), strict=True)]
    assert parse_turn(f"<think>a</think>\n{ONE} {TWO}\n", most_calls=2).format_ok
    opened = parse_turn(f"a</think>{ONE}{TWO}", most_calls=2)  # the template opened the thought
    assert opened.format_ok and opened.calls[0].stop == len(f"a</think>{ONE}")


@pytest.mark.parametrize("text", [ONE * 3, f"{ONE}{TWO}<answer>x</answer>", f"{ONE}{TWO}<tool_call>"])
def test_too_many_calls_a_call_beside_an_answer_and_an_open_call_are_errors(text):
    parsed = parse_turn(text, most_calls=2)
    assert parsed.error == "Write up to 2 whole <tool_call> or one <answer> in a turn." and not parsed.calls


@pytest.mark.parametrize(
    "text", [ONE, f"<think>a</think>{ONE}", ANSWER, "x", "<tool_call>{", f"{ONE}<answer>x</answer>"]
)
def test_a_turn_of_one_call_is_read_as_ever(text):
    assert parse_turn(text, most_calls=4) == parse_turn(text)


def test_several_calls_are_an_error_where_one_is_allowed():
    assert parse_turn(ONE + TWO).error == "Write one <tool_call> or one <answer> in a turn, not several."
    assert write(begin(parallel=1), ONE + TWO) == []


# The conversation.


def test_each_call_is_a_turn_with_its_own_tokens_and_the_responses_follow_in_order():
    conversation = begin()
    start = len(conversation.token)
    text = f"<think>é</think>\n{ONE}\n{TWO}"
    assert [c.arguments["length"] for c in write(conversation, text)] == [3, 4]
    first, second = conversation.turns
    assert (first.start, first.stop, second.stop) == (start, second.start, len(conversation.token))
    assert CHAT.decode(conversation.token[first.start : first.stop]) == f"<think>é</think>\n{ONE}" == first.text
    assert CHAT.decode(conversation.token[second.start : second.stop - 1]) == f"\n{TWO}" == second.text
    assert (first.continues, second.continues) == (False, True) and conversation.messages == 1
    results = [(ToolCall("say", {"length": n}), ToolResult("s" * n)) for n in (3, 4)]
    before = len(conversation.token)
    conversation.add_results(results)
    assert conversation.token[before:] == CHAT.tool_responses_ids([("sss", (), ()), ("ssss", (), ())])
    assert [turn.result.text for turn in conversation.turns] == ["sss", "ssss"]
    assert write(conversation, ANSWER) == [] and conversation.finish == "answer"
    played = conversation.episode()
    assert played.mask_T.sum() == sum(turn.stop - turn.start for turn in played.turns)


def test_a_call_that_cannot_be_read_gets_its_response_in_its_place():
    conversation = begin()
    assert [c.arguments["length"] for c in write(conversation, f"{BAD}{ONE}{BAD}")] == [3]
    conversation.add_results([(ToolCall("say", {"length": 3}), ToolResult("sss"))])
    assert [turn.result.error for turn in conversation.turns] == ["unparsable", None, "unparsable"]
    assert [turn.is_step for turn in conversation.turns] == [False, True, False]
    conversation = begin()
    assert write(conversation, BAD + BAD) == [] and conversation.finish is None
    assert [turn.result.error for turn in conversation.turns] == ["unparsable"] * 2


def test_a_message_counts_once_and_the_last_is_not_executed():
    conversation = begin(turns=2)
    write(conversation, ONE + TWO + ONE)
    conversation.add_results([(ToolCall("say", {"length": 3}), ToolResult("s"))] * 3)
    assert conversation.finish is None
    assert write(conversation, ONE + TWO) == [] and conversation.finish == "turns"
    assert [turn.call.arguments["length"] for turn in conversation.turns[3:]] == [3, 4]


def test_responses_that_do_not_fit_together_are_not_appended():
    conversation = begin(length=500)
    write(conversation, ONE + TWO)
    before = len(conversation.token)
    conversation.add_results([(ToolCall("say", {"length": 3}), ToolResult("s" * 200))] * 2)
    assert conversation.finish == "length" and len(conversation.token) == before


def test_images_keep_their_order_and_the_text_says_the_number_that_they_get():
    conversation = begin()
    zooms = [call("image_zoom_in_tool", bbox_2d=[0, 0, 500, n], img_idx=0) for n in (500, 1000)]
    calls = write(conversation, "".join(zooms))
    runner = ToolRunner([ZoomTool()], workers=2, timeout_s=30, retries=0)
    conversation.add_results([future.result() for future in runner.submit_turn(calls, conversation.images)])
    assert [turn.result.text for turn in conversation.turns] == ["Image 1.", "Image 2."]
    assert [image.pixels.shape[0] for image in conversation.images] == [24, 12, 24]
    assert all(conversation.token[at] == CHAT.image_token for at in conversation.image_start)


def test_the_templates_form_for_several_responses_is_used():
    qwen = Chat(CHAT.tokenizer, VISION)
    text = qwen.decode(qwen.tool_responses_ids([("one", (), ()), ("two", (), ())]))
    assert text.count("<|im_start|>user") == 1
    assert text.count("<tool_response>") == 2 and text.index("one") < text.index("two")
    assert qwen.tool_response_ids("one", ()) == qwen.tool_responses_ids([("one", (), ())])


# Credit, rewards, records.


def test_only_the_tokens_of_the_call_that_a_success_made_too_are_corrected():
    right = play(f"<think>a</think>{ONE}", ANSWER)
    wrong = play(f"<think>a</think>{TWO}{ONE}{call('say', length=9)}", "<think>b</think><answer>Chile</answer>")
    episodes = [right, wrong]
    batch = pack(episodes, world.config(), PIXELS, length=1024, patches=64, steps=4)
    for k, turn in enumerate(tool_steps(wrong, 4)):
        assert set(batch.step_BxT[1, turn.start : turn.stop]) == {k}
    calls = [[[(turn.call.name, turn.call.parameters) for turn in tool_steps(e, 4)] for e in episodes]]
    steps = tapo.encode_steps(calls, steps=4, features=32)
    advantage = np.array([[1.0, -1.0]], np.float32)
    moved = tapo.transfer(steps, np.array([[True, False]]), advantage, tapo.Settings())
    token_BxT = np.asarray(tapo.token_advantages(advantage, moved.advantage_PxS, batch.step_BxT))
    corrected = [bool(token_BxT[1, turn.start] != -1) for turn in tool_steps(wrong, 4)]
    assert corrected == [False, True, False]
    for turn in tool_steps(wrong, 4):
        assert len(set(token_BxT[1, turn.start : turn.stop])) == 1


def test_the_format_is_that_of_the_message():
    good = play(f"<think>a</think>{ONE}{TWO}", ANSWER)
    assert rewards.score(good)["format"] == 1.0
    assert rewards.score(play(f"{ONE}{TWO}", ANSWER))["format"] == 0.0
    assert rewards.score(play(f"<think>a</think>{ONE} and {TWO}", ANSWER))["format"] == 0.0
    assert summary([good], ("say",), 1.0)["rollout/turns"] == 2 and summary([good], ("say",), 1.0)["tools/calls"] == 2


def test_the_states_of_gigpo_are_those_of_messages():
    several, one = play(f"<think>a</think>{ONE}{TWO}", ANSWER), play(f"<think>a</think>{ONE}", ANSWER)
    anchors = turn_anchors(several, 4)
    assert anchors[0] == turn_anchors(one, 4)[0] and anchors[2:] == [0, 0] and anchors[1] not in (0, anchors[0])
    assert anchors[1] != turn_anchors(one, 4)[1]  # it saw another response too


def test_a_recording_has_every_call_and_the_page_shows_it(tmp_path):
    played = play(f"<think>a</think>{ONE}{TWO}", ANSWER)
    played.rewards = rewards.score(played)
    credit = [
        {"adv_after": -0.5 * k, "correctable": False, "corrected": False, "sim": 0.0, "support": 0.0, "witness": None}
        for k in range(2)
    ]
    records.save(tmp_path / "e.npz", [records.record(played, step=1, prompt=0, advantage=1.0, credit=credit)])
    [kept] = records.load(tmp_path / "e.npz")
    assert [(turn.slot, turn.continues, turn.result) for turn in kept.turns] == [
        (0, False, "sss"), (1, True, "ssss"), (-1, False, None),
    ]  # fmt: skip
    write_page([tmp_path / "e.npz"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "turn 1 · call 2" in page and "k1" in page and "ssss" in page


def test_more_calls_than_slots_of_tapo_are_one_sentence_before_anything_is_compiled(tmp_path):
    config = tiny_run.config(tmp_path)
    config.tools.parallel_calls = 2
    with pytest.raises(UserError, match="tapo.max_tool_steps is 3, rollout.max_turns 3 and tools.parallel_calls 2"):
        check.check(config)


def read_turn(text: str, *, most_calls: int = 1) -> ParsedTurn:
    """The text's hash decides: turns with a call have two, of which every fourth second one is broken."""
    parsed, rest = tiny_run.read_turn(text), zlib.crc32(text.encode()) // 64
    if parsed.call is None or most_calls < 2 or len(text) < 2:
        return parsed
    second = (None, "That is no call.") if rest % 4 == 0 else (ToolCall("say", {"length": rest % 2}), None)
    middle = len(text) // 2
    return ParsedTurn(calls=(WrittenCall(parsed.call, None, middle), WrittenCall(*second, len(text))))


def run(workdir: str, model: str) -> None:
    """Train two steps with up to two calls a turn, on one device."""
    tiny_run.patch(setattr)
    episode_module.parse_turn = read_turn
    config = tiny_run.config(Path(model), total_steps=2, log__episodes_every=1)
    config.tools.parallel_calls = 2
    config.tapo.max_tool_steps = 6
    config.rollout.max_length = 200
    config.eval.update(at_start=False, at_end=False)
    train(config, workdir)


def test_a_run_with_several_calls_in_a_turn(tmp_path):
    """In a process of its own, so that it has one device."""
    model = tiny_run.write_model(tmp_path / "model")
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, __file__, str(tmp_path / "run"), str(model)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = records.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in steps if line["step"]] == [1, 2]
    played = [e for n in (1, 2) for e in records.load(tmp_path / "run" / "episodes" / f"step_{n:06d}.npz")]
    further = [turn for e in played for turn in e.turns if turn.continues and turn.result]
    assert any(turn.slot > 0 for turn in further) and any(turn.error == "unparsable" for turn in further)


if __name__ == "__main__":
    run(*sys.argv[1:])
