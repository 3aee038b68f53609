"""Read a YAML file of tools as verl has them, and offer this project's tools with the schemas of that file.

    tools:
      - class_name: "verl.tools.image_zoom_in_tool.ImageZoomInTool"
        config: {type: native}
        tool_schema: {type: function, function: {name: image_zoom_in_tool, …}}

The class is never imported: an entry whose name is known becomes the tool of this project that does the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import check_box
from tapo_jax.tools.base import Tool, needs_prompt
from tapo_jax.types import IMAGE_SEARCH, TEXT_SEARCH, ZOOM, Image, ToolResult

KNOWN = {  # the last part of a class's name, or the function's name -> the tool of this project
    "ImageZoomInTool": ZOOM,
    "ImageSearchTool": IMAGE_SEARCH,
    "TextSearchTool": TEXT_SEARCH,
    "SearchTool": TEXT_SEARCH,
    ZOOM: ZOOM,
    IMAGE_SEARCH: IMAGE_SEARCH,
    TEXT_SEARCH: TEXT_SEARCH,
}
_BOXES = ("bbox_2d", "bbox", "box")
_IMAGES = ("img_idx", "image_idx", "image_index", "image")
_QUERIES = ("query", "query_list", "queries", "text")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tool of the file, or a file of MCP servers."""

    class_name: str
    config: dict[str, Any]
    schema: dict[str, Any] | None
    """The OpenAI function; None where servers list their tools themselves."""
    servers: Path | None = None
    """A file of MCP servers."""
    only: tuple[str, ...] | None = None
    """The tools that are taken of them; None: all."""

    @property
    def known(self) -> str | None:
        """Return the name of this project's tool that does the same; None if there is none."""
        name = "" if self.schema is None else self.schema["function"]["name"]
        return KNOWN.get(name, KNOWN.get(self.class_name.rpartition(".")[2]))


def read_entries(path: str | Path) -> list[Entry]:
    """Return the entries of a file, in its order. Raises UserError if it is no such file."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"tools.verl is '{path}', which cannot be read as YAML ({_one_line(error)}).") from error
    entries = found.get("tools") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"tools.verl is '{path}', which has no list 'tools' of class_name, config and tool_schema.")
    return [_entry(Path(path), number, entry) for number, entry in enumerate(entries)]


def _entry(path: Path, number: int, entry: Any) -> Entry:
    where = f"Tool {number} of tools.verl '{path}'"
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise UserError(f"{where} has no class_name: give class_name, config and tool_schema.")
    config = entry.get("config") or {}
    if not isinstance(config, dict):
        raise UserError(f"{where} has a config that is no mapping of names and values.")
    if config.get("type") == "mcp":
        return _servers(path, where, entry, config)
    schema = entry.get("tool_schema")
    function = schema.get("function") if isinstance(schema, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} has no tool_schema with a function and its name.")
    return Entry(entry["class_name"], config, schema)


def _servers(path: Path, where: str, entry: dict[str, Any], config: dict[str, Any]) -> Entry:
    mcp = entry.get("mcp")
    file = mcp.get("mcp_servers_config_path") if isinstance(mcp, dict) else None
    if not isinstance(file, str):
        raise UserError(f"{where} is of type mcp and has no mcp.mcp_servers_config_path: name the file of its servers.")
    only = mcp.get("tool_select_list")
    if only is not None and not (isinstance(only, list) and all(isinstance(name, str) for name in only)):
        raise UserError(f"{where} has a tool_select_list that is no list of names.")
    beside = path.parent / file  # else it is meant from the folder of the start
    return Entry(
        entry["class_name"], config, None, beside if beside.exists() else Path(file), tuple(only) if only else None
    )


class Described:
    """A tool of this project that the policy knows by another schema.

    known: which tool it is, a value of `KNOWN`.
    schema: the OpenAI function, shown to the policy as it is.
    """

    def __init__(self, tool: Tool, known: str, schema: dict[str, Any]):
        self._tool, self._known = tool, known
        self.name, self.schema = schema["function"]["name"], schema
        self.needs_prompt = needs_prompt(tool)
        names = list((schema["function"].get("parameters") or {}).get("properties") or {})
        self._box, self._image, self._query = (
            next((word for word in words if word in names), None) for words in (_BOXES, _IMAGES, _QUERIES)
        )
        if known == ZOOM and self._box is None:
            raise UserError(f"The schema of the tool '{self.name}' has no box: name one of its properties bbox_2d.")
        if known == TEXT_SEARCH and self._query is None:
            raise UserError(f"The schema of the tool '{self.name}' has no query: name one of its properties query.")
        self.kinds = self._kinds(names)

    def _kinds(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return what TAPO compares: what the tool reads, and nothing else."""
        read = {self._box: "region" if self._image else "identity", self._image: "image"}
        if self._known == IMAGE_SEARCH:
            read = {self._image: "image"}
        elif self._known == TEXT_SEARCH:
            read = {self._query: "text"}
        return {name: read.get(name, "none") for name in names}

    def __call__(self, arguments: dict[str, Any], images: Sequence[Image], **seen: Any) -> ToolResult:
        image = {"img_idx": arguments.get(self._image, 0)} if self._image in arguments or self._known == ZOOM else {}
        if self._known == ZOOM:
            check_box(self._box, arguments.get(self._box))
            return self._tool({"bbox_2d": arguments[self._box], **image}, images, **seen)
        if self._known == IMAGE_SEARCH:
            return self._tool(image, images, **seen)
        asked = arguments.get(self._query)
        queries = asked if isinstance(asked, list) else [asked]
        return ToolResult(text="\n\n".join(self._tool({"query": query}, images, **seen).text for query in queries))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
