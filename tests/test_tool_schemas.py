"""Schemas as OpenAI, MCP and verl write them: kinds, checks of arguments, and one sentence at start for a mistake."""

import json

import numpy as np
import pytest

from tapo_jax import tapo
from tapo_jax.config import UserError
from tapo_jax.tools import schemas
from tapo_jax.tools.base import ToolRunner, call_parameters, function_schema
from tapo_jax.types import Identity, Number, Region, Text, ToolCall, root_image

PICTURE = root_image(np.zeros((8, 8, 3), np.uint8))


class Tool:
    """A tool of a schema, which says that it ran."""

    name = "t"

    def __init__(self, schema):
        self.schema = schema

    def __call__(self, arguments, images):
        return "ran"


def runner(schema):
    return ToolRunner([Tool(schema)], workers=1, timeout_s=5.0, retries=0, threaded=False)


def one(**properties):
    return function_schema("t", "", properties, ())


def kind(name, wanted, **others):
    return schemas.kinds(one(**{name: wanted}, **others))[name]


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("q", {"type": "string"}, "text"),
        ("q", {"type": ["string", "null"]}, "text"),
        ("q", {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, "text"),
        ("q", {"oneOf": [{"type": "string"}]}, "text"),
        ("q", {"$ref": "#/$defs/Query"}, "none"),  # what it leads to is not there: refused at start
        ("queries", {"type": "array", "items": {"type": "string"}}, "text"),
        ("lang", {"type": "string", "enum": ["de", "en"]}, "identity"),
        ("lang", {"enum": ["de", 1]}, "identity"),
        ("lang", {"const": "de"}, "none"),
        ("deep", {"type": "boolean"}, "identity"),
        ("n", {"type": "integer", "minimum": 1, "maximum": 9}, "number"),
        ("n", {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 9}, "number"),
        ("n", {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]}, "number"),
        ("n", {"type": "integer"}, "none"),
        ("n", {"type": "number", "minimum": 1}, "none"),
        ("n", {"type": "number", "minimum": 1, "maximum": 1}, "none"),
        ("img_idx", {"type": "integer"}, "image"),
        ("image_idx", {"type": "integer", "minimum": 0, "maximum": 5}, "image"),
        ("imageIndex", {"type": "integer"}, "image"),
        ("image", {"type": "integer"}, "image"),
        ("image", {"type": "string"}, "text"),
        ("img_idx", {"type": "number"}, "none"),
        ("bbox", {"type": "array", "items": {"type": "number"}}, "none"),  # no image beside it
        ("x", {}, "none"),
        ("x", {"type": "object", "properties": {"y": {"type": "string"}}}, "none"),
        ("x", {"type": "null"}, "none"),
        ("x", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "none"),
    ],
)
def test_a_kind_is_inferred(name, wanted, expected):
    assert kind(name, wanted) == expected


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("bbox_2d", {"type": "array"}, "region"),
        ("bbox2d", {"type": "array", "items": {"type": "integer"}}, "region"),
        ("boundingBox", {"type": "array", "items": {"type": "number"}, "minItems": 4}, "region"),
        ("crop_region", {"type": ["array", "null"]}, "region"),
        ("box", {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1000}}, "region"),
        ("box", {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}}, "none"),
        ("mailbox", {"type": "array"}, "none"),
        ("boxes", {"type": "array", "items": {"type": "array"}}, "none"),
        ("box", {"type": "string"}, "text"),
        ("box", {"type": "array", "x-kind": "none"}, "none"),
    ],
)
def test_a_box_beside_an_image_number_is_a_region(name, wanted, expected):
    assert kind(name, wanted, img_idx={"type": "integer"}) == expected


MCP = {
    "name": "t",
    "description": "Search.",
    "inputSchema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "query": {"type": "string", "title": "Query"},
            "filter": {"anyOf": [{"$ref": "#/$defs/Filter"}, {"type": "null"}], "default": None},
            "limit": {"type": "integer", "minimum": 1, "maximum": 10, "default": 5},
        },
        "required": ["query"],
        "$defs": {"Filter": {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}},
    },
}
OPENAI = {
    "type": "function",
    "function": {
        "name": "t",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "limit": {"type": ["integer", "null"]}},
            "required": ["query", "limit"],
            "additionalProperties": False,
        },
    },
}
RESPONSES = {"type": "function", "name": "t", "parameters": OPENAI["function"]["parameters"]}
VERL = {
    "type": "function",
    "function": {
        "name": "t",
        "description": "Searches.",
        "parameters": {
            "type": "object",
            "properties": {"query_list": {"type": "array", "items": {"type": "string"}, "description": "Queries."}},
            "required": ["query_list"],
        },
    },
}


