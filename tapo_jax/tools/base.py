"""Define what a tool is, and run calls: checked, on threads, with time-outs, retries and a cache. An error is a result.

A tool declares its parameters once, in the JSON schema that the policy sees. The kind of a parameter says how TAPO
compares it (`schemas.kinds`).
"""

import collections
import concurrent.futures
import copy
import dataclasses
import inspect
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from tapo_jax.config import UserError
from tapo_jax.tools import schemas, sessions, values
from tapo_jax.tools.arguments import (
    BadCall,
    call_parameters,
    check_arguments,
    check_schema,
    compose,
    whole_numbers,
)
from tapo_jax.tools.results import error_word, settle
from tapo_jax.tools.schemas import function_schema
from tapo_jax.types import Identity, Image, Origin, Prompt, ToolCall, ToolResult

__all__ = ["BadCall", "Tool", "ToolRunner", "call_parameters", "compose", "function_schema", "needs_prompt"]

GRACE_S = 5.0


class Tool(Protocol):
    """A function that the policy can call. It gets checked arguments.

    A tool with `needs_prompt = True` is called with `prompt=` too: its results belong to the question. One with
    `open(episode)` and `close(episode)` is opened for each episode, and called with `episode=` too (`sessions.py`).
    One that asks a service has the service's name in `service`, and gives an `Origin` with its results and failures.
    `kinds`: property -> kind, for a schema of others that does not say it. `repeatable = False`: an equal call may give
    another result, so nothing is cached or tried again. `compared(arguments)` returns the arguments by which calls are
    equal or similar, such as a URL in one spelling. `stop()`, if there is one, is called when the run ends.
    """

    name: str
    """The name that the policy writes."""
    schema: dict[str, Any]
    """The function in OpenAI form."""

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult: ...


def needs_prompt(tool: Tool) -> bool:
    return "needs_prompt" in dir(tool) and bool(tool.needs_prompt)


def _own_kinds(tool: Tool) -> Mapping[str, str]:
    return tool.kinds if "kinds" in dir(tool) and isinstance(tool.kinds, Mapping) else {}


def service_of(tool: Tool) -> str | None:
    """Return the name of the service that a tool asks, None if it asks none."""
    return tool.service if "service" in dir(tool) else None


