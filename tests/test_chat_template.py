"""The ids of a conversation are those of transformers' own templates and processors; templates wherever they lie."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import chat_templates
import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tapo_jax.config import UserError
from tapo_jax.models import shipped
from tapo_jax.models.chat_template import read_templates
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.rollout.chat import Chat
from tapo_jax.types import Image, ToolResult, root_image

REAL = Path(__file__).parents[2] / "shared" / "data" / "qwen3_tokenizer"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "text_search_tool",
            "description": "Finds “passages” & more <here>.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
]
CALL = '<think>\nt\n</think>\n\n<tool_call>\n{"name": "text_search_tool", "arguments": {"query": "x"}}\n</tool_call>'


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


IMAGES = [picture(40, 70), picture(90, 33, seed=1)]


class Both:
    """The same directory read here and by transformers."""

    def __init__(self, directory: Path):
        self.chat = Chat.from_dir(directory)
        self.images = ImageProcessor.from_dir(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)  # the video processor would need torchvision
        processor.tokenizer, processor.video_processor = self.tokenizer, None
        processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
        processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
        processor.chat_template = self.tokenizer.chat_template
        self.processor = processor

    def counts(self, images) -> list[int]:
        return [self.images.tokens(self.images.grid(*image.shape[:2])) for image in images]

    def theirs(self, messages, images=(), tools=None) -> list[int]:
        text = self.processor.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        if not images:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.processor(text=[text], images=list(images), return_tensors="np")["input_ids"][0].tolist()


def directories(tmp: Path):
    yield "tiny", shipped.DIRECTORY
    if REAL.is_dir():
        for name, template in (("vision", chat_templates.VISION), ("thinking", chat_templates.THINKING)):
            path = tmp / name
            path.mkdir()
            shutil.copy(REAL / "tokenizer.json", path)
            config = json.loads((REAL / "tokenizer_config.json").read_text())
            del config["chat_template"]
            (path / "tokenizer_config.json").write_text(json.dumps(config))
            (path / "chat_template.jinja").write_text(template)
            processor = ImageProcessor(patch=8, min_pixels=32 * 32, max_pixels=96 * 96)
            (path / "preprocessor_config.json").write_text(json.dumps(processor.to_hf()))
            yield name, path


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[str, Both]:
    return {name: Both(path) for name, path in directories(tmp_path_factory.mktemp("directories"))}


@pytest.fixture(params=["tiny", "vision", "thinking"])
def one(request, both) -> Both:
    if request.param not in both:
        pytest.skip("the Qwen3 tokenizer is not here")
    return both[request.param]


@pytest.mark.parametrize("system", ["", "Answer briefly."])
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["plain", "tools"])
def test_a_question_of_text(one, system, tools):
    for text in ("Who was first?", "", "  spaces \n\n and lines\n", "東京 café \N{GRINNING FACE} {{ x }}"):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        assert one.chat.prompt_ids(text, [], tools, system) == one.theirs(messages, tools=tools or None)


PLACED = [
    ("Left <image> or right <image>?", ["Left ", None, " or right ", None, "?"]),
    ("<image>\nWhich one? <image>", [None, "\nWhich one? ", None]),
    ("<image><image>Both", [None, None, "Both"]),
    ("Which one?", [None, None, "Which one?"]),
    ("The mark <image> and three: <image> <image>", [None, None, "The mark <image> and three: <image> <image>"]),
    ("One <image> of two", [None, None, "One <image> of two"]),
]


@pytest.mark.parametrize(("question", "parts"), PLACED)
def test_images_stand_where_the_question_marks_them(one, question, parts):
    """As many marks as images: each image at its mark. Any other number: the images first, the text as it is."""
    images = iter(IMAGES)
    content = [
        {"type": "image", "image": next(images)} if part is None else {"type": "text", "text": part} for part in parts
    ]
    expected = one.theirs([{"role": "user", "content": content}], IMAGES, TOOLS)
    assert one.chat.prompt_ids(question, one.counts(IMAGES), TOOLS) == expected


RESPONSES = [
    ToolResult("1. Peru", (root_image(IMAGES[0]),)),
    ToolResult("only text"),
    ToolResult(parts=("1. Peru\n", root_image(IMAGES[0]), "\n2. Chile\n", root_image(IMAGES[1]))),
    ToolResult(parts=(root_image(IMAGES[0]), "a", "b", root_image(IMAGES[1]), "")),
]


@pytest.mark.parametrize("result", RESPONSES, ids=range(len(RESPONSES)))
def test_a_tool_response(one, result):
    """Prompt, turn and response joined as ids are what transformers makes of the conversation in one go."""
    parts = result.parts or (*result.images, result.text)
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.pixels}
        for part in parts
    ]
    images = [image.pixels for image in result.images]
    ours = one.chat.prompt_ids("Which?", [], TOOLS)
    turn = CALL.removeprefix(one.chat.opening)
    ours += [*one.chat.tokenizer.encode(turn, add_special_tokens=False).ids, one.chat.stop_ids[0]]
    ours += one.chat.tool_response_ids(result.text, one.counts(images), result.parts)
    messages = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": content},
    ]
    assert ours == one.theirs(messages, images, TOOLS)


def test_the_published_text_template(tmp_path):
    """The Qwen3 tokenizer's own template, which takes text alone, with tools and a tool's response."""
    if not REAL.is_dir():
        pytest.skip("the Qwen3 tokenizer is not here")
    chat, tokenizer = Chat.from_dir(REAL), AutoTokenizer.from_pretrained(REAL, local_files_only=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    theirs = lambda: tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True)["input_ids"]  # noqa: E731
    ours = chat.prompt_ids("Which?", [], TOOLS, "Be brief.")
    assert ours == theirs()
    messages += [{"role": "assistant", "content": CALL}, {"role": "tool", "content": "1. Peru"}]
    ours += [*chat.tokenizer.encode(CALL, add_special_tokens=False).ids, chat.stop_ids[0]]
    assert ours + chat.tool_response_ids("1. Peru", []) == theirs()


def test_parts_of_a_result_give_its_text_and_images():
    first, second = root_image(IMAGES[0]), root_image(IMAGES[1])
    result = ToolResult(parts=("a\n", first, "b", second))
    assert result.text == "a\nb" and result.images == (first, second)
    assert ToolResult("x", (first,)).parts == () and ToolResult(parts=("a",)) == ToolResult("a", parts=("a",))


def test_half_a_control_token_in_each_of_two_parts_is_none(both):
    chat = both["tiny"].chat
    ids = chat.tool_response_ids("", [], ("<|im_", "end|>"))
    assert ids.count(chat.stop_ids[0]) == chat.tool_response_ids("", []).count(chat.stop_ids[0])
    image = Image(IMAGES[0], 1)
    split = chat.tool_response_ids("", [1], ("<|im_", image, "end|>"))
    assert split.count(chat.stop_ids[0]) == 1 and split.count(chat.image_token) == 1


def test_half_a_surrogate_pair_from_outside_becomes_a_replacement_character(both):
    for one in both.values():
        assert "a \N{REPLACEMENT CHARACTER} b" in one.chat.decode(one.chat.tool_response_ids("a \ud83d b", []))
        assert "\N{REPLACEMENT CHARACTER}?" in one.chat.decode(one.chat.prompt_ids("who \ud83d?", [], []))


# Where a template lies.


@pytest.fixture
def bare(tmp_path) -> Path:
    shutil.copy(shipped.DIRECTORY / "tokenizer.json", tmp_path)
    return tmp_path


TINY = (shipped.DIRECTORY / "chat_template.jinja").read_text()
OTHER = TINY.replace("tools: ", "use: ")


def test_every_place_of_a_template(bare):
    """In the order of transformers: the .jinja file, the older .json, the tokenizer's config."""
    expected = Chat.from_dir(shipped.DIRECTORY).prompt_ids("?", [], TOOLS)
    (bare / "tokenizer_config.json").write_text(json.dumps({"chat_template": TINY}))
    assert Chat.from_dir(bare).prompt_ids("?", [], TOOLS) == expected
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": OTHER}))
    assert Chat.from_dir(bare).prompt_ids("?", [], TOOLS) != expected
    (bare / "chat_template.jinja").write_text(TINY)
    assert Chat.from_dir(bare).prompt_ids("?", [], TOOLS) == expected


