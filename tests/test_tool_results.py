"""What tools give and raise: everything becomes a result that can be shown, compared, recorded and put on a page."""

import asyncio
import concurrent.futures
import functools
import json
import sys

import numpy as np
import PIL.Image
import pytest

from tapo_jax import records, viewer
from tapo_jax.config import UserError
from tapo_jax.tools import results, values
from tapo_jax.tools.base import BadCall, ToolRunner, function_schema
from tapo_jax.types import Episode, Image, Prompt, ToolCall, ToolResult, Turn, root_image

TEXT = function_schema("t", "", {"q": {"type": "string"}}, ("q",))
ANY = function_schema("t", "", {"q": {}}, ())


class Given:
    """A tool that gives what a function gives."""

    name = "t"

    def __init__(self, function, schema=TEXT):
        self.function, self.schema = function, schema

    def __call__(self, arguments, images):
        return self.function(arguments, images)


def run(function, arguments=None, *, schema=TEXT, images=(), threaded=True):
    runner = ToolRunner([Given(function, schema)], workers=1, timeout_s=5.0, retries=0, threaded=threaded)
    return runner.submit(ToolCall("t", {"q": "x"} if arguments is None else arguments), images).result()


def given(value):
    return run(lambda arguments, images: value)[1]


def raising(error, **options):
    def function(arguments, images):
        raise error

    return run(function, **options)[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        (4, "4"),
        ({"text": "of a dict"}, "of a dict"),
        (ToolResult(text=None), ""),
        (ToolResult(text=5), "5"),
        (ToolResult(text=b"x\xff"), "x\ufffd"),
        (ToolResult(text="a \ud83d b"), "a \ufffd b"),
        (ToolResult(text="a \x00 b"), "a \x00 b"),
        (ToolResult("x", seconds=None), "x"),
        (ToolResult(parts=("a \ud83d", "b")), "a \ufffdb"),
        (["one", "two"], "onetwo"),
    ],
)
def test_a_text_of_any_make_is_a_text(value, text):
    result = given(value)
    assert (result.text, result.error) == (text, None) and result.seconds >= 0