class ToolRunner:
    """Runs calls on a bounded pool of threads.

    `submit` never raises and its future always holds a result, whatever the policy wrote and whatever a tool does:
    raise, call sys.exit, return something that is not a result. A tool gets a copy of the arguments and read-only
    pixels: both belong to the conversation.

    workers: number of threads.
    timeout_s: max seconds of one attempt; a tool that asks a service gets GRACE_S more.
    retries: further attempts after an exception of the tool itself (not after a bad call).
    cache: max results kept to answer equal calls on equal images; errors are not kept.
    threaded: False runs a call in its caller's thread, without a time-out (for tools that are known).
    kinds: tool -> property -> kind, instead of what the schema says.

    The attribute `schemas` has the schemas as the policy reads them; `resolved` has them with the kind of each
    property, for `tapo.parameter_slots`. `services` has the names of the services that the tools ask.

    Raises UserError for a tool whose name or schema cannot be understood.
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
        kinds: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self.tools = {_checked_name(tool): tool for tool in tools}
        if len(self.tools) < len(tools):
            raise UserError(f"Two tools have the same name: {', '.join(tool.name for tool in tools)}.")
        kinds = kinds or {}
        if unknown := next((name for name in kinds if name not in self.tools), None):
            raise UserError(f"tools.kinds has '{unknown}': the tools are {', '.join(self.tools)}.")
        if flat := next((name for name, of in kinds.items() if not isinstance(of, Mapping)), None):
            raise UserError(
                f"tools.kinds.{flat} is '{kinds[flat]}': give the kind of a property, tools.kinds.TOOL.NAME."
            )
        self.resolved = [
            schemas.resolved(tool.schema, tool.name, {**_own_kinds(tool), **kinds.get(tool.name, {})}) for tool in tools
        ]
        self.schemas = [schemas.shown(schema) for schema in self.resolved]
        self._schema = dict(zip(self.tools, self.resolved, strict=True))
        self.services = tuple(dict.fromkeys(filter(None, map(service_of, tools))))
        self._validator = {name: schemas.validator(schema) for name, schema in self._schema.items()}
        self._timeout_s, self._retries, self._threaded = timeout_s, retries, threaded
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="tool")
        self._cache: collections.OrderedDict[str, ToolResult] = collections.OrderedDict()
        self._cache_size, self._lock = cache, threading.Lock()
        self._sessions = sessions.Sessions()
        self._abandoned = threading.Event()

    def abandon(self) -> None:
        """Give up the calls that wait or run, so that none of them delays the program's exit; no call may follow."""
        self._abandoned.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(
        self, call: ToolCall, images: Sequence[Image], prompt: Prompt | None = None, episode: str | None = None
    ) -> "concurrent.futures.Future[tuple[ToolCall, ToolResult]]":
        return self._pool.submit(self.run, call, tuple(images), prompt, episode)

    def submit_turn(
        self,
        calls: Sequence[ToolCall],
        images: Sequence[Image],
        prompt: Prompt | None = None,
        episode: str | None = None,
    ) -> "list[concurrent.futures.Future[tuple[ToolCall, ToolResult]]]":
        """Submit the calls of one turn, which run at the same time, those of stateful tools in their order."""
        futures, waits = [], None
        for call in calls:
            if len(calls) > 1 and isinstance(call.name, str) and self._is_stateful(call.name):
                waits = self._pool.submit(self._after, waits, call, tuple(images), prompt, episode)
                futures.append(waits)
            else:
                futures.append(self.submit(call, images, prompt, episode))
        return futures

    def _after(self, before: "concurrent.futures.Future | None", *call_of: Any) -> tuple[ToolCall, ToolResult]:
        """Run a call after the one before it. A pool takes its jobs in their order, so that one has begun."""
        if before is not None:
            concurrent.futures.wait([before])
        return self.run(*call_of)

    def run(
        self, call: ToolCall, images: Sequence[Image], prompt: Prompt | None = None, episode: str | None = None
    ) -> tuple[ToolCall, ToolResult]:
        """Return the call with its parameters, and its result. Any failure is a result with `error` set.

        A call of a tool that sees the prompt has the prompt's id among its parameters: two such calls without arguments
        are the same action for one question, and have nothing in common for two questions.

        episode: an id from `sessions.new_episode`, until `end`; None: a stateful tool is opened for this call alone.
        """
        if episode is None:
            episode = sessions.new_episode()
            try:
                return self.run(call, images, prompt, episode)
            finally:
                self._shut(episode)
        start = time.monotonic()
        try:
            ran, result = self._run(call, images, prompt, episode)
        except BadCall as error:
            text, word = values.whole_text(f"Error: {error}"), error_word(error.kind)
            ran, result = call, ToolResult(text=text, error=word, origin=error.origin)
        except Exception:  # a bug of this project: the run continues, and the log says where it is
            logging.getLogger(__name__).exception("a call could not be run")
            ran, result = call, ToolResult(text="Error: The call could not be run.", error="internal")
        return _recordable(ran), dataclasses.replace(result, seconds=time.monotonic() - start)

    def end(self, episode: str) -> None:
        """Close, on a thread, what the episode's calls opened. Never raises; every episode with calls needs it."""
        if episode not in self._sessions.episodes():
            return
        try:
            self._pool.submit(self._shut, episode)
        except RuntimeError:  # the runner is closed
            self._shut(episode)

    def close(self) -> None:
        """Close what episodes have left open; calls that are under way are waited for. Nothing can be called then.

        The tools themselves are stopped by `stop`.
        """
        self._pool.shutdown(wait=True, cancel_futures=True)
        for episode in self._sessions.episodes():
            self._shut(episode)

    def _shut(self, episode: str) -> None:
        for shut in self._sessions.leave(episode):
            _with_timeout(shut, self._timeout_s) if self._threaded else shut()

    def _is_stateful(self, name: str) -> bool:
        return name in self.tools and sessions.is_stateful(self.tools[name])

    def _run(
        self, call: ToolCall, images: Sequence[Image], prompt: Prompt | None, episode: str
    ) -> tuple[ToolCall, ToolResult]:
        tool, schema = self._tool(call.name), self._schema[call.name]
        call = dataclasses.replace(call, arguments=whole_numbers(schema, call.arguments))
        check_arguments(schema, call.arguments, images)
        check_schema(self._validator[call.name], call.arguments)
        compared = tool.compared(call.arguments) if "compared" in dir(tool) else call.arguments
        parameters, seen = call_parameters(schema, compared, images), dict[str, Any]()
        if needs_prompt(tool):
            if prompt is None:
                raise BadCall("no_prompt", f"{call.name} works inside of a question only.")
            parameters, seen = (*parameters, Identity(prompt.id)), {"prompt": prompt}
        call = ToolCall(call.name, call.arguments, parameters)
        if sessions.is_stateful(tool):
            seen["episode"] = episode
        if not sessions.is_repeatable(tool):
            return call, self._tries(tool, call, images, seen, retries=0)
        return call, self._cached(tool, call, images, seen)

    def _tool(self, name: str) -> Tool:
        if not isinstance(name, str) or name not in self.tools:
            raise BadCall("unknown_tool", f"There is no tool of this name: use {', '.join(self.tools)}.")
        return self.tools[name]

    def _cached(self, tool: Tool, call: ToolCall, images: Sequence[Image], seen: dict[str, Any]) -> ToolResult:
        ids = [prompt.id for prompt in seen.values()]
        shown = [(image.root, image.box) for image in images]
        key = json.dumps([call.name, call.arguments, shown, ids], sort_keys=True)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return _from_cache(self._cache[key])
        result = self._tries(tool, call, images, seen, retries=self._retries)
        if result.error is None:
            with self._lock:
                self._cache[key] = result
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        return result

    def _tries(
        self, tool: Tool, call: ToolCall, images: Sequence[Image], seen: dict[str, Any], *, retries: int
    ) -> ToolResult:
        def once() -> ToolResult:
            if "episode" in seen:
                self._sessions.enter(tool, seen["episode"])
            return settle(tool(copy.deepcopy(call.arguments), tuple(map(_read_only, images)), **seen))

        service = service_of(tool)
        live = None if service is None else Origin(service, "live")
        # A tool that asks a service ends by itself, and says better why.
        limit_s = self._timeout_s if service is None else self._timeout_s + GRACE_S
        for last in [False] * retries + [True]:
            if self._abandoned.is_set():
                raise BadCall("timeout", "The run has been stopped.")
            result, error = _with_timeout(once, limit_s, self._abandoned) if self._threaded else _caught(once)
            if error is None:
                return result
            if isinstance(error, BadCall):
                raise error
            if isinstance(error, KeyboardInterrupt) and not self._threaded:
                raise error  # the user's Ctrl-C: this is the caller's own thread
            if last and isinstance(error, TimeoutError):
                sentence = f"{call.name} gave no result in {limit_s:g} seconds."
                raise BadCall("timeout", sentence, origin=live) from None
            if last:
                sentence = f"{call.name} failed: {type(error).__name__[:100]}."
                raise BadCall("exception", sentence, origin=live) from error
        raise AssertionError("unreachable")


