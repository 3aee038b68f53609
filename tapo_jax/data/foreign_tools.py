"""Tools that others describe: MCP servers in a JSON file, and verl's tools in a YAML file."""

from collections.abc import Callable, Sequence
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.tools.base import Tool, stop
from tapo_jax.tools.verl_file import Described, Entry, read_entries


def mcp_tools(
    path: str, *, timeout_s: float, field: str = "tools.mcp", only: Sequence[str] | None = None
) -> list[Tool]:
    """Start the MCP servers of a file and return their tools. Raises UserError."""
    try:
        from tapo_jax.tools import mcp_tools as client  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if error.name not in ("mcp", "httpx2"):
            raise
        raise UserError("MCP servers need the package mcp: pip install 'tapo_jax[mcp]'.") from error
    return list(client.mcp_tools(path, timeout_s=timeout_s, field=field, only=only))


def verl_tools(
    path: str, *, timeout_s: float, known: Callable[[str], Tool], imported: Callable[[str, str], Callable]
) -> list[Tool]:
    """Return the tools of verl's YAML file, with the schemas of that file. Raises UserError.

    timeout_s: of a call, for MCP servers.
    known: returns this project's tool of a name.
    imported: returns the function that a field's "module:function" names.
    """
    found: list[Tool] = []
    try:
        for entry in read_entries(path):
            found += _of(entry, path, timeout_s, known, imported)
    except BaseException:
        stop(found)
        raise
    return found


def _of(
    entry: Entry, path: str, timeout_s: float, known: Callable[[str], Tool], imported: Callable[[str, str], Callable]
) -> list[Any]:
    if entry.servers is not None:
        field = f"mcp_servers_config_path in {path}"
        return mcp_tools(str(entry.servers), timeout_s=timeout_s, field=field, only=entry.only)
    if ":" in entry.class_name:
        return [imported(f"class_name in {path}", entry.class_name)(entry.config, entry.schema)]
    if entry.known is not None:
        return [Described(known(entry.known), entry.known, entry.schema)]
    raise UserError(
        f"tools.verl '{path}' has the class {entry.class_name}, which is not this project's and is not imported: write "
        'class_name: "package.module:function", a function that is called with config and tool_schema and returns a '
        "tool."
    )