@pytest.mark.parametrize(
    "value",
    [
        None,
        object(),
        {},
        {"answer": 4},
        b"png",
        [1, 2],
        [None],
        ToolResult(text=["x"]),
        ToolResult(text={"x": 1}),
        ToolResult(images=5),
        ToolResult(images="picture.png"),
        ToolResult(images=("picture.png",)),
        ToolResult(images=(None,)),
        ToolResult(images=(Image(None, 1),)),
        ToolResult(images=(Image(np.zeros((0, 16, 3), np.uint8), 1),)),
        ToolResult(images=(np.zeros((16, 16, 5), np.uint8),)),
        ToolResult(images=(np.zeros(16, np.uint8),)),
        ToolResult(images=(np.full((16, 16, 3), np.nan),)),
        ToolResult(images=(np.full((16, 16, 3), -1),)),
        ToolResult(images=(np.full((16, 16, 3), 1j),)),
        ToolResult(images=(np.full((16, 16, 3), None),)),
        ToolResult(images=(np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)),)),
        ToolResult(parts=(3j,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_result_is_an_observation(value):
    result = given(value)
    assert result.error == "bad_result" and result.text.startswith("Error: The tool failed: ") and not result.images
    assert len(result.text) < 200


RED = np.broadcast_to(np.array([255, 0, 0], np.uint8), (16, 24, 3)).copy()


@pytest.mark.parametrize(
    "picture",
    [
        RED,
        RED.astype(np.float32) / 255,
        RED.astype(np.float64),
        RED.astype(np.int16),
        RED.astype(np.int64),
        RED.astype(np.uint16) * 257,
        RED.astype(bool),
        RED.transpose(2, 0, 1),
        np.repeat(np.repeat(RED, 2, 0), 2, 1)[::2, ::2],
        np.concatenate([RED, np.full((16, 24, 1), 255, np.uint8)], 2),
        PIL.Image.fromarray(RED),
        PIL.Image.fromarray(RED).convert("RGBA"),
        PIL.Image.fromarray(RED).convert("P"),
    ],
    ids=lambda picture: f"{type(picture).__name__} {getattr(picture, 'dtype', getattr(picture, 'mode', ''))}",
)
def test_a_picture_of_any_make_is_uint8_rgb(picture):
    wrapped = Image(picture, 7, (0.0, 0.0, 0.5, 0.5))
    for value in (
        picture,
        [picture],
        {"image": picture},
        ToolResult("x", [picture]),
        ToolResult("x", wrapped),
        ToolResult(parts=("x", picture)),
    ):
        result = given(value)
        assert result.error is None, result.text
        (image,) = result.images
        assert image.pixels.dtype == np.uint8 and np.array_equal(image.pixels, RED)
    assert given(ToolResult("x", (wrapped,))).images[0].root == 7
    assert given(ToolResult("x", (picture,))).images[0].root == root_image(RED).root


def test_grey_and_transparent_pictures_become_rgb():
    (grey,) = given(np.full((8, 8), 100, np.uint8)).images
    assert grey.pixels.shape == (8, 8, 3) and (grey.pixels == 100).all()
    (white,) = given(np.zeros((8, 8, 4), np.uint8)).images
    assert (white.pixels == 255).all()  # alpha 0 shows the white ground


def test_a_text_of_too_many_digits_is_an_observation():
    assert given(ToolResult(text=10**5000)).error == given(10**5000).error == "bad_result"


def test_a_stack_of_pictures_is_so_many_pictures():
    assert len(given(ToolResult("x", np.stack([RED, RED]))).images) == 2


def test_a_proper_result_is_kept_as_it_is():
    image = Image(RED, 5, (0.25, 0.0, 1.0, 0.5))
    result = given(ToolResult("text", (image,)))
    assert result.images[0] is image and result.text == "text" and result.parts == ()


@pytest.mark.parametrize("box", [None, (0, 0, 1), (0.5, 0, 0.5, 1), (0, 0, 2, 1), (0, float("nan"), 1, 1), "box"])
def test_an_image_that_was_cut_from_nowhere_is_its_own_root(box):
    (image,) = given(ToolResult("x", (Image(RED, 5, box),))).images
    assert (image.root, image.box) == (root_image(RED).root, (0.0, 0.0, 1.0, 1.0))


def test_a_root_of_any_size_is_brought_to_int32():
    for root in (2**31, -(2**31) - 1, 10**400):
        (image,) = given(ToolResult("x", (Image(RED, root),))).images
        assert np.int32(image.root) == image.root


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        SystemExit("text"),
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(),
        concurrent.futures.CancelledError(),
        asyncio.CancelledError(),
        RecursionError(),
        MemoryError(),
        RuntimeError("x" * 100_000),
        UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates"),
        type("E" * 1000, (Exception,), {})(),
    ],
    ids=lambda error: type(error).__name__[:30],
)
def test_whatever_a_tool_raises_is_an_observation(error):
    result = raising(error)
    assert result.error == "exception" and result.text.startswith("Error: t failed: ") and len(result.text) < 200
    result.text.encode()


def test_sys_exit_without_a_thread_is_an_observation_and_ctrl_c_is_not():
    assert raising(SystemExit(0), threaded=False).error == "exception"
    with pytest.raises(KeyboardInterrupt):
        raising(KeyboardInterrupt(), threaded=False)
    assert run(lambda arguments, images: sys.exit())[1].text == "Error: t failed: SystemExit."


@pytest.mark.parametrize("kind", [None, "", 5, "two words", "\ud83d", "x" * 1000])
def test_an_error_is_one_word_whatever_the_tool_says(kind):
    result = raising(BadCall(kind, "no \ud83d"))
    assert result.error and len(result.error) <= 40 and " " not in result.error
    (result.error + result.text).encode()
    assert given(ToolResult("x", error="weird kind")).error == "weird_kind"
    assert given({"error": "Page not found"}).text == "Error: Page not found"


def test_a_tool_that_changes_its_arguments_changes_only_its_own():
    def function(arguments, images):
        arguments["q"].append(1)
        arguments.clear()
        return "x"

    call, result = run(function, {"q": [0]}, schema=ANY)
    assert call.arguments == {"q": [0]} and result.error is None


def test_a_tool_cannot_change_the_pictures_of_the_conversation():
    def function(arguments, images):
        images[0].pixels[:] = 0

    picture = root_image(RED.copy())
    assert run(function, images=[picture])[1].error == "exception"
    assert np.array_equal(picture.pixels, RED) and picture.pixels.flags.writeable


