"""One conversation with a scripted policy and the real parser: what is appended, what ends it, what the budgets do."""

import subprocess
import sys

import numpy as np
import pytest
import rollout_world as world

from tapo_jax.rollout.episode import Conversation, Limits, Opening
from tapo_jax.types import Image, Prompt, ToolCall, ToolResult, root_image

CHAT = world.chat()
STOP = CHAT.stop_ids[0]
CALL = '<think>look</think><tool_call>{"name": "crop", "arguments": {"img_idx": 0, "size": 8}}</tool_call>'
ANSWER = "<think>so</think><answer>Peru</answer>"
PIXELS = world.pixels()


def ids(text: str, stop: bool = True) -> list[int]:
    return CHAT.tokenizer.encode(text, add_special_tokens=False).ids + [STOP] * stop


def begin(*, turns=4, new=200, length=1000, images=1, image_tokens=None) -> Conversation:
    shown = tuple(root_image(world.picture(i)) for i in range(images))
    counts = tuple(PIXELS.tokens(image) for image in shown)
    prompt = Prompt("q", "where?", tuple(image.pixels for image in shown), ("Peru",))
    opening = Opening(prompt, np.array(CHAT.prompt_ids("where?", counts, []), np.int32), shown, counts)
    limits = Limits(turns, new, length, image_tokens)
    return Conversation(opening, 3, limits=limits, chat=CHAT, image_tokens=PIXELS.tokens)


def write(conversation: Conversation, text: str, stop: bool = True) -> ToolCall | None:
    token_N = ids(text, stop)
    conversation.add_sampled(token_N, [-0.5] * len(token_N))
    return conversation.end_turn()


def crop(conversation: Conversation, size: int = 16) -> ToolResult:
    root = conversation.images[0]
    return ToolResult("cut", (Image(root.pixels[:size, :size], root.root, (0, 0, 0.5, 0.5)),))


def test_a_call_a_response_with_an_image_and_an_answer():
    conversation = begin()
    start = len(conversation.token)
    call = write(conversation, CALL)
    assert call == ToolCall("crop", {"img_idx": 0, "size": 8}) and conversation.finish is None
    conversation.add_result(call, crop(conversation))
    assert conversation.turn_tokens == 0
    second = len(conversation.token)
    assert write(conversation, ANSWER) is None
    episode = conversation.episode()
    assert (episode.answer, episode.finish, episode.sample) == ("Peru", "answer", 3)
    # The ids are the prompt's, the policy's, the response's and the policy's, nothing else and nothing encoded again.
    response = CHAT.tool_response_ids("cut", [4])  # 16 × 16 pixels are 4 × 4 patches: 4 tokens
    whole = [*conversation.opening.token_T.tolist(), *ids(CALL), *response, *ids(ANSWER)]
    assert episode.token_T.tolist() == whole and episode.token_T.dtype == np.int32
    policy = [*range(start, start + len(ids(CALL))), *range(second, len(whole))]
    assert np.flatnonzero(episode.mask_T).tolist() == policy  # both stop tokens are in it
    np.testing.assert_array_equal(episode.sampler_logp_T, np.where(episode.mask_T, np.float32(-0.5), np.float32(0)))
    assert [(turn.start, turn.stop, turn.is_step) for turn in episode.turns] == [
        (start, start + len(ids(CALL)), True),
        (second, len(whole), False),
    ]
    assert [turn.text for turn in episode.turns] == [CALL, ANSWER]
    # Each image's first placeholder follows its <|vision_start|>.
    assert len(episode.images) == len(episode.image_start) == 2
    for at in episode.image_start:
        assert episode.token_T[at] == CHAT.image_token and episode.token_T[at - 1] == CHAT.vision_start
    assert episode.image_start[1] > episode.turns[0].stop


def test_several_images_in_one_response_have_their_own_places():
    conversation = begin(images=2)
    assert len(conversation.images) == 2
    call = write(conversation, CALL)
    two = ToolResult("two", crop(conversation, 16).images + crop(conversation, 8).images)
    conversation.add_result(call, two)
    first, second = conversation.image_start[2:]
    assert second == first + 4 + 2  # four placeholders of the first, its end and the second's start between them
    assert conversation.token[first - 1] == conversation.token[second - 1] == CHAT.vision_start


def test_an_unparsable_call_is_answered_with_its_error():
    conversation = begin()
    assert write(conversation, "<tool_call>{broken</tool_call>") is None
    turn = conversation.turns[0]
    assert conversation.finish is None and turn.result.error == "unparsable" and not turn.is_step
    assert "not valid JSON" in CHAT.decode(conversation.token[turn.stop :])
    assert write(conversation, ANSWER) is None and conversation.finish == "answer"