@pytest.mark.parametrize(
    ("schema", "arguments", "parameters"),
    [
        (MCP, {"query": "x", "filter": {"year": 1}, "limit": 3}, (Text("x"), Number(3.0, 1.0, 10.0))),
        (MCP, {"query": "x", "filter": None}, (Text("x"),)),
        (OPENAI, {"query": "x", "limit": None}, (Text("x"),)),
        (RESPONSES, {"query": "x", "limit": 4}, (Text("x"),)),
        (VERL, {"query_list": ["a", "b"]}, (Text("a\nb"),)),
        ({"type": "function", "function": {"name": "t"}}, {}, ()),
        ({"name": "t", "inputSchema": {"type": "object"}}, {}, ()),
        ({"name": "t", "parameters": {"properties": {"a": True}, "required": None}}, {"a": 1}, ()),
        ({"name": "t", "parameters": {"additionalProperties": True}}, {"a": 1}, ()),
        (one(q={"type": "object", "x-kind": "identity"}), {"q": {"b": 1, "a": 2}}, (Identity('{"a": 2, "b": 1}'),)),
        (one(q={"type": "array", "x-kind": "text"}), {"q": [1]}, (Text("[1]"),)),
    ],
)
def test_schemas_of_others_are_taken_as_they_are(schema, arguments, parameters):
    made = runner(schema)
    call, result = made.run(ToolCall("t", arguments), [])
    assert result.text == "ran" and call.parameters == parameters
    tapo.parameter_slots(made.resolved)


@pytest.mark.parametrize(
    ("schema", "arguments", "says"),
    [
        (MCP, {"query": "x", "filter": {"year": "last"}}, "'filter' does not fit"),
        (MCP, {"query": "x", "filter": 3}, "'filter' does not fit"),
        (MCP, {"query": "x", "limit": 0}, "'limit' does not fit: 0 is less than the minimum"),
        (MCP, {"query": "x", "limit": 2.0}, "must be of type integer"),
        (MCP, {"query": "x", "page": 1}, "no argument 'page'"),
        (OPENAI, {"query": "x", "limit": "4"}, "'limit' does not fit"),
        (OPENAI, {"query": "x"}, "'limit' is missing"),
        (VERL, {"query_list": ["a", 1]}, "'query_list' does not fit: 1 is not of type 'string'"),
        (one(lang={"enum": ["de"]}), {"lang": "en"}, "is not one of ['de']"),
        (one(q={"type": "null"}), {"q": 1}, "does not fit"),
        ({"name": "t"}, {"a": 1}, "this tool takes none"),
        (one(a={"$ref": "#/$defs/a"}) | {}, {"a": 1}, ""),
    ],
)
def test_arguments_that_break_the_schema_are_refused_in_words(schema, arguments, says):
    if not says:
        schema = json.loads(json.dumps(schema))
        schema["function"]["parameters"]["$defs"] = {"a": {"$ref": "#/$defs/a"}}  # refers to itself without end
    _, result = runner(schema).run(ToolCall("t", arguments), [])
    assert result.error == "bad_arguments" and says in result.text and len(result.text) < 400


