"""What a tool is, and how calls are run: checked, on threads, with time-outs, retries and a cache. An error is a
result.

A tool declares its parameters once, in the JSON schema that the policy sees. Each property also carries "x-kind", which
is how TAPO compares two calls: "region" (a box in an image), "image" (a whole image), "text", "identity", "number".
"""

import collections
import concurrent.futures
import dataclasses
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from tapo_jax.types import Identity, Image, Number, Parameter, Prompt, Region, Text, ToolCall, ToolResult

_TYPES = {"string": str, "integer": int, "number": (int, float), "array": list, "boolean": bool, "object": dict}


class Tool(Protocol):
    """name: as the policy writes it. schema: the function in OpenAI form. A call gets checked arguments. A tool with
    `needs_prompt = True` is called with `prompt=` too: what it gives belongs to the question."""

    name: str
    schema: dict[str, Any]

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult: ...


class BadCall(Exception):
    """The call cannot run. `kind` is one word for the metrics; the message is what the policy reads."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def needs_prompt(tool: Tool) -> bool:
    return "needs_prompt" in dir(tool) and bool(tool.needs_prompt)


def function_schema(
    name: str, description: str, properties: dict[str, dict], required: Sequence[str]
) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def check_arguments(schema: dict[str, Any], arguments: dict[str, Any], images: Sequence[Image]) -> None:
    """Raises BadCall where the arguments do not fit the schema, a box is no box, or an image does not exist."""
    parameters = schema["function"]["parameters"]
    for name in parameters["required"]:
        if name not in arguments:
            raise BadCall("bad_arguments", f"The argument '{name}' is missing.")
    for name, value in arguments.items():
        if name not in parameters["properties"]:
            raise BadCall("bad_arguments", f"There is no argument '{name}': use {', '.join(parameters['properties'])}.")
        wanted = parameters["properties"][name]
        if not isinstance(value, _TYPES[wanted["type"]]) or (isinstance(value, bool) and wanted["type"] != "boolean"):
            raise BadCall("bad_arguments", f"The argument '{name}' must be of type {wanted['type']}.")
        if wanted["x-kind"] == "region":
            _check_box(name, value)
        if wanted["x-kind"] == "image" and not 0 <= value < len(images):
            held = f"images 0 to {len(images) - 1}" if images else "no image"
            raise BadCall("bad_image", f"There is no image {value}: the conversation has {held}.")


def _check_box(name: str, box: list) -> None:
    numbers = len(box) == 4 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
    if not numbers or not all(0 <= v <= 1000 for v in box):
        raise BadCall("bad_box", f"'{name}' must be [x1, y1, x2, y2] with numbers from 0 to 1000.")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise BadCall("bad_box", f"'{name}' is empty: x1 must be less than x2, and y1 less than y2.")


def compose(box: Sequence[float], image: Image) -> tuple[float, float, float, float]:
    """A box relative to `image` (0..1) as a box in the image's root."""
    x1, y1, x2, y2 = image.box
    w, h = x2 - x1, y2 - y1
    return (x1 + box[0] * w, y1 + box[1] * h, x1 + box[2] * w, y1 + box[3] * h)


def call_parameters(
    schema: dict[str, Any], arguments: dict[str, Any], images: Sequence[Image]
) -> tuple[Parameter, ...]:
    """The arguments as TAPO compares them. A box is composed with its image into root coordinates, and then stands for
    both; labels and other properties with "x-kind": "none" are left out."""
    properties = schema["function"]["parameters"]["properties"]
    kinds = {name: properties[name]["x-kind"] for name in properties if name in arguments}
    region = next((name for name, kind in kinds.items() if kind == "region"), None)
    found: list[Parameter] = []
    for name, kind in kinds.items():
        value = arguments[name]
        if kind == "image":
            image = images[value]
            box = image.box if region is None else compose([v / 1000 for v in arguments[region]], image)
            found.append(Region(image.root, box))
        elif kind == "text":
            found.append(Text(value))
        elif kind == "identity":
            found.append(Identity(json.dumps(value)))
        elif kind == "number":
            found.append(Number(float(value), float(properties[name]["minimum"]), float(properties[name]["maximum"])))
    return tuple(found)


