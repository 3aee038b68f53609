"""Offer the tools of MCP servers to the policy."""

import base64
import binascii
import collections
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.mcp_client import Servers
from tapo_jax.tools.mcp_file import Server, read_servers
from tapo_jax.types import Image, ToolResult

MAX_IMAGE_BYTES = 64 << 20  # of one picture, encoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class McpTool:
    """A tool of a server that all episodes share.

    tool: as the server lists it.
    name: what the policy calls it.
    timeout_s: max seconds of a call.

    What the server declares as read-only is cached; nothing else is.
    """

    def __init__(self, servers: Servers, server: Server, tool: Any, *, name: str, timeout_s: float):
        self._servers, self._server, self._tool = servers, server, tool.name
        self._limit_s = 0.9 * timeout_s  # it ends before the runner's own limit, so that a late call has one name
        self.name = name
        self.schema = {"name": name, "description": tool.description or "", "inputSchema": tool.input_schema}
        self.repeatable = bool(tool.annotations is not None and tool.annotations.read_only_hint)

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image]) -> ToolResult:
        return self._call(arguments, None)

    def _call(self, arguments: dict[str, Any], episode: str | None) -> ToolResult:
        found = self._servers.call(self._server.name, self._tool, arguments, limit_s=self._limit_s, episode=episode)
        return result_of(found, self._server)

    def stop(self) -> None:
        self._servers.stop()


class McpEpisodeTool(McpTool):
    """A tool of a server that each episode has for itself: its own process, or its own session at an address."""

    def open(self, episode: str) -> None:
        """Nothing yet: the first call connects, within its time limit."""

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image], episode: str) -> ToolResult:
        return self._call(arguments, episode)

    def close(self, episode: str) -> None:
        self._servers.end(self._server.name, episode)


def mcp_tools(
    path: str | Path, *, timeout_s: float, field: str = "tools.mcp", only: Sequence[str] | None = None
) -> list[McpTool]:
    """Start the servers of a file (`mcp_file.read_servers`) and return their tools.

    A name that two servers have gets the server's in front: SERVER__TOOL. Raises UserError.
    """
    described = read_servers(path, field=field, only=None if only is None else tuple(only))
    servers = Servers(described)
    listed = servers.list_tools()
    taken = [
        (server, tool)
        for server in described
        for tool in listed[server.name]
        if server.tools is None or tool.name in server.tools
    ]
    shared = {name for name, count in collections.Counter(tool.name for _, tool in taken).items() if count > 1}
    return [
        (McpEpisodeTool if server.per_episode else McpTool)(
            servers,
            server,
            tool,
            name=f"{server.name}__{tool.name}" if tool.name in shared else tool.name,
            timeout_s=timeout_s,
        )
        for server, tool in taken
    ]


def result_of(found: Any, server: Server) -> ToolResult:
    """Return a server's result as the policy sees it: texts and pictures in their order; anything else by its kind.

    found: an `mcp_types.CallToolResult`. Raises BadCall for a picture that is none.
    """
    parts: list[Any] = []
    for block in found.content:
        part = _part(block)
        texts = isinstance(part, str) and parts and isinstance(parts[-1], str)
        parts += ["\n", part] if texts else [part]
    if not parts and found.structured_content is not None:
        parts = [json.dumps(found.structured_content, ensure_ascii=False)]
    parts = [server.hide(part) if isinstance(part, str) else part for part in parts]
    error = "tool_error" if found.is_error else None
    return ToolResult(parts=tuple(parts), error=error) if parts else ToolResult("", error=error)


def _part(block: Any) -> Any:
    if block.type == "text":
        return block.text
    if block.type == "image":
        return picture(block.data)
    if block.type == "resource":
        resource = block.resource
        if "text" in resource.model_fields_set:
            return resource.text
        if (resource.mime_type or "").startswith("image/"):
            return picture(resource.blob)
        return f"[A file of type {resource.mime_type or 'unknown'}, which cannot be shown.]"
    if block.type == "resource_link":
        return f"[{block.name}: {block.uri}]"
    return f"[A result of type {block.type}, which cannot be shown.]"


def picture(data: str) -> PIL.Image.Image:
    """Return a picture of a base64 text, not decoded yet: what takes results checks its size first. Raises BadCall."""
    if len(data) * 3 // 4 > MAX_IMAGE_BYTES:
        raise BadCall("bad_result", f"The tool failed: a picture has more than {MAX_IMAGE_BYTES >> 20} megabytes.")
    try:
        return PIL.Image.open(io.BytesIO(base64.b64decode(data, validate=False)), formats=FORMATS)
    except (binascii.Error, ValueError, OSError, PIL.Image.DecompressionBombError) as error:
        raise BadCall("bad_result", "The tool failed: a picture cannot be decoded.") from error