IMAGE = {"type": "integer", "x-kind": "image"}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (one(q={"type": "string", "x-kind": "txt"}), "'q' of the tool 't' has x-kind 'txt': use one of region, image"),
        (one(q={"type": "string", "x-kind": ["text"]}), "'q' of the tool 't' has x-kind"),
        (one(q={"type": "string", "x-kind": None}), "'q' of the tool 't' has x-kind None"),
        (one(b={"type": "array", "x-kind": "region"}), "'b' of the tool 't' has x-kind 'region', and the tool has no"),
        (one(b={"type": "string", "x-kind": "region"}, i=IMAGE), "type string: give it type array"),
        (one(i={"type": "number", "x-kind": "image"}), "type number: give it type integer"),
        (one(n={"type": "number", "x-kind": "number"}), "'n' of the tool 't' has x-kind 'number' without a range"),
        (one(n={"type": "number", "x-kind": "number", "minimum": 3, "maximum": 3}), "without a range"),
        (one(n={"type": "string", "x-kind": "number", "minimum": 0, "maximum": 3}), "type string: give it type"),
        (one(n={"type": "number", "x-kind": "number", "minimum": 0, "maximum": 10**400}), "without a range"),
        (one(q={"type": "text"}), "no JSON schema at properties.q.type"),
        (one(q={"type": "string", "pattern": "("}), "properties.q.pattern: '(' is not"),
        (one(q={"$ref": "#/$defs/Query"}), "refers to '#/$defs/Query', which it does not hold"),
        (one(q={"$ref": "https://example.org/schema.json"}), "refers to 'https://example.org/schema.json'"),
        (one(q=5), "no JSON schema at properties.q"),
        (function_schema("t", "", {}, ("q",)), "requires 'q', which is none of its properties"),
        ({"name": "t", "parameters": {"required": "q"}}, "no JSON schema at required"),
        ({"name": "t", "parameters": {"type": "array"}}, "of type object"),
        ({"name": "t", "parameters": [1]}, "of type object"),
        ({"name": "u"}, "has a schema named 'u'"),
        ({}, "has no function name"),
        (None, "is no object"),
        ({"name": "t", "parameters": {"x": {1}}}, "is no JSON"),
    ],
)
def test_a_mistake_in_a_schema_is_one_sentence_at_start(schema, says):
    with pytest.raises(UserError) as found:
        runner(schema)
    assert says in str(found.value) and "'t'" in str(found.value) and "\n" not in str(found.value)


def test_the_policy_reads_no_kinds_and_tapo_does():
    made = runner(one(q={"type": "string", "x-kind": "text"}, n={"type": "integer", "minimum": 0, "maximum": 1}))
    assert "x-kind" not in json.dumps(made.schemas)
    assert tapo.parameter_slots(made.resolved) == {"regions": 0, "texts": 1, "numbers": 1}


def test_a_property_that_is_called_like_a_kind_is_kept():
    made = runner(one(**{"x-kind": {"type": "string"}}))
    assert list(made.schemas[0]["function"]["parameters"]["properties"]) == ["x-kind"]
    assert made.run(ToolCall("t", {"x-kind": "a"}), [])[0].parameters == (Text("a"),)


BOX = {"bbox": {"type": "array"}, "img_idx": {"type": "integer"}}


@pytest.mark.parametrize(
    ("properties", "arguments", "images", "boxes"),
    [
        (BOX, {"bbox": [0, 0, 500, 500], "img_idx": 0}, 1, [(0, 0, 0.5, 0.5)]),
        (BOX, {"bbox": [0, 0, 500, 500]}, 1, [(0, 0, 0.5, 0.5)]),  # the image is 0 where it is left out
        (BOX, {"img_idx": 0}, 1, [(0, 0, 1, 1)]),
        (BOX, {}, 1, []),
        (BOX | {"box2": {"type": "array", "x-kind": "region"}},
         {"bbox": [0, 0, 500, 500], "box2": [500, 500, 1000, 1000], "img_idx": 0}, 1,
         [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)]),
    ],
)  # fmt: skip
def test_boxes_are_compared_in_their_image(properties, arguments, images, boxes):
    made = runner(one(**properties))
    call, result = made.run(ToolCall("t", arguments), [PICTURE] * images)
    assert result.text == "ran"
    assert sorted(call.parameters, key=lambda region: region.box) == [Region(PICTURE.root, box) for box in boxes]
    assert len(boxes) <= tapo.parameter_slots(made.resolved)["regions"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"bbox": [0, 0, 500, 500], "img_idx": 10**5000}, "bad_image"),
        ({"bbox": [0, 0, 500, 500], "img_idx": 1.0}, "bad_arguments"),
        ({"bbox": [0, 0, 500, 10**5000], "img_idx": 0}, "bad_box"),
        ({"bbox": {"x": 1}, "img_idx": 0}, "bad_arguments"),
    ],
)
def test_a_bad_box_or_image_is_refused(arguments, error):
    assert runner(one(**BOX)).run(ToolCall("t", arguments), [PICTURE])[1].error == error
    assert runner(one(**BOX)).run(ToolCall("t", {"bbox": [0, 0, 5, 5]}), [])[1].error == "bad_image"


def test_parameters_of_a_bare_schema_are_inferred():
    schema = one(goal={"type": "string"}, n={"type": "number", "minimum": -1, "maximum": 3})
    assert call_parameters(schema, {"goal": "g", "n": 2}, []) == (Text("g"), Number(2.0, -1.0, 3.0))
