"""The recorded image search: what it plays back, to whom, and what TAPO makes of two such calls."""

import numpy as np
import pytest

from tapo_jax.config import BadImage
from tapo_jax.tapo import encode_steps, pairwise_similarity, parameter_slots
from tapo_jax.tools.base import ToolRunner
from tapo_jax.tools.recorded_image_search import RecordedImageSearch, Recording
from tapo_jax.types import Identity, Image, Prompt, ToolCall, root_image


def picture(shade: int) -> np.ndarray:
    return np.full((4, 6, 3), shade, np.uint8)


def broken() -> np.ndarray:
    raise BadImage("The image x cannot be shown: it is damaged.")


def prompt(name: str = "q", shade: int = 1, **meta) -> Prompt:
    return Prompt(name, "which?", (picture(shade),), ("x",), meta=meta)


def runner(**settings) -> ToolRunner:
    return ToolRunner([RecordedImageSearch(**settings)], workers=1, timeout_s=5, retries=0)


def call(tools: ToolRunner, asked: Prompt, **arguments):
    images = [root_image(pixels) for pixels in asked.images]
    return tools.submit(ToolCall("image_search_tool", arguments), images, prompt=asked).result()


RECORDING = Recording(
    ("Bern - Wikidata", "Visit Bern", "Photo"), (lambda: picture(7), None, broken, lambda: picture(8)), "It is Bern."
)


def test_titles_and_thumbnails_alternate():
    _, result = call(runner(), prompt(image_search=RECORDING))
    kinds = [part if isinstance(part, str) else int(part.pixels[0, 0, 0]) for part in result.parts]
    assert kinds == [
        "Title 1: Bern - Wikidata\nThumbnail 1:\n", 7,
        "\nTitle 2: Visit Bern\nTitle 3: Photo\nResult 4:\nThumbnail 4:\n", 8, "\nSummary: It is Bern.",
    ]  # fmt: skip
    assert result.text == "".join(part for part in kinds if isinstance(part, str)) and result.error is None
    assert [image.pixels[0, 0, 0] for image in result.images] == [7, 8]
    assert [image.root for image in result.images] == [root_image(picture(n)).root for n in (7, 8)]


def test_the_number_of_results_is_limited():
    _, result = call(runner(results=1), prompt(image_search=RECORDING))
    assert result.text.splitlines() == ["Title 1: Bern - Wikidata", "Thumbnail 1:", "", "Summary: It is Bern."]


def test_a_question_without_a_recording_finds_nothing():
    for asked in (prompt(), prompt(image_search=Recording()), prompt(image_search=Recording((), (broken, None)))):
        _, result = call(runner(), asked)
        assert (result.text, result.error, result.images) == ("No similar image was found.", None, ())


def test_each_question_hears_its_own_recording():
    """The same image and the same call: only the question tells the two apart, in the cache too."""
    tools = runner()
    for title in ("one", "two", "one"):
        asked = prompt(title, image_search=Recording((title,)))
        assert call(tools, asked)[1].text == f"Title 1: {title}"


def test_without_an_argument_the_schema_has_none():
    assert runner().schemas[0]["function"]["parameters"] == {"type": "object", "properties": {}, "required": []}
    assert parameter_slots(runner().resolved) == {"regions": 0, "texts": 0, "numbers": 0}
    _, result = call(runner(), prompt(image_search=RECORDING), img_idx=0)
    assert result.error == "bad_arguments"


def test_with_an_argument_it_is_an_image_of_the_question():
    tools, asked = runner(argument=True), prompt(image_search=RECORDING)
    assert call(tools, asked, img_idx=0)[1].text.startswith("Title 1: Bern")
    images = [*map(root_image, asked.images), Image(picture(7), 5)]
    _, result = tools.run(ToolCall("image_search_tool", {"img_idx": 1}), images, asked)
    assert result.error == "bad_image" and "Only image 0 can be searched for" in result.text
    assert call(tools, asked, img_idx=9)[1].error == "bad_image"


def similarity(*calls: ToolCall) -> list[list[float]]:
    steps = encode_steps([[[(c.name, c.parameters) for c in calls]]], steps=len(calls))
    return np.asarray(pairwise_similarity(steps))[0].tolist()


def test_two_calls_without_arguments_are_the_same_action_for_one_question():
    tools = runner()
    one, again = (call(tools, prompt("a", image_search=RECORDING))[0] for _ in range(2))
    assert one.parameters == (Identity("a"),) and similarity(one, again) == [[1, 1], [1, 1]]


def test_they_have_nothing_in_common_for_two_questions():
    """What matters where witnesses may come from the whole batch (scope "batch")."""
    tools = runner()
    one, other = (call(tools, prompt(name, image_search=RECORDING))[0] for name in "ab")
    assert similarity(one, other) == [[1, 0], [0, 1]]


@pytest.mark.parametrize("argument", [False, True])
def test_a_runner_that_is_told_no_question_answers_with_an_error(argument):
    arguments = {"img_idx": 0} if argument else {}
    _, result = runner(argument=argument).run(ToolCall("image_search_tool", arguments), [root_image(picture(1))])
    assert result.error == "no_prompt"
