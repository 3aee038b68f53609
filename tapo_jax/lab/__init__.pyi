from . import predict, simulate
from .methods import Method
from .worlds import World

__all__ = ["Method", "World", "predict", "simulate"]