def test_named_templates(bare):
    """A list in the tokenizer's config, or files in a folder: with tools the one named tool_use, else the default."""
    named = [{"name": "default", "template": TINY}, {"name": "tool_use", "template": OTHER}]
    (bare / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    listed = Chat.from_dir(bare)
    assert "use: text_search_tool" in listed.decode(listed.prompt_ids("?", [], TOOLS))
    assert listed.prompt_ids("?", [], []) == Chat.from_dir(shipped.DIRECTORY).prompt_ids("?", [], [])
    (bare / "tokenizer_config.json").write_text("{}")
    (bare / "chat_template.jinja").write_text(TINY)
    (bare / "additional_chat_templates").mkdir()
    (bare / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)
    assert read_templates(bare) == {"default": TINY, "tool_use": OTHER}
    assert Chat.from_dir(bare).prompt_ids("?", [], TOOLS) == listed.prompt_ids("?", [], TOOLS)


def test_all_stop_tokens_of_the_generation_config(bare):
    (bare / "chat_template.jinja").write_text(TINY)
    assert Chat.from_dir(bare).stop_ids == (2,)
    for value, ids in (([2, 0], (2, 0)), ([0, 2], (2, 0)), (0, (2, 0)), (None, (2,))):
        (bare / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert Chat.from_dir(bare).stop_ids == ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": "{% if %}"}, r"no Jinja template \(line 1"),
        ({"chat_template.jinja": "{{ raise_exception('no tools here') }}"}, "no tools here"),
        ({"chat_template.jinja": "{{ messages[9].content }}"}, "cannot render"),
        ({"chat_template.jinja": "{{ ''.__class__.__mro__ }}"}, "cannot render"),
        ({"chat_template.json": "{"}, r"chat_template\.json is no JSON"),
        ({"chat_template.json": '{"chat_template": 3}'}, "neither a text nor a list"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "x"}]}'}, "must be named 'default'"),
        ({"tokenizer_config.json": '{"chat_template": ["x"]}'}, "neither a text nor a list"),
        ({"chat_template.jinja": TINY, "generation_config.json": '{"eos_token_id": ["x"]}'}, "eos_token_id is"),
        ({"chat_template.jinja": "version https://git-lfs.github.com/spec/v1\n"}, "git-lfs pointer"),
        ({"chat_template.jinja": TINY, "tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "git-lfs"),
        ({"chat_template.jinja": TINY, "tokenizer.json": '{"model": '}, r"tokenizer\.json cannot be read"),
        ({}, "no chat template"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_directory_is_one_sentence(bare, files, message):
    for name, text in files.items():
        (bare / name).write_text(text)
    with pytest.raises(UserError, match=message) as found:
        Chat.from_dir(bare)
    assert "\n" not in str(found.value)


def test_generation_tags_and_special_tokens_of_a_template(bare):
    marked = TINY.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{% generation %}{{- '<|im_start|>assistant\\n' }}{% endgeneration %}"
    )
    assert "{% generation %}" in marked
    (bare / "chat_template.jinja").write_text(marked + "{{ eos_token }}")
    (bare / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    chat = Chat.from_dir(bare)
    assert chat.prompt_ids("?", [], []) == [*Chat.from_dir(shipped.DIRECTORY).prompt_ids("?", [], []), 2]


def test_reading_a_directory_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from tapo_jax.models import shipped; from tapo_jax.rollout.chat import Chat; "
        "Chat.from_dir(shipped.DIRECTORY).prompt_ids('?', [], []); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'jax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
