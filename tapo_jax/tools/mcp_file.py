"""Read a file of MCP servers: {"mcpServers": {name: {"command", "args", "env"} or {"url", "headers"}}}."""

import dataclasses
import json
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tapo_jax.config import UserError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SHORTEST_SECRET = 6  # characters; a shorter value is no key, and replacing it would change other words
_TEXTS = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value))
_NAMED = (
    "an object of texts",
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
)
_TEXT = ("a text", lambda value: isinstance(value, str) and value != "")
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "command": _TEXT,
    "args": _TEXTS,
    "env": _NAMED,
    "cwd": _TEXT,
    "url": _TEXT,
    "headers": _NAMED,
    "auth_token": _TEXT,
    "tools": _TEXTS,
    "per_episode": _FLAG,
    "disabled": _FLAG,
}


@dataclasses.dataclass(frozen=True)
class Server:
    """How one server is reached: by a command that is started here, or at an address."""

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    cwd: str | None = None
    url: str = dataclasses.field(default="", repr=False)
    headers: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    tools: tuple[str, ...] | None = None
    """The tools that are taken; None: all."""
    per_episode: bool = False
    """Whether each episode has its own server (or session with it), for tools that remember."""
    secrets: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    """Value -> name of each variable that was filled in."""

    def hide(self, text: str) -> str:
        """Return the text with the values of variables replaced by their names."""
        for value in sorted(self.secrets, key=len, reverse=True):
            if len(value) >= _SHORTEST_SECRET:
                text = text.replace(value, f"${{{self.secrets[value]}}}")
        return text


def read_servers(path: str | Path, *, field: str = "tools.mcp", only: tuple[str, ...] | None = None) -> list[Server]:
    """Return the servers of a file that are not disabled.

    "${NAME}" in a text is the environment variable NAME, so that no key has to be in the file. Besides the common
    fields there are "tools" (a list: only these are taken), "per_episode" and "auth_token" (a bearer token).

    field: the config field that names the file, for the sentences.
    only: the tools that are taken, of all servers; None: what the file says.

    Raises UserError for a file that is no such file, and for a variable that is not set.
    """
    try:
        found = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{field} is '{path}', which cannot be read as JSON ({error}).") from error
    servers = found.get("mcpServers") if isinstance(found, dict) else None
    if not isinstance(servers, dict) or not servers:
        raise UserError(f'{field} is \'{path}\', which has no servers: give {{"mcpServers": {{"NAME": {{…}}}}}}.')
    made = [_server(f"{field} '{path}'", name, given, only) for name, given in servers.items() if not _disabled(given)]
    if not made:
        raise UserError(f"{field} is '{path}', in which every server is disabled: leave the field empty.")
    return made


def _disabled(given: Any) -> bool:
    return isinstance(given, dict) and given.get("disabled") is True


def _server(file: str, name: str, given: Any, only: tuple[str, ...] | None) -> Server:
    where = f"The MCP server '{name}' of {file}"
    if not isinstance(given, dict):
        raise UserError(f"{where} is no object: give it a command or a url.")
    if given.get("type") == "sse" or given.get("transport") == "sse":
        raise UserError(f"{where} speaks SSE, which is not supported: use streamable HTTP or a command.")
    if ("command" in given) == ("url" in given):
        raise UserError(f"{where} has {'both' if 'url' in given else 'neither'} a command and a url: give it one.")
    values: dict[str, Any] = {}
    secrets: dict[str, str] = {}
    for word, (kind, fits) in _FIELDS.items():  # other words belong to other programs
        if word in given:
            if not fits(given[word]):
                raise UserError(f"{where} has {word} {given[word]!r:.80}: it must be {kind}.")
            values[word] = _filled(given[word], f"{where} has {word}", secrets)
    headers = dict(values.get("headers", {}))
    if "auth_token" in values:
        headers.setdefault("Authorization", f"Bearer {values['auth_token']}")
    if "url" in values and urllib.parse.urlsplit(values["url"]).scheme not in ("http", "https"):
        raise UserError(f"{where} has a url that is no http:// or https:// address.")
    tools = only if only is not None else values.get("tools")
    return Server(
        name=name,
        command=values.get("command", ""),
        args=tuple(values.get("args", ())),
        env=values.get("env", {}),
        cwd=values.get("cwd"),
        url=values.get("url", ""),
        headers=headers,
        tools=None if tools is None else tuple(tools),
        per_episode=values.get("per_episode", False),
        secrets=secrets,
    )


def _filled(value: Any, where: str, secrets: dict[str, str]) -> Any:
    """Return the value with every ${NAME} in its texts replaced, and note what was filled in."""

    def variable(match: re.Match) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise UserError(f"{where} ${{{match[1]}}}, and the environment variable {match[1]} is not set: set it.")
        secrets[found] = match[1]
        return found

    if isinstance(value, str):
        return _VARIABLE.sub(variable, value)
    if isinstance(value, list):
        return [_filled(text, where, secrets) for text in value]
    if isinstance(value, dict):
        return {name: _filled(text, where, secrets) for name, text in value.items()}
    return value
