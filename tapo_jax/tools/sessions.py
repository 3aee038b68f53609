"""Tools that keep something for an episode: opened before their first call in it, closed when it ends, however it ends.

A tool is of this kind if it has `open(episode)` and `close(episode)`; its calls get `episode=` too. The id is new for
each episode.
"""

import dataclasses
import inspect
import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import BadCall


def new_episode() -> str:
    """Return an id for an episode that no other has, in this process or elsewhere."""
    return uuid.uuid4().hex


def is_stateful(tool: Any) -> bool:
    """Return whether the tool has `open` and `close`, and so is opened for each episode."""
    return {"open", "close"} <= set(dir(tool))


def is_repeatable(tool: Any) -> bool:
    """Return whether an equal call gives an equal result, so that calls may be cached and tried again.

    False for a stateful tool, and for one with `repeatable = False`.
    """
    return not is_stateful(tool) and ("repeatable" not in dir(tool) or bool(tool.repeatable))


def check_methods(tool: Any) -> None:
    """Raise UserError unless `open` and `close` of a stateful tool take an episode's id, and its call an `episode`."""
    if not is_stateful(tool):
        return
    for name, method in (("open", tool.open), ("close", tool.close)):
        if not callable(method) or not _takes(method, ("id",), {}):
            raise UserError(
                f"The tool '{tool.name}' has open and close, so it is opened for each episode, and its {name} must "
                "take one argument, the episode's id: docs/extend.md shows how."
            )
    if not _takes(tool.__call__, ({}, ()), {"episode": "id"}):
        raise UserError(
            f"The tool '{tool.name}' has open and close, so it is opened for each episode, and its __call__ must take "
            "episode=, the episode's id: docs/extend.md shows how."
        )


def _takes(function: Callable, arguments: Sequence[Any], named: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:
        return False
    except ValueError:  # a function without a signature that can be read
        return True
    return True


@dataclasses.dataclass
class _Session:
    tool: Any
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while the tool is opened or closed."""
    opened: bool = False
    over: bool = False


class Sessions:
    """Which tools are open for which episode. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, dict[str, _Session]] = {}

    def enter(self, tool: Any, episode: str) -> None:
        """Open the tool for the episode unless it is open; a call that comes meanwhile waits.

        Raises what `open` raises; the next call then tries again. Raises BadCall if the episode is over.
        """
        with self._lock:
            session = self._of.setdefault(episode, {}).setdefault(tool.name, _Session(tool))
        with session.lock:
            if session.over:
                raise BadCall("episode_over", f"{tool.name} was called after the end of its episode.")
            if not session.opened:
                tool.open(episode)
                session.opened = True

    def leave(self, episode: str) -> list[Callable[[], None]]:
        """Forget the episode; return the functions that close its tools, to be called once each. They never raise.

        A tool whose `open` still runs is closed after it: that function waits for it.
        """
        with self._lock:
            sessions = self._of.pop(episode, {})
        return [lambda session=session: _shut(session, episode) for session in sessions.values()]

    def episodes(self) -> list[str]:
        """Return the episodes that have a tool open."""
        with self._lock:
            return list(self._of)


def _shut(session: _Session, episode: str) -> None:
    with session.lock:
        opened, session.over = session.opened and not session.over, True
    if opened:
        try:
            session.tool.close(episode)
        except BaseException:  # foreign code, on a thread of its own: the run goes on
            logging.getLogger(__name__).exception("the tool %s could not be closed for an episode", session.tool.name)