def stop(tools: Iterable[Any], timeout_s: float = 10.0) -> None:
    """Call `stop` of every tool that has one. Never raises."""
    for tool in tools:
        if "stop" in dir(tool):
            _, error = _with_timeout(tool.stop, timeout_s)
            if error is not None:
                logging.getLogger(__name__).warning("the tool %s could not be stopped (%r)", tool.name, error)


_LISTEN_S = 0.2  # between two looks at whether the run has been stopped


def _from_cache(result: ToolResult) -> ToolResult:
    """Return a result that the runner kept. A replayed one stays one: which of two equal calls is first is chance."""
    if result.origin is None or result.origin.source == "replay":
        return result
    return dataclasses.replace(result, origin=Origin(result.origin.service, "cache"))


def _checked_name(tool: Tool) -> str:
    """Return the tool's name. Raises UserError if it is not a tool."""
    if isinstance(tool, type):
        raise UserError(f"The tool {tool.__name__} is a class: give one of its objects, {tool.__name__}().")
    kind = type(tool).__name__
    missing = [word for word in ("name", "schema", "__call__") if word not in dir(tool)]
    if missing:
        raise UserError(f"A tool of type {kind} has no {missing[0]}: docs/extend.md shows what a tool is.")
    if not isinstance(tool.name, str) or not tool.name or values.SURROGATE.search(tool.name):
        raise UserError(f"A tool of type {kind} has the name {tool.name!r}: give it a text.")
    if inspect.iscoroutinefunction(tool.__call__):
        raise UserError(f"The tool '{tool.name}' has an async __call__: tools run on threads, so make it a plain one.")
    sessions.check_methods(tool)
    return tool.name


def _recordable(call: ToolCall) -> ToolCall:
    """Return the call without what a recording cannot hold. Only a refused call has such arguments."""
    plain = isinstance(call.arguments, dict) and values.problem(call.arguments) is None
    if plain and isinstance(call.name, str) and not values.SURROGATE.search(call.name):
        return call
    name = values.whole_text(call.name) if isinstance(call.name, str) else type(call.name).__name__
    return ToolCall(name, values.recordable(call.arguments) if isinstance(call.arguments, dict) else {})


def _read_only(image: Image) -> Image:
    pixels_HxWx3 = image.pixels.view()
    pixels_HxWx3.flags.writeable = False
    return dataclasses.replace(image, pixels=pixels_HxWx3)


def _caught(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return the function's result or its exception: a tool is foreign code, and its sys.exit must not end a run."""
    try:
        return function(), None
    except BaseException as error:
        return None, error


def _with_timeout(
    function: Callable[[], Any], timeout_s: float, abandoned: threading.Event | None = None
) -> tuple[Any, BaseException | None]:
    """Run `_caught` on its own daemon thread: a call that hangs blocks neither a worker nor the program's exit."""
    done: concurrent.futures.Future = concurrent.futures.Future()
    until = time.monotonic() + timeout_s
    try:
        threading.Thread(target=lambda: done.set_result(_caught(function)), daemon=True).start()
    except RuntimeError as error:  # no further thread can be started
        return None, error
    while True:
        left = until - time.monotonic()
        try:
            return done.result(timeout=min(max(left, 0.0), _LISTEN_S))
        except TimeoutError as error:
            if left <= _LISTEN_S or (abandoned is not None and abandoned.is_set()):
                return None, error