def test_a_huge_text_is_cut_with_a_note():
    result = given(ToolResult("word " * 200_000))
    assert result.text.endswith("\n[Cut: 100000 of 1000000 characters are shown.]") and len(result.text) < 100_100
    parts = given(ToolResult(parts=("a" * 60_000, RED, "b" * 60_000, "c" * 60_000)))
    assert len(parts.text) < 100_100 and len(parts.images) == 1 and "c" not in parts.text.partition("[Cut")[0]
    assert len(given(ToolResult("x" * results.MAX_CHARACTERS)).text) == results.MAX_CHARACTERS


NESTED = functools.reduce(lambda inner, _: [inner], range(5000), [])


@pytest.mark.parametrize(
    "value",
    [NESTED, 10**400, -(10**5000), float("nan"), float("inf"), [float("-inf")], "\ud83d", {"\ud83d": 1}, {1: 2}, {0}],
    ids=lambda value: type(value).__name__,
)
def test_arguments_that_cannot_be_recorded_are_refused_and_recorded_in_words(value, tmp_path):
    call, result = run(lambda arguments, images: "x", {"q": value}, schema=ANY)
    assert result.error == "bad_arguments" and call.parameters == ()
    assert values.problem(call.arguments) is None
    save(tmp_path, call, result)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n": 10**400}, "does not fit"),
        ({"n": float("nan")}, "not finite"),
        ({"n": float("inf")}, "not finite"),
        ({"n": -5}, "less than the minimum"),
        ({"n": "abc"}, "type number"),
        ({"n": True}, "type number"),
        ({"n": None}, "type number"),
        ({}, "'n' is missing"),
    ],
)
def test_a_number_is_finite_and_inside_of_its_range(arguments, says):
    schema = function_schema("t", "", {"n": {"type": "number", "minimum": 0, "maximum": 10}}, ("n",))
    _, result = run(lambda arguments, images: "x", arguments, schema=schema)
    assert result.error == "bad_arguments" and (says in result.text or "300 digits" in result.text)


@pytest.mark.parametrize("call", [ToolCall(None, {}), ToolCall(["t"], {}), ToolCall("t", None), ToolCall("\ud83d", {})])
def test_a_call_that_is_none_is_an_observation(call, tmp_path):
    runner = ToolRunner([Given(lambda arguments, images: "x")], workers=1, timeout_s=5.0, retries=0)
    call, result = runner.submit(call, []).result()
    assert result.error in ("unknown_tool", "bad_arguments")
    save(tmp_path, call, result)


def save(folder, call, result):
    """An episode with the call goes into a recording and onto a page."""
    token_T = np.zeros(4, np.int32)
    episode = Episode(
        prompt=Prompt("q", "?", (RED,), ("x",)),
        sample=0,
        token_T=token_T,
        mask_T=token_T > 0,
        sampler_logp_T=token_T.astype(np.float32),
        images=[root_image(RED), *result.images],
        image_start=[0],
        turns=[Turn(0, 4, "text", call, result)],
        answer=None,
        finish="turns",
        rewards={"accuracy": 0.0},
    )
    path = folder / "recording.npz"
    records.save(path, [records.record(episode, step=1, prompt=0, advantage=0.0, credit=())])
    viewer.write_page([path], folder / "page.html")
    (read,) = records.load(path)
    assert read.turns[0].result == result.text and read.turns[0].call_arguments == call.arguments
    json.dumps(read.turns[0].call_arguments, allow_nan=False, ensure_ascii=False).encode()


def test_odd_results_go_into_a_recording_and_onto_a_page(tmp_path):
    for value in ("\ud83d", "\x00", "</script>", np.zeros((1, 300), np.uint8), ToolResult("x" * 200_000)):
        save(tmp_path, *run(lambda arguments, images, value=value: value))


async def later(arguments, images):
    return "x"


class Asynchronous(Given):
    async def __call__(self, arguments, images):
        return "x"


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([Given], "is a class"),
        ([object()], "has no name"),
        ([Asynchronous(later)], "async __call__"),
        ([Given(len), Given(len)], "the same name"),
        ([type("Named", (Given,), {"name": ""})(len)], "give it a text"),
        ([type("Named", (Given,), {"name": "u"})(len)], "schema named 't'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_tool_is_one_sentence_at_start(tools, says):
    with pytest.raises(UserError, match=says):
        ToolRunner(tools, workers=1, timeout_s=5.0, retries=0)
