"""A client for JSON services that may be slow, busy, broken or hostile: every failure is a BadCall of one of two kinds.

"timeout": no complete reply within the time limit. "service": the reply is of no use, or none can be had.
"""

import concurrent.futures
import datetime
import email.utils
import json
import random
import threading
import time
from typing import Any

import httpx

from tapo_jax.config import UserError
from tapo_jax.tools.base import BadCall

MAX_REPLY = 8 << 20
_BACK_OFF_S = (0.25, 8.0)  # the first wait and the longest, before jitter


class Client:
    """Posts JSON to one service. Safe to use from many threads. Equal concurrent calls are one request.

    endpoint: "http://host:port".
    timeout_s: of a whole call, including retries and the waits between them.
    retries: further attempts after a failed connection, a 408, a 429 or a 5xx.
    key: sent as a bearer token, and shown nowhere.
    max_reply: max bytes of a reply.
    """

    def __init__(self, endpoint: str, *, timeout_s: float, retries: int, key: str = "", max_reply: int = MAX_REPLY):
        self.endpoint = checked(endpoint)
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}  # no decompression bombs
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        self._http = httpx.Client(base_url=self.endpoint, headers=headers, limits=limits, follow_redirects=False)
        self._timeout_s, self._retries, self._max_reply = timeout_s, retries, max_reply
        self._flying: dict[str, concurrent.futures.Future[Any]] = {}
        self._lock = threading.Lock()

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON value of the reply. Raises BadCall."""
        deadline, key = time.monotonic() + self._timeout_s, json.dumps([path, body], sort_keys=True)
        with self._lock:
            other = self._flying.get(key)
            mine: concurrent.futures.Future[Any] = concurrent.futures.Future()
            if other is None:
                self._flying[key] = mine
        if other is not None:
            try:
                return other.result(timeout=self._timeout_s)
            except TimeoutError:
                raise self._timeout() from None
        try:
            value = self._tries(path, body, deadline)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(value)
            return value
        finally:
            with self._lock:
                del self._flying[key]

    def _tries(self, path: str, body: Any, deadline: float) -> Any:
        for number in range(self._retries + 1):
            wait_s = min(_BACK_OFF_S[0] * 2**number, _BACK_OFF_S[1]) * random.uniform(0.5, 1.0)
            try:
                status, headers, data = self._once(path, body, deadline)
            except httpx.TimeoutException:
                raise self._timeout() from None
            except httpx.HTTPError as error:
                failed = f"cannot be reached ({type(error).__name__})"
            else:
                if status == 200:
                    return self._value(data)
                failed = f"answered with status {status}"
                if status not in (408, 429) and status < 500:
                    break
                wait_s = max(wait_s, retry_after(headers.get("retry-after", "")))
            if number == self._retries or time.monotonic() + wait_s >= deadline:
                break
            time.sleep(wait_s)
        raise BadCall("service", f"The search service {failed}.")

    def _once(self, path: str, body: Any, deadline: float) -> tuple[int, httpx.Headers, bytes]:
        """Send one request. Its time limit holds for every piece of the reply, so that a trickling one ends too."""
        left = max(deadline - time.monotonic(), 0.001)
        with self._http.stream("POST", path, json=body, timeout=left) as reply:
            if reply.status_code != 200:
                return reply.status_code, reply.headers, b""
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise BadCall("service", "The search service sent a compressed reply, which was not asked for.")
            data = bytearray()
            for piece in reply.iter_raw():
                data += piece
                if len(data) > self._max_reply:
                    raise BadCall("service", f"The search service sent more than {self._max_reply >> 10} KiB.")
                if time.monotonic() > deadline:
                    raise self._timeout()
            return reply.status_code, reply.headers, bytes(data)

    def _value(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadCall("service", "The search service sent something that is no JSON.") from error

    def _timeout(self) -> BadCall:
        return BadCall("timeout", f"The search service gave no result in {self._timeout_s:g} seconds.")


def checked(endpoint: str) -> str:
    """Return the address without a trailing slash. Raises UserError if it is no http address or has a password."""
    try:
        url = httpx.URL(endpoint)
    except (httpx.InvalidURL, TypeError) as error:
        raise UserError(f"tools.endpoint is '{endpoint}', which is no address: give \"http://host:port\".") from error
    if url.userinfo:
        raise UserError("tools.endpoint holds a user name or a password: give the address alone.")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UserError(f"tools.endpoint is '{endpoint}', which is no address: give \"http://host:port\".")
    return str(url).rstrip("/")


def retry_after(value: str) -> float:
    """Return the seconds of a Retry-After header, which holds a number or a date; 0 for anything else."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(value)
            until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
            seconds = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if seconds == seconds else 0.0