class ToolRunner:
    """Runs calls on a bounded pool of threads. `submit` never raises and its future always holds a result.

    timeout_s: seconds that one try may take. retries: further tries after an exception of the tool itself (not after a
    bad call). threaded=False runs a call in its caller's thread, without a time-out (for tools that are known). Equal
    calls on equal images are answered from a cache of `cache` results; errors are not kept.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        workers: int,
        timeout_s: float,
        retries: int,
        cache: int = 4096,
        threaded: bool = True,
    ):
        self.tools = {tool.name: tool for tool in tools}
        self.schemas = [tool.schema for tool in tools]
        self._timeout_s, self._retries, self._threaded = timeout_s, retries, threaded
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="tool")
        self._cache: collections.OrderedDict[str, ToolResult] = collections.OrderedDict()
        self._cache_size, self._lock = cache, threading.Lock()

    def submit(
        self, call: ToolCall, images: Sequence[Image], prompt: Prompt | None = None
    ) -> "concurrent.futures.Future[tuple[ToolCall, ToolResult]]":
        return self._pool.submit(self.run, call, tuple(images), prompt)

    def run(self, call: ToolCall, images: Sequence[Image], prompt: Prompt | None = None) -> tuple[ToolCall, ToolResult]:
        """The call with its parameters, and its result. Any failure is a result with `error` set.

        A call of a tool that sees the prompt has the prompt's id among its parameters: two such calls without arguments
        are the same action for one question, and have nothing in common for two.
        """
        start = time.monotonic()
        try:
            tool = self._tool(call.name)
            check_arguments(tool.schema, call.arguments, images)
            parameters, seen = call_parameters(tool.schema, call.arguments, images), {}
            if needs_prompt(tool):
                if prompt is None:
                    raise BadCall("no_prompt", f"{call.name} works inside of a question only.")
                parameters, seen = (*parameters, Identity(prompt.id)), {"prompt": prompt}
            call = ToolCall(call.name, call.arguments, parameters)
            result = self._cached(tool, call, images, seen)
        except BadCall as error:
            result = ToolResult(text=f"Error: {error}", error=error.kind)
        return call, dataclasses.replace(result, seconds=time.monotonic() - start)

    def _tool(self, name: str) -> Tool:
        if name not in self.tools:
            raise BadCall("unknown_tool", f"There is no tool of this name: use {', '.join(self.tools)}.")
        return self.tools[name]

    def _cached(self, tool: Tool, call: ToolCall, images: Sequence[Image], seen: dict[str, Prompt]) -> ToolResult:
        ids = [prompt.id for prompt in seen.values()]
        shown = [(image.root, image.box) for image in images]
        key = json.dumps([call.name, call.arguments, shown, ids], sort_keys=True)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        result = self._tries(tool, call, images, seen)
        if result.error is None:
            with self._lock:
                self._cache[key] = result
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        return result

    def _tries(self, tool: Tool, call: ToolCall, images: Sequence[Image], seen: dict[str, Prompt]) -> ToolResult:
        for last in [False] * self._retries + [True]:
            try:
                if not self._threaded:
                    return tool(call.arguments, images, **seen)
                return _with_timeout(lambda: tool(call.arguments, images, **seen), self._timeout_s)
            except BadCall:
                raise
            except TimeoutError:
                if last:
                    raise BadCall("timeout", f"{call.name} gave no result in {self._timeout_s:g} seconds.") from None
            except (
                Exception
            ) as error:  # a tool is foreign code: whatever it raises is an observation, not the end of a run
                if last:
                    raise BadCall("exception", f"{call.name} failed: {type(error).__name__}.") from error
        raise AssertionError("unreachable")


def _with_timeout(function, timeout_s: float) -> ToolResult:
    """Runs on a daemon thread of its own, so that a call that hangs holds neither a worker nor the program's exit."""
    done: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # handed to the waiting thread
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return done.result(timeout=timeout_s)
