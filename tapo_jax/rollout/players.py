"""Everything that a rollout needs besides the weights and the prompts."""

import dataclasses
import enum
from collections.abc import Callable

from tapo_jax.models.inputs import PixelStore
from tapo_jax.rollout.chat import Chat
from tapo_jax.rollout.episode import Conversation, Limits, Opening, open_prompt
from tapo_jax.rollout.progress import Moment, unwatched
from tapo_jax.rollout.sampler import Sampler
from tapo_jax.tools.base import ToolRunner
from tapo_jax.types import Prompt


class Wish(enum.IntEnum):
    """What a run wants of a rollout besides playing on. Among processes the largest counts."""

    NOTHING = 0
    SAVE = 1
    """To be given what is in flight, and to go on."""
    STOP = 2
    """To be given what is in flight, and to end now."""


def nothing() -> Wish:
    return Wish.NOTHING


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
    wish: Callable[[], Wish] = nothing
    """Asked once a round."""
    watch: Callable[[Moment], None] = unwatched
    """Told where the rollout is: once a round, and when it begins to wait for tools."""

    def open(self, prompt: Prompt) -> Opening:
        """Return a question as the policy sees it."""
        return open_prompt(
            prompt, chat=self.chat, image_tokens=self.pixels.tokens, tools=self.runner.schemas, system=self.system
        )

    def converse(self, opening: Opening, sample: int, policy: int = 0) -> Conversation:
        """Return a conversation that has only begun. policy: the step of training whose weights play it."""
        common = {"limits": self.limits, "chat": self.chat, "image_tokens": self.pixels.tokens}
        return Conversation(opening, sample, policy=policy, **common)

    def reopen(self, prompt: Prompt, sample: int) -> Conversation:
        """Return a conversation about a question that has only begun."""
        return self.converse(self.open(prompt), sample)

    def stopping(self) -> bool:
        return self.wish() == Wish.STOP
