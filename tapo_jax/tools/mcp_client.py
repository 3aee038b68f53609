"""Talk to MCP servers from one background thread with an event loop. Importing this needs the extra `mcp`.

Everything about a connection happens on that thread; `Servers.call` may be called from any. A server that is lost is an
observation, and is started again: at once the first time; where it is lost again without an answer between, by the next
call, after waits that double up to a minute.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import mcp
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.mcp_file import Server

START_S = 60.0  # max seconds until a server has answered at the start of a run
STOP_S = 8.0  # max seconds until a server has ended
LONGEST_WAIT_S = 60.0
MOST_TIMEOUTS = 3  # time-outs in a row after which a server counts as lost
_CLOSED = -32000  # the code of a request whose connection ended
_PAGES = 100  # of a list of tools


class Servers:
    """Connections to servers, and the thread that has them."""

    def __init__(self, servers: list[Server]):
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # a lost server is no traceback in the output of a run
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        self._lock, self._running = threading.Lock(), True
        self._shared = {server.name: Connection(server) for server in servers}
        self._own: dict[tuple[str, str], Connection] = {}  # (server, episode) -> its connection

    def list_tools(self) -> dict[str, list[Any]]:
        """Start all servers and return the tools of each, as `mcp_types.Tool`. Raises UserError, and stops them all."""

        async def all_of_them() -> list[Any]:
            listing = (connection.tools(START_S) for connection in self._shared.values())
            return await asyncio.gather(*listing, return_exceptions=True)

        found = dict(zip(self._shared, self._do(all_of_them()), strict=True))
        for name, tools in found.items():
            if isinstance(tools, BaseException):
                said = self._shared[name].last_words()
                self.stop()
                raise UserError(
                    f"The MCP server '{name}' did not start ({said}{self._shared[name].reason(tools)}): try its "
                    "command or address by itself."
                ) from tools
        return found

    def call(
        self, server: str, name: str, arguments: dict[str, Any], *, limit_s: float, episode: str | None = None
    ) -> Any:
        """Return the result of a call, as `mcp_types.CallToolResult`. Raises BadCall."""
        connection = self._shared[server]
        with self._lock:
            if not self._running:
                raise BadCall("service", f"{name} failed: its server is stopped.")
            if episode is not None:
                connection = self._own.setdefault((server, episode), Connection(connection.server))
        return self._do(connection.call(name, arguments, limit_s))

    def end(self, server: str, episode: str) -> None:
        """Close the connection of an episode, if it has one."""
        with self._lock:
            connection = self._own.pop((server, episode), None)
        if connection is not None:
            self._do(connection.stop())

    def stop(self) -> None:
        """Close all connections and end the thread. It may be called twice."""
        with self._lock:
            running, self._running = self._running, False
            connections = [*self._shared.values(), *self._own.values()]
            self._own = {}
        if not running:
            return

        async def all_of_them() -> None:
            await asyncio.gather(*(connection.stop() for connection in connections), return_exceptions=True)

        self._do(all_of_them())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except RuntimeError as error:  # the loop is closed
            work.close()
            raise BadCall("service", "The tool's server is stopped.") from error


@dataclasses.dataclass
class _Link:
    """One running connection: the client, and what tells the task that has it to close it."""

    client: Any
    closing: asyncio.Event
    timeouts: int = 0


class Connection:
    """The connection to one server, made again when it is lost. Its coroutines run on the thread of `Servers`."""

    def __init__(self, server: Server):
        self.server = server
        self._link: asyncio.Future[_Link] | None = None
        self._failures, self._not_before = 0, 0.0
        self._stopped = False
        self._keepers: dict[asyncio.Task, asyncio.Event] = {}  # task -> what tells it to close its connection
        self._words: collections.deque[str] = collections.deque(maxlen=20)  # the last lines of its stderr

    async def tools(self, limit_s: float) -> list[Any]:
        """Connect, and return all tools of the server."""
        async with asyncio.timeout(limit_s):
            link = await self._linked()
            found, cursor = [], None
            for _ in range(_PAGES):
                page = await link.client.list_tools(cursor=cursor)
                found, cursor = found + page.tools, page.next_cursor
                if not cursor:
                    break
            return found

    async def call(self, name: str, arguments: dict[str, Any], limit_s: float) -> Any:
        """Call a tool of the server. Raises BadCall, of the kind "timeout", "service" or "tool_error"."""
        link = None
        try:
            async with asyncio.timeout(limit_s):
                link = await self._linked()
                result = await link.client.call_tool(name, arguments)
        except BadCall:
            raise
        except TimeoutError as error:
            self._late(link)
            raise BadCall("timeout", f"{name} gave no result in {limit_s:g} seconds.") from error
        except mcp.MCPError as error:
            if link is not None and error.code != _CLOSED:
                link.timeouts = self._failures = 0  # it answered, if only with an error
                raise BadCall("tool_error", f"{name} failed: {self.server.hide(str(error))[:500]}") from error
            raise self._lost(link, name) from error
        except Exception as error:
            if link is not None and isinstance(error, RuntimeError | ValueError):  # a result that is not as declared
                raise BadCall("bad_result", f"{name} failed: its result is not what the tool declares.") from error
            raise self._lost(link, name) from error
        link.timeouts = self._failures = 0
        return result

    async def stop(self) -> None:
        """Close the connection; the server ends."""
        self._stopped = True
        self._link = None
        for closing in self._keepers.values():
            closing.set()
        if self._keepers:
            await asyncio.wait(list(self._keepers), timeout=STOP_S)
        for keeper in self._keepers:
            keeper.cancel()

    def last_words(self) -> str:
        """Return the last line that the server wrote to its stderr, to stand before a reason; "" if there is none."""
        line = next((line for line in reversed(self._words) if line.strip()), "")
        return f"{self.server.hide(line.strip())[:200]}; " if line else ""

    def reason(self, error: BaseException) -> str:
        """Return what went wrong, without keys: the first of a group of errors."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, TimeoutError):
            return f"no answer in {START_S:g} seconds"
        said = f": {error}" if str(error) else ""
        return self.server.hide(f"{type(error).__name__}{said}")[:300].rstrip(".")

    # The life of a connection.

    async def _linked(self) -> _Link:
        """Return the running connection; make it if there is none."""
        loop = asyncio.get_running_loop()
        if self._stopped:
            raise BadCall("service", "The tool's server is stopped.")
        while self._link is None and (wait := self._not_before - loop.time()) > 0:
            await asyncio.sleep(wait)
        if self._link is None:
            self._begin()
        return await asyncio.shield(self._link)

    def _begin(self) -> None:
        """Start to connect; the call that needs it may end before."""
        loop = asyncio.get_running_loop()
        self._link = loop.create_future()
        self._link.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody may wait for it
        closing = asyncio.Event()
        keeper = loop.create_task(self._keep(self._link, closing))
        self._keepers[keeper] = closing
        keeper.add_done_callback(lambda task: self._keepers.pop(task, None))

    async def _keep(self, made: "asyncio.Future[_Link]", closing: asyncio.Event) -> None:
        """Open the connection, hold it until `closing`, and close it: a client is left by the task that entered it."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                client = await _client(self.server, stack, self._words.append)
                made.set_result(_Link(client, closing))
                await closing.wait()
        except BaseException as error:
            if not made.done():
                if self._link is made:
                    self._fail()
                made.set_exception(error if isinstance(error, Exception) else ConnectionError("it was stopped"))
            if isinstance(error, asyncio.CancelledError):
                raise

    def _lost(self, link: _Link | None, name: str) -> BadCall:
        """Leave a lost connection, once for all the calls that it had; return what the policy reads."""
        if link is not None and self._is_current(link):
            link.closing.set()
            self._fail()
            if self._failures == 1 and not self._stopped:
                self._begin()
        return BadCall("service", f"{name} failed: its server was lost; the next call connects to it again.")

    def _late(self, link: _Link | None) -> None:
        if link is not None:
            link.timeouts += 1
            if link.timeouts >= MOST_TIMEOUTS:
                self._lost(link, "")

    def _is_current(self, link: _Link) -> bool:
        return (
            self._link is not None and self._link.done() and not self._link.exception() and self._link.result() is link
        )

    def _fail(self) -> None:
        self._link, self._failures = None, self._failures + 1
        wait = 0.0 if self._failures == 1 else min(LONGEST_WAIT_S, 0.25 * 2**self._failures)
        self._not_before = asyncio.get_running_loop().time() + wait


async def _client(server: Server, stack: contextlib.AsyncExitStack, heard: Callable[[str], None]) -> Any:
    """Return a client of the server that has been greeted, and is closed with the stack."""
    # Only the older handshake has sessions, which an episode needs for itself.
    mode = "legacy" if server.per_episode else "auto"
    if server.command:
        errors = stack.enter_context(_heard(heard))
        parameters = mcp.StdioServerParameters(
            command=server.command, args=list(server.args), env=server.env or None, cwd=server.cwd
        )
        return await stack.enter_async_context(mcp.Client(stdio_client(parameters, errlog=errors), mode=mode))
    limits = httpx2.Timeout(30.0, read=300.0)
    http = await stack.enter_async_context(httpx2.AsyncClient(headers=server.headers, timeout=limits))
    transport = streamable_http_client(server.url, http_client=http)
    return await stack.enter_async_context(mcp.Client(transport, mode=mode))


@contextlib.contextmanager
def _heard(heard: Callable[[str], None]) -> Any:
    """Yield a file whose lines go to `heard`: a server's stderr, which is read on a thread so that it never blocks."""
    reading, writing = os.pipe()

    def read() -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            while line := lines.readline(4096):
                heard(line)

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(writing, "w") as file:
        yield file
