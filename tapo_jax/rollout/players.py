"""Everything that a rollout needs besides the weights and the prompts."""

import dataclasses

from tapo_jax.models.inputs import PixelStore
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Limits
from tapo_jax.rollout.sampler import Sampler
from tapo_jax.tools.base import ToolRunner


@dataclasses.dataclass(frozen=True)
class Players:
    """Everything that a rollout needs besides the weights and the prompts. Created once for a run."""

    sampler: Sampler
    chat: Chat
    pixels: PixelStore
    runner: ToolRunner
    limits: Limits
    system: str = ""
    """System prompt."""
    tool_wait_s: float = float("inf")
    """Seconds that a round waits for tools after its decoding.

    A finite value trades repeatability for never waiting on one slow tool."""
    most_image_bytes: float = float("inf")
    """Bytes of pixels in play from which on no further episode starts, except where none plays.

    The tokens of an episode do not depend on it."""
