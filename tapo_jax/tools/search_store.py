"""Store the results of searches in an SQLite file that processes and runs share.

As a cache, it keeps successes, by back-end, address, query, top_k and budget. As a recording, it keeps failures too,
and has no address, so that a run can be repeated without the service.
"""

import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from tapo_jax.config import UserError
from tapo_jax.tools.base import BadCall

FILE = "searches.sqlite"  # the recording, in its folder
_MAKE = "CREATE TABLE IF NOT EXISTS searches (key TEXT PRIMARY KEY, asked TEXT, error TEXT, text TEXT) WITHOUT ROWID"


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

    def get(self, key: str) -> tuple[str | None, str] | None:
        try:
            with self._lock:
                return self._file.execute("SELECT error, text FROM searches WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None

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
    """Normalised."""
    top_k: int
    budget: int

    def written(self) -> str:
        return json.dumps(dataclasses.astuple(self), ensure_ascii=False)


class Kept:
    """The layer between a search and its service: a recording that is replayed or made, and a cache.

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

    def text(self, asked: Asked, search: Callable[[], str]) -> str:
        """Return the text of a search. Raises BadCall, with kind "replay_miss" if the search was not recorded."""
        if self._replay is not None:
            return replayed(self._replay, nameless(asked))
        live = search if self._cache is None else lambda: cached(self._cache, asked.written(), search)
        return live() if self._record is None else recorded(self._record, nameless(asked), live)


def nameless(asked: Asked) -> str:
    """Serialise a search without its address: a recording is replayed without the service."""
    return dataclasses.replace(asked, endpoint="").written()


def cached(store: Store, asked: str, search: Callable[[], str]) -> str:
    """Return the stored text of `asked`, or the search's, which is then stored. A failure is not stored."""
    key = key_of(asked)
    if (found := store.get(key)) is not None:
        return found[1]
    text = search()
    store.put(key, asked, None, text)
    return text


def recorded(store: Store, asked: str, search: Callable[[], str]) -> str:
    """Return the first outcome of `asked`, failures included: what is recorded is what the run saw, every time.

    Two processes that ask at the same time both get what was kept.
    """
    key = key_of(asked)
    if store.get(key) is None:
        try:
            error, text = None, search()
        except BadCall as failed:
            error, text = failed.kind, str(failed)
        store.put(key, asked, error, text)
        if store.get(key) is None:  # it could not be kept; the run continues with what it got
            return _outcome((error, text))
    return replayed(store, asked)


def replayed(store: Store, asked: str) -> str:
    """Return the recorded outcome of `asked`. Raises BadCall "replay_miss" if there is none."""
    found = store.get(key_of(asked))
    if found is None:
        raise BadCall("replay_miss", "This search was not recorded.")
    return _outcome(found)


def key_of(asked: str) -> str:
    return hashlib.blake2b(asked.encode(), digest_size=20).hexdigest()


def _outcome(found: tuple[str | None, str]) -> str:
    error, text = found
    if error is not None:
        raise BadCall(error, text)
    return text
