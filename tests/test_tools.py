"""The three tools, and what happens when a call goes wrong."""

import threading
import time

import numpy as np
import pytest

from tapo_jax.atlas.play import Settings, make_tools
from tapo_jax.atlas.scene import draw_scene
from tapo_jax.atlas.world import real_world
from tapo_jax.tools.base import BadCall, ToolRunner, call_parameters, compose, function_schema
from tapo_jax.tools.image_search import silhouette
from tapo_jax.tools.text_search import TextSearch
from tapo_jax.tools.zoom import ZoomTool
from tapo_jax.types import Image, Number, Region, Text, ToolCall, ToolResult, root_image


@pytest.fixture(scope="module")
def runner() -> ToolRunner:
    return ToolRunner(
        make_tools(real_world("train"), Settings(thumbnails=1, image_top_k=3, text_top_k=2)),
        workers=2,
        timeout_s=5.0,
        retries=0,
    )


@pytest.fixture(scope="module")
def scene():
    world, rng = real_world("train"), np.random.default_rng(3)
    countries = [world.countries[name] for name in ("Chile", "Kenya", "Italy")]
    pixels, placed = draw_scene(countries, size=256, outline=(0.18, 0.30), rng=rng)
    return root_image(pixels), placed


def zoom(box, image=0):
    return ToolCall("image_zoom_in_tool", {"bbox_2d": box, "label": "x", "img_idx": image})


def test_zoom_search_read(runner, scene):
    """The intended path: cut the outline out, find its name, read its capital."""
    image, placed = scene
    box = [round(value * 1000) for value in placed[1].box]
    call, result = runner.run(zoom(box), [image])
    assert result.error is None and max(result.images[0].pixels.shape) == 64
    assert call.parameters == (Region(image.root, tuple(value / 1000 for value in box)),)
    _, found = runner.run(ToolCall("image_search_tool", {"img_idx": 1}), [image, *result.images])
    assert found.text.splitlines()[0] == "1. Kenya" and len(found.text.splitlines()) == 3 and len(found.images) == 1
    _, read = runner.run(ToolCall("text_search_tool", {"query": "Kenya, capital"}), [image])
    assert "The capital of Kenya: Nairobi." in read.text.splitlines()[1]


