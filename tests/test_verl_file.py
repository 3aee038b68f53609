"""verl's YAML of tools: the schemas as they are, this project's tools behind them, nothing imported."""

import copy
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tapo_jax.config import UserError, beside
from tapo_jax.data import sources
from tapo_jax.tools import ToolRunner, function_schema
from tapo_jax.tools.verl_file import read_entries
from tapo_jax.types import Identity, Prompt, Region, Text, ToolCall, ToolResult, root_image

CONFIGS = str(Path(__file__).parents[1] / "configs" / "x")
NAMES = ("image_zoom_in_tool", "image_search_tool", "text_search_tool")
THREE = """
tools:
  - class_name: "verl.tools.image_search_tool.ImageSearchTool"
    config:
      type: native
    tool_schema:
      type: "function"
      function:
        name: "image_search_tool"
        description: "Search for images that look like the first image."
        parameters:
          type: "object"
          properties: {}
          required: []
  - class_name: "verl.tools.text_search_tool.TextSearchTool"
    config: {type: native, num_workers: 120, rate_limit: 120, timeout: 30}
    tool_schema:
      type: "function"
      function:
        name: "text_search_tool"
        description: "Search for passages."
        parameters:
          type: "object"
          properties:
            query:
              type: "string"
              description: "What to search for."
          required: ["query"]
  - class_name: "verl.tools.image_zoom_in_tool.ImageZoomInTool"
    config: {type: native}
    tool_schema:
      type: "function"
      function:
        name: "image_zoom_in_tool"
        description: "Zoom in on a part of an image."
        parameters:
          type: "object"
          properties:
            bbox_2d:
              type: "array"
              items: {type: "number"}
              minItems: 4
              maxItems: 4
              description: "[x1, y1, x2, y2], relative."
            label:
              type: "string"
            img_idx:
              type: "number"
              description: "The number of the image."
          required: ["bbox_2d", "label", "img_idx"]
"""
OTHER = """
tools:
  - class_name: "{class_name}"
    config: {{a: 1}}
    tool_schema: {{type: function, function: {{name: other, description: x, parameters: {{type: object}}}}}}
"""
imported = []


def other(config, schema):
    """What a class_name "module:function" names."""
    imported.append((config, schema))

    class Other:
        name = schema["function"]["name"]

        def __call__(self, arguments, images):
            return "other"

    made = Other()
    made.schema = schema
    return made


def config(path: Path, text: str, names=NAMES, **fields) -> ConfigDict:
    file = path / "tools.yaml"
    file.write_text(text)
    c = beside(CONFIGS, "tapo_grpo.py")("test")
    c.tools.update(source="verl", verl=str(file), names=names, endpoint="http://127.0.0.1:9", **fields)
    return c


def runner(c: ConfigDict) -> ToolRunner:
    return ToolRunner(sources.tools(c), workers=1, timeout_s=5, retries=0, kinds=c.tools.kinds.to_dict())


def test_the_three_tools_load_unchanged_and_the_policy_reads_their_schemas(tmp_path):
    run = runner(config(tmp_path, THREE))
    entries = {entry.known: entry.schema for entry in read_entries(tmp_path / "tools.yaml")}
    assert run.schemas == [entries[name] for name in NAMES]
    assert [schema["function"]["name"] for schema in run.schemas] == list(NAMES)


def test_a_zoom_of_a_number_that_is_whole_runs_and_is_compared_by_its_region(tmp_path):
    run = runner(config(tmp_path, THREE))
    image = root_image(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    arguments = {"bbox_2d": [0, 0, 500, 500], "label": "x", "img_idx": 0.0}
    call, result = run.run(ToolCall(NAMES[0], arguments), [image])
    assert result.error is None and np.array_equal(result.images[0].pixels, image.pixels[:20, :30])
    assert call.parameters == (Region(image.root, (0, 0, 0.5, 0.5)),) and call.arguments["img_idx"] == 0
    for wrong, kind in (
        ({"img_idx": 0.5}, "bad_arguments"),
        ({"img_idx": 1}, "bad_image"),
        ({"bbox_2d": [1]}, "bad_box"),
    ):
        assert run.run(ToolCall(NAMES[0], arguments | wrong), [image])[1].error == kind


def test_the_search_without_arguments_plays_back_what_was_recorded(tmp_path):
    run = runner(config(tmp_path, THREE))
    call, result = run.run(ToolCall(NAMES[1], {}), [], Prompt("q7", "?", (np.zeros((4, 4, 3), np.uint8),), ("x",)))
    assert result.text == "No similar image was found." and call.parameters == (Identity("q7"),)


class Echo:
    name = "text_search_tool"
    schema = function_schema(name, "", {"query": {"type": "string"}}, ("query",))

    def __call__(self, arguments, images):
        return ToolResult(f"found {arguments['query']}")


def test_a_list_of_queries_is_searched_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "remote_tools", lambda c, own=(): [Echo()])
    text = OTHER.format(class_name="verl.tools.search_tool.SearchTool").replace(
        "{type: object}", "{type: object, properties: {query_list: {type: array, items: {type: string}}}}"
    )
    run = runner(config(tmp_path, text, names=("other",)))
    call, result = run.run(ToolCall("other", {"query_list": ["a", "b"]}), [])
    assert result.text == "found a\n\nfound b" and call.parameters == (Text("a\nb"),)


