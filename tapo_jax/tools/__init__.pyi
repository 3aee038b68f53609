from .base import BadCall, Tool, ToolRunner, function_schema
from .image_search import ImageSearch
from .remote_search import RemoteTextSearch
from .text_search import TextSearch
from .visit import Visit
from .zoom import ZoomTool

__all__ = [
    "BadCall",
    "ImageSearch",
    "RemoteTextSearch",
    "TextSearch",
    "Tool",
    "ToolRunner",
    "Visit",
    "ZoomTool",
    "function_schema",
]