def test_searching_the_whole_scene_or_half_an_outline_fails(runner, scene):
    image, placed = scene
    _, found = runner.run(ToolCall("image_search_tool", {"img_idx": 0}), [image])
    x1, y1, x2, y2 = (round(value * 1000) for value in placed[1].box)
    _, half = runner.run(zoom([x1, y1, (x1 + x2) // 2, y2]), [image])
    _, found_half = runner.run(ToolCall("image_search_tool", {"img_idx": 1}), [image, *half.images])
    assert "1. Kenya" not in found.text and "1. Kenya" not in found_half.text


def test_a_crop_of_a_crop_composes():
    """[0.5, 1] of [0.2, 0.6] in x is 0.2 + 0.5·0.4 = 0.4 to 0.6; [0, 0.5] of [0, 1] in y is 0 to 0.5."""
    crop = Image(np.zeros((8, 8, 3), np.uint8), 7, (0.2, 0.0, 0.6, 1.0))
    np.testing.assert_allclose(compose((0.5, 0.0, 1.0, 0.5), crop), (0.4, 0.0, 0.6, 0.5))
    result = ZoomTool(size=8)({"bbox_2d": [500, 0, 1000, 500], "img_idx": 0}, [crop])
    assert result.images[0].root == 7
    np.testing.assert_allclose(result.images[0].box, (0.4, 0.0, 0.6, 0.5))


def test_zoom_cuts_the_pixels_that_the_box_names():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[50:, 100:] = 255
    crop = ZoomTool(size=64)({"bbox_2d": [500, 500, 1000, 1000], "img_idx": 0}, [root_image(pixels)]).images[0].pixels
    assert crop.shape == (32, 64, 3) and (crop == 255).all()


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (ToolCall("rm", {}), "unknown_tool", "no tool of this name"),
        (zoom([900, 0, 100, 500]), "bad_box", "x1 must be less than x2"),
        (zoom([0, 0, 1001, 500]), "bad_box", "from 0 to 1000"),
        (zoom([0, 0, float("nan"), 500]), "bad_box", "from 0 to 1000"),
        (zoom([0, 0, 500]), "bad_box", "must be [x1, y1, x2, y2]"),
        (zoom([0, 0, "1", 500]), "bad_box", "must be [x1, y1, x2, y2]"),
        (zoom([500, 500, 501, 501]), "bad_box", "too small"),
        (zoom("everything"), "bad_arguments", "type array"),
        (zoom([0, 0, 500, 500], image=1), "bad_image", "images 0 to 0"),
        (zoom([0, 0, 500, 500], image=-1), "bad_image", "no image -1"),
        (zoom([0, 0, 500, 500], image=True), "bad_arguments", "type integer"),
        (ToolCall("text_search_tool", {}), "bad_arguments", "'query' is missing"),
        (ToolCall("text_search_tool", {"query": 3}), "bad_arguments", "type string"),
        (ToolCall("text_search_tool", {"query": "x", "path": "/etc"}), "bad_arguments", "no argument 'path'"),
    ],
)
def test_a_bad_call_is_a_readable_error(runner, scene, call, kind, says):
    call, result = runner.run(call, [scene[0]])
    assert result.error == kind and says in result.text and result.text.startswith("Error: ") and not result.images


class Odd:
    """A tool that fails `failures` times, or sleeps."""

    name = "odd"
    schema = function_schema(
        "odd", "", {"n": {"type": "number", "x-kind": "number", "minimum": 0, "maximum": 10}}, ("n",)
    )

    def __init__(self, failures=0, sleep_s=0.0):
        self.failures, self.sleep_s, self.calls = failures, sleep_s, 0

    def __call__(self, arguments, images):
        self.calls += 1
        time.sleep(self.sleep_s)
        if self.calls <= self.failures:
            raise RuntimeError("secret detail /root")
        return ToolResult(text=str(arguments["n"]))


def test_an_exception_is_retried_and_then_reported_without_its_detail():
    tool = Odd(failures=1)
    _, result = ToolRunner([tool], workers=1, timeout_s=5, retries=1).run(ToolCall("odd", {"n": 1}), [])
    assert result.error is None and tool.calls == 2
    _, result = ToolRunner([Odd(failures=2)], workers=1, timeout_s=5, retries=1).run(ToolCall("odd", {"n": 1}), [])
    assert result.error == "exception" and result.text == "Error: odd failed: RuntimeError."


def test_a_call_that_hangs_times_out_and_frees_its_worker():
    runner = ToolRunner([Odd(sleep_s=30)], workers=1, timeout_s=0.05, retries=0)
    start = time.monotonic()
    results = [future.result()[1] for future in [runner.submit(ToolCall("odd", {"n": n}), []) for n in range(3)]]
    assert [result.error for result in results] == ["timeout"] * 3 and time.monotonic() - start < 10


def test_equal_calls_on_equal_images_are_answered_from_the_cache():
    tool = Odd()
    runner = ToolRunner([tool], workers=2, timeout_s=5, retries=0)
    image = root_image(np.zeros((4, 4, 3), np.uint8))
    for n, images in ((1, []), (1, []), (2, []), (1, [image])):
        assert runner.run(ToolCall("odd", {"n": n}), images)[1].text == str(n)
    assert tool.calls == 3


def test_parameters_by_kind():
    schema = function_schema(
        "f", "",
        {
            "x": {"type": "number", "x-kind": "number", "minimum": -1, "maximum": 3},
            "goal": {"type": "string", "x-kind": "text"},
            "label": {"type": "string", "x-kind": "none"},
        },
        (),
    )  # fmt: skip
    assert call_parameters(schema, {"x": 2, "goal": "g", "label": "l"}, []) == (Number(2.0, -1.0, 3.0), Text("g"))


def test_text_search_is_safe_from_many_threads_and_deterministic():
    search = TextSearch(
        [f"country {i}: capital\nThe capital of country{i}: City{i}." for i in range(50)], top_k=2, budget=60
    )
    wanted = [search({"query": f"country{i} capital"}, []).text for i in range(50)]
    got: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: search({"query": f"country{i} capital"}, []).text}))
        for i in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(50)] == wanted and all(f"City{i}" in text for i, text in got.items())
    assert all(len(text) <= 60 for text in wanted)


@pytest.mark.parametrize("query", ["", "   ", "zzzz qqqq", "\x00'; DROP", "capital" * 1000])
def test_a_query_that_matches_nothing_is_an_answer(query):
    assert TextSearch(["Peru\nLima."], top_k=1, budget=50)({"query": query}, []).text == "No passage matches."


def test_a_silhouette_ignores_margin_and_colour():
    shape = np.full((60, 60, 3), 240, np.uint8)
    shape[20:40, 10:50] = (200, 0, 0)
    other = np.full((50, 80, 3), 250, np.uint8)
    other[5:25, 30:70] = (0, 0, 150)
    np.testing.assert_allclose(silhouette(shape), silhouette(other), atol=1e-6)
    assert not silhouette(np.full((5, 5, 3), 9, np.uint8)).any()


def test_bad_call_keeps_its_kind():
    assert BadCall("bad_box", "m").kind == "bad_box"
