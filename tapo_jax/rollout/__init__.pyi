from . import generate
from .chat import Chat, parse_turn
from .episode import Conversation, Limits, open_prompt
from .rounds import rollout
from .sampler import Sampler

__all__ = ["Chat", "Conversation", "Limits", "Sampler", "generate", "open_prompt", "parse_turn", "rollout"]