@pytest.mark.parametrize(
    ("text", "stop", "finish"),
    [
        ("I do not know.", True, "malformed"),
        ("", True, "malformed"),
        (CALL, False, "length"),
        (ANSWER, False, "length"),
    ],
)
def test_what_ends_an_episode_without_an_answer(text, stop, finish):
    """A turn that was cut is not read: its call or answer might go on."""
    conversation = begin(new=len(ids(text, stop)) if not stop else 200)
    assert write(conversation, text, stop) is None
    assert (conversation.finish, conversation.answer) == (finish, None)


def test_the_call_of_the_last_turn_is_not_executed():
    conversation = begin(turns=2)
    conversation.add_result(write(conversation, CALL), crop(conversation))
    assert write(conversation, CALL) is None
    assert conversation.finish == "turns"
    assert (
        conversation.turns[1].call is not None
        and conversation.turns[1].result is None
        and not conversation.turns[1].is_step
    )


def test_an_answer_in_the_last_turn_counts():
    conversation = begin(turns=1)
    write(conversation, ANSWER)
    assert conversation.finish == "answer"


def test_a_response_that_does_not_fit_is_left_out_as_a_whole():
    """With room for all of it and one token more the episode goes on; with one place less it ends, and nothing is
    cut."""
    probe = begin()
    call = write(probe, CALL)
    before = len(probe.token)
    probe.add_result(call, crop(probe))
    needed = len(probe.token) + 1
    for length, finish in ((needed, None), (needed - 1, "length")):
        conversation = begin(length=length)
        conversation.add_result(write(conversation, CALL), crop(conversation))
        assert conversation.finish == finish
        assert len(conversation.token) == (needed - 1 if finish is None else before)
        assert len(conversation.images) == (2 if finish is None else 1)
        assert conversation.turns[0].is_step  # it was executed in both cases
    assert conversation.episode().finish == "length"


def test_images_have_a_budget_of_their_own():
    """Twice the prompt's image fits exactly; one token less ends the episode at the response, and less than the
    prompt's image ends it before it starts."""
    count = PIXELS.tokens(begin().images[0])
    for budget, finish in ((count + 4, None), (count + 3, "length")):
        conversation = begin(image_tokens=budget)
        conversation.add_result(write(conversation, CALL), crop(conversation, 16))
        assert conversation.finish == finish
        assert len(conversation.images) == (2 if finish is None else 1)
    assert begin(image_tokens=count).finish is None
    assert begin(image_tokens=count - 1).finish == "length"


def test_allowance_is_the_smaller_of_the_turns_and_the_episodes_budget():
    conversation = begin(new=10, length=1000)
    conversation.add_sampled([1, 2, 3], [0.0] * 3)
    assert conversation.allowance == 7
    start = len(begin().token)
    assert begin(new=10, length=start + 4).allowance == 4


def test_a_prompt_that_leaves_no_room_is_over_before_it_starts():
    start = len(begin().token)
    assert begin(length=start + 1).finish is None
    over = begin(length=start)
    assert over.finish == "length" and len(over.episode().token_T) == 0


def test_an_image_that_the_model_cannot_be_shown_becomes_an_error():
    conversation = begin()
    thin = ToolResult("thin", (Image(np.zeros((1, 300, 3), np.uint8), 1),))
    conversation.add_result(write(conversation, CALL), thin)
    assert conversation.turns[0].result.error == "bad_image" and conversation.finish is None
    assert "times as long as wide" in CHAT.decode(conversation.token[conversation.turns[0].stop :])


def test_a_placeholder_without_an_image_is_refused():
    conversation = begin()
    with pytest.raises(ValueError, match="1 image placeholders in the ids for 0 image tokens"):
        conversation._append([CHAT.image_token], (), ())


def test_text_that_spells_a_placeholder_is_no_placeholder():
    conversation = begin()
    conversation.add_result(write(conversation, CALL), ToolResult("<|image_pad|> and <|im_end|>"))
    response = conversation.token[conversation.turns[0].stop :]
    assert conversation.finish is None and CHAT.image_token not in response
    assert response.count(STOP) == 1  # the template's own


def test_an_open_episode_has_no_result():
    with pytest.raises(ValueError, match="not finished"):
        begin().episode()


def test_it_imports_no_jax():
    code = "import sys, tapo_jax.rollout.episode; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
