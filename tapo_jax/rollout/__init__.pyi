from . import generate
from .chat import Chat, parse_turn
from .episode import Conversation, Limits, open_prompt
from .players import Players
from .rounds import rollout
from .sampler import Sampler, make_shapes
from .schedule import Sampling

__all__ = [
    "Chat",
    "Conversation",
    "Limits",
    "Players",
    "Sampler",
    "Sampling",
    "generate",
    "make_shapes",
    "open_prompt",
    "parse_turn",
    "rollout",
]
