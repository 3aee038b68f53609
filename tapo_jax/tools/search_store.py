"""Store the results of searches in an SQLite file that processes and runs share.

As a cache, it keeps successes, by back-end, address, query, top_k and budget. As a recording, it keeps failures too,
and has no address, so that a run can be repeated without the service.
"""

import collections
import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.patience import Failed, Joined
from tapo_jax.types import Origin, ToolResult

FILE = "searches.sqlite"  # the recording, in its folder
MEMORY = 1 << 14  # results that a process keeps in memory
NOT_RECORDED = "This search was not recorded."
_MAKE = "CREATE TABLE IF NOT EXISTS searches (key TEXT PRIMARY KEY, asked TEXT, error TEXT, text TEXT) WITHOUT ROWID"

Found = tuple[str | None, str]
"""The outcome of a search: (the kind of its failure or None, the text or the message)."""


class Store:
    """Keeps (error, text) by key. Safe to use from many threads and processes.

    A store that fails later (a full disk, a lock that cannot be had) keeps nothing, and the search continues.

    path: the file.
    field: the config field that named the file, for messages.
    read_only: the file exists, and nothing is written.
    alone: the file is complete by itself after every write, to be copied and read anywhere; slower with many writers.
    """

    def __init__(self, path: Path, *, field: str, read_only: bool = False, alone: bool = False):
        self._lock = threading.Lock()
        try:
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            address = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._file = sqlite3.connect(address, uri=True, timeout=30, check_same_thread=False, isolation_level=None)
            if not read_only:
                self._file.execute(f"PRAGMA journal_mode={'DELETE' if alone else 'WAL'}")
                self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.execute(_MAKE)
            self._file.execute("SELECT key, asked, error, text FROM searches LIMIT 1").fetchall()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{field} is '{path}', which holds no searches or cannot be opened ({error}).") from error

    def get(self, key: str) -> Found | None:
        try:
            with self._lock:
                return self._file.execute("SELECT error, text FROM searches WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None

    def holds(self, backend: str) -> bool:
        """Return whether there is a search of this back-end."""
        try:
            with self._lock:
                rows = self._file.execute("SELECT 1 FROM searches WHERE asked LIKE ? LIMIT 1", (f'["{backend}",%',))
                return rows.fetchone() is not None
        except sqlite3.Error:
            return False

    def put(self, key: str, asked: str, error: str | None, text: str) -> None:
        """Keep an outcome; the first one of a key stays."""
        try:
            with self._lock:
                self._file.execute("INSERT OR IGNORE INTO searches VALUES (?, ?, ?, ?)", (key, asked, error, text))
        except sqlite3.Error:
            return

    def close(self) -> None:
        with self._lock:
            self._file.close()


@dataclasses.dataclass(frozen=True)
class Asked:
    """Everything that the text of a search depends on."""

    backend: str
    endpoint: str
    query: str
    """In the one spelling by which it is known."""
    top_k: int
    budget: int
    request: str = "{}"
    """Further fields of the request, as JSON."""

    def written(self) -> str:
        return json.dumps(dataclasses.astuple(self), ensure_ascii=False)


class Kept:
    """The layer between a search and its service: a recording that is made or replayed, a cache, equal calls joined.

    Successes are kept in memory too, as long as the run.

    cache: a file that keeps successes, or "".
    record: a folder to which every outcome is written, or "".
    replay: a folder from which outcomes are read, so that no request is sent, or "".
    """

    def __init__(self, *, cache: str = "", record: str = "", replay: str = ""):
        if record and replay:
            raise UserError("tools.record and tools.replay are both set: a replay asks nothing that could be recorded.")
        self._cache = Store(Path(cache), field="tools.cache") if cache and not replay else None
        self._record = Store(Path(record) / FILE, field="tools.record", alone=True) if record else None
        self._replay = Store(Path(replay) / FILE, field="tools.replay", read_only=True) if replay else None
        self._memory: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._lock, self._joined = threading.Lock(), Joined()

    def replays(self, backend: str) -> bool:
        """Return whether a recording is replayed that holds a search of this back-end."""
        return self._replay is not None and self._replay.holds(backend)

    def result(self, asked: Asked, search: Callable[[], tuple[str, int]]) -> ToolResult:
        """Return the text of a search and where it came from.

        search: asks the service, and returns the text and the number of retries.

        Raises BadCall with its origin; of kind "replay_miss" if the search was not recorded.
        """
        if self._replay is not None:
            found = self._replay.get(key_of(nameless(asked)))
            return _outcome(found or ("replay_miss", NOT_RECORDED), Origin(asked.backend, "replay"))
        (found, origin), joined = self._joined(asked.written(), lambda: self._lead(asked, search))
        return _outcome(found, Origin(asked.backend, "joined") if joined else origin)

    def _lead(self, asked: Asked, search: Callable[[], tuple[str, int]]) -> tuple[Found, Origin]:
        """Return the outcome of a search that no other thread is asking."""
        written = asked.written()
        with self._lock:
            if written in self._memory:
                self._memory.move_to_end(written)
                return (None, self._memory[written]), Origin(asked.backend, "cache")
        found, origin = self._recorded(asked, search)
        if found[0] is None:
            with self._lock:
                self._memory[written] = found[1]
                if len(self._memory) > MEMORY:
                    self._memory.popitem(last=False)
        return found, origin

    def _recorded(self, asked: Asked, search: Callable[[], tuple[str, int]]) -> tuple[Found, Origin]:
        """Return the first outcome of a search, failures included: what is recorded is what the run saw, every time.

        Two processes that ask at the same time both get what was kept. What cannot be kept is used as it came.
        """
        if self._record is None:
            return self._cached(asked, search)
        key = key_of(nameless(asked))
        if (found := self._record.get(key)) is not None:
            return found, Origin(asked.backend, "cache")
        found, origin = self._cached(asked, search)
        self._record.put(key, nameless(asked), *found)
        return self._record.get(key) or found, origin

    def _cached(self, asked: Asked, search: Callable[[], tuple[str, int]]) -> tuple[Found, Origin]:
        """Return the text in the cache, or the outcome of a live search, which is kept unless it is a failure."""
        key = key_of(asked.written())
        if self._cache is not None and (found := self._cache.get(key)) is not None:
            return found, Origin(asked.backend, "cache")
        try:
            text, retries = search()
        except Failed as error:
            return (error.kind, str(error)), Origin(asked.backend, "live", error.retries)
        except BadCall as error:
            return (error.kind, str(error)), Origin(asked.backend, "live")
        if self._cache is not None:
            self._cache.put(key, asked.written(), None, text)
        return (None, text), Origin(asked.backend, "live", retries)


def nameless(asked: Asked) -> str:
    """Serialise a search without its address: a recording is replayed without the service."""
    return dataclasses.replace(asked, endpoint="").written()


def key_of(asked: str) -> str:
    return hashlib.blake2b(asked.encode(), digest_size=20).hexdigest()


def _outcome(found: Found, origin: Origin) -> ToolResult:
    error, text = found
    if error is not None:
        raise BadCall(error, text, origin=origin)
    return ToolResult(text=text, origin=origin)
