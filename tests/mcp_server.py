"""An MCP server for tests: pictures, a counter that remembers, a crash. On stdio, or at a port: mcp_server.py PORT."""

import io
import os
import sys
import time

import numpy as np
from mcp.server.mcpserver import Image, MCPServer
from mcp_types import ToolAnnotations
from PIL import Image as PillowImage

server = MCPServer("pictures")
seen = {"count": 0}


def picture(shade: int, side: int = 16) -> Image:
    file = io.BytesIO()
    PillowImage.fromarray(np.full((side, side, 3), shade % 256, np.uint8)).save(file, "PNG")
    return Image(data=file.getvalue(), format="png")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def find_pictures(query: str, n: int = 1) -> list:
    """Find pictures of what the query says."""
    found = []
    for number in range(n):
        found += [f"Title {number + 1}: {query}", picture(len(query) + number)]
    return found


@server.tool()
def count() -> str:
    """Count the calls."""
    seen["count"] += 1
    return f"{os.getpid()} {seen['count']}"


@server.tool()
def crash() -> str:
    """End the server."""
    print("the server ends", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def say_key() -> str:
    """Say the key that the server was given."""
    return f"the key is {os.environ.get('PICTURES_KEY')}"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("this never works")


@server.tool()
def sleep(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "slept"


if __name__ == "__main__":
    server.run() if len(sys.argv) < 2 else server.run("streamable-http", port=int(sys.argv[1]))