def test_a_zoom_without_an_image_number_is_in_the_first_image(tmp_path):
    text = THREE.replace('            img_idx:\n              type: "number"\n', "").replace(', "img_idx"]', "]")
    text = text.replace('              description: "The number of the image."\n', "")
    run = runner(config(tmp_path, text))
    image = root_image(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    call, result = run.run(ToolCall(NAMES[0], {"bbox_2d": [0, 0, 500, 500], "label": "x"}), [image])
    assert result.error is None and call.parameters == (Identity("[0, 0, 500, 500]"),)
    assert run.run(ToolCall(NAMES[0], {"bbox_2d": [0, 0, 0, 5], "label": "x"}), [image])[1].error == "bad_box"


def test_a_foreign_class_is_one_sentence_and_is_not_imported(tmp_path):
    text = OTHER.format(class_name="test_verl_file.other")
    with pytest.raises(UserError, match=r"the class test_verl_file\.other, which is not this project's and is not imp"):
        sources.tools(config(tmp_path, text, names=("other",)))
    assert imported == []


def test_a_function_that_is_named_as_one_is_called_with_config_and_schema(tmp_path):
    run = runner(config(tmp_path, OTHER.format(class_name="test_verl_file:other"), names=("other",)))
    assert run.run(ToolCall("other", {}), [])[1].text == "other"
    assert imported.pop()[0] == {"a": 1}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("a: 1", "has no list 'tools'"),
        ("tools: [1]", "Tool 0 of tools.verl .* has no class_name"),
        ("tools: [{class_name: x}]", "has no tool_schema with a function and its name"),
        ("tools: [{class_name: x, config: 3}]", "has a config that is no mapping"),
        ("tools: [{class_name: x, config: {type: mcp}}]", "has no mcp.mcp_servers_config_path"),
        (OTHER.format(class_name="a.TextSearchTool"), "has no query: name one of its properties query"),
        (OTHER.format(class_name="a.ImageZoomInTool"), "has no box: name one of its properties bbox_2d"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        sources.tools(config(tmp_path, text))


def test_a_text_search_without_a_service_and_a_missing_file_are_one_sentence(tmp_path):
    c = config(tmp_path, THREE)
    c.tools.endpoint = ""
    with pytest.raises(UserError, match=r"no service is named: set tools\.endpoint"):
        sources.tools(c)
    c.tools.verl = ""
    with pytest.raises(UserError, match=r"tools\.verl is empty: name the YAML file"):
        sources.tools(c)


def test_kinds_are_set_in_the_config(tmp_path):
    c = config(tmp_path, THREE)
    c.tools.kinds = ConfigDict({"text_search_tool": {"query": "identity"}})
    assert runner(c).resolved[2]["function"]["parameters"]["properties"]["query"]["x-kind"] == "identity"
    for kinds, sentence in (
        ({"nobody": {"x": "text"}}, "tools.kinds has 'nobody': the tools are"),
        (
            {"text_search_tool": {"x": "text"}},
            "tools.kinds has 'x' for the tool 'text_search_tool': its properties are query",
        ),
        ({"text_search_tool": "text"}, "tools.kinds.text_search_tool is 'text': give the kind of a property"),
        ({"text_search_tool": {"query": "number"}}, "has x-kind 'number'"),
    ):
        c.tools.kinds = ConfigDict(copy.deepcopy(kinds))
        with pytest.raises(UserError, match=sentence):
            runner(c)
