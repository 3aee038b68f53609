"""Any arguments, schemas, results and service replies: a call is a result that can be shown, or a tool is refused."""

import functools
import json
import math
from unittest import mock

import httpx
import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapo_jax import tapo
from tapo_jax.config import UserError
from tapo_jax.tools import values
from tapo_jax.tools.base import BadCall, ToolRunner, function_schema
from tapo_jax.tools.remote_search import RemoteTextSearch
from tapo_jax.tools.schemas import resolved
from tapo_jax.types import Image, ToolCall, ToolResult, root_image

pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")  # of the arrays made here
SUITE = settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
NIGHTLY = settings(SUITE, max_examples=34_000)  # for each of three tests: 10⁵ cases
PICTURE = root_image(np.zeros((8, 8, 3), np.uint8))

texts = st.text(st.characters(), max_size=8) | st.sampled_from(["\ud83d", "a\udc00", "\x00", "<|im_end|>", "bbox"])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**4000), 1e308, 0, 1, 500, 1000])
scalars = st.none() | st.booleans() | numbers | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
names = st.sampled_from(["q", "bbox_2d", "img_idx", "image", "n", "box", "label", "x-kind"])
types = st.sampled_from(["string", "integer", "number", "array", "boolean", "object", "null", "text"])
bounds = st.sampled_from([0, 1, -1, 10, 1000, 0.5, 10**400])
properties = st.fixed_dictionaries(
    {},
    optional={
        "type": types | st.lists(types, max_size=3),
        "x-kind": st.sampled_from(["region", "image", "text", "identity", "number", "none", "txt"]),
        "enum": st.lists(scalars, max_size=3),
        "minimum": bounds,
        "maximum": bounds,
        "items": st.fixed_dictionaries({"type": types}),
        "anyOf": st.lists(st.fixed_dictionaries({}, optional={"type": types, "minimum": bounds}), max_size=2),
        "multipleOf": bounds,
        "default": scalars,
        "$ref": st.sampled_from(["#", "#/properties/q", "#/$defs/x", "http://127.0.0.1:9/x"]),
    },
)
likely = st.fixed_dictionaries({}, optional={"type": types, "minimum": bounds, "maximum": bounds})
schemas = st.fixed_dictionaries(
    {"type": st.just("object")},
    optional={
        "properties": st.dictionaries(names, likely | properties, max_size=4),
        "required": st.lists(names, max_size=2),
        "additionalProperties": st.booleans(),
    },
)
arrays = st.builds(
    lambda shape, dtype, fill: np.full(shape, fill).astype(dtype),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([np.uint8, np.int16, np.uint16, np.float32, np.float16, np.int64, bool, complex, object]),
    st.sampled_from([0, 1, 255, 300, 70000]),
)
pictures = (
    arrays
    | st.builds(lambda mode: PIL.Image.new(mode, (4, 3)), st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "F"]))
    | st.builds(Image, arrays | json_values, json_values, json_values | st.just((0.0, 0.0, 1.0, 0.5)))
)
shown = json_values | pictures | st.binary(max_size=4)
raised = st.sampled_from([SystemExit(2), KeyboardInterrupt(), MemoryError(), StopIteration(), BadCall(None, "\ud83d")])
made_results = (
    shown
    | raised
    | st.lists(shown, max_size=3)
    | st.builds(ToolResult, shown, shown | st.lists(pictures, max_size=2), json_values, json_values)
    | st.builds(lambda parts: ToolResult(parts=tuple(parts)), st.lists(shown, max_size=3))
    | st.fixed_dictionaries({}, optional={"text": shown, "images": shown, "error": shown})
)


class Tool:
    """A tool of any schema, which gives or raises anything."""

    name = "t"

    def __init__(self, schema, result):
        self.schema, self.result = schema, result

    def __call__(self, arguments, images):
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def check(call, result):
    """What `submit` gives can be compared, shown and recorded."""
    assert isinstance(result, ToolResult) and result.error != "internal", result
    assert isinstance(result.text, str) and len(result.text) < 101_000
    (result.text + call.name).encode()
    assert result.error is None or (isinstance(result.error, str) and result.error and " " not in result.error)
    for image in result.images:
        assert image.pixels.dtype == np.uint8 and image.pixels.ndim == 3 and image.pixels.shape[2] == 3
        assert min(image.pixels.shape) > 0 and np.int32(image.root) == image.root
        assert len(image.box) == 4 and all(map(math.isfinite, image.box))
    assert all(isinstance(part, str | Image) for part in result.parts)
    json.dumps(call.arguments, allow_nan=False, ensure_ascii=False).encode()
    tapo.encode_steps([[[(call.name, call.parameters)]]], steps=1, features=8)


def submit(tool, call, images=()):
    runner = ToolRunner([tool], workers=1, timeout_s=30.0, retries=0)
    try:
        return runner.submit(call, images).result()
    finally:
        runner._pool.shutdown()


def try_arguments(parameters, arguments, images):
    tool = Tool({"name": "t", "parameters": parameters}, "ran")
    try:
        resolved(tool.schema, "t")
    except UserError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "\n" not in refusal and "'t'" in refusal
        return
    call, result = submit(tool, ToolCall("t", arguments), [PICTURE] * images)
    check(call, result)
    assert result.text == "ran" or result.error in ("bad_arguments", "bad_box", "bad_image")


def try_result(value):
    check(*submit(Tool(function_schema("t", "", {}, ()), value), ToolCall("t", {})))


@functools.cache
def search():
    """A client of its own for every case would make a TLS context for each."""
    return RemoteTextSearch("http://service", top_k=2, budget=50, timeout_s=5.0, retries=0)


def try_reply(status, body):
    def reply(transport, request):
        return httpx.Response(status, stream=httpx.ByteStream(body))

    with mock.patch.object(httpx.HTTPTransport, "handle_request", reply):
        call, result = submit(search(), ToolCall("text_search_tool", {"query": "x"}))
    check(call, result)
    assert result.error in (None, "service") and "ConnectError" not in result.text


arguments_cases = given(
    schemas, st.dictionaries(names | texts, json_values, max_size=4) | json_values, st.integers(0, 2)
)
hits = st.lists(json_values | st.fixed_dictionaries({"document": st.fixed_dictionaries({"contents": json_values})}))
replies = st.fixed_dictionaries({"result": st.lists(hits, max_size=2) | json_values}) | json_values


def as_bytes(value):
    """JSON as Python writes it: NaN and halves of pairs are in it; a number of too many digits is left out."""
    return b"{" if values.problem(value) and "digits" in values.problem(value) else json.dumps(value).encode()


reply_cases = given(st.sampled_from([200, 200, 200, 204, 302, 500]), st.binary(max_size=20) | replies.map(as_bytes))


@SUITE
@arguments_cases
def test_any_arguments_for_any_schema(parameters, arguments, images):
    try_arguments(parameters, arguments, images)


@SUITE
@given(made_results)
def test_any_result(value):
    try_result(value)


@SUITE
@reply_cases
def test_any_reply_of_a_search_service(status, body):
    try_reply(status, body)


@pytest.mark.nightly
@NIGHTLY
@arguments_cases
def test_many_arguments_for_many_schemas(parameters, arguments, images):
    try_arguments(parameters, arguments, images)


@pytest.mark.nightly
@NIGHTLY
@given(made_results)
def test_many_results(value):
    try_result(value)


@pytest.mark.nightly
@NIGHTLY
@reply_cases
def test_many_replies_of_a_search_service(status, body):
    try_reply(status, body)
