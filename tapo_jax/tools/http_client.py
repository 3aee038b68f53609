"""A client for services that may be slow, busy, broken or hostile: every failure is a BadCall of one of two kinds.

"timeout": no complete reply within the time limit. "service": the reply is of no use, or none can be had.
"""

import datetime
import email.utils
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.patience import Patience, TryAgain, ask

MAX_REPLY = 8 << 20
WHAT = "search service"


def json_value(data: bytes, content_type: str) -> Any:
    """Return the value of a search service's reply that is JSON. Raises BadCall for any other."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadCall("service", f"The {WHAT} sent something that is no JSON.") from error


class Client:
    """Posts JSON to one service. Safe to use from many threads.

    endpoint: "http://host:port".
    patience: how long and how often to try: again after a failed connection, a 408, a 429 or a 5xx.
    headers: sent with every request, and shown nowhere.
    secret: a key among the headers; a reply that repeats it is read without it.
    max_reply: max bytes of a reply.
    what: names the service in messages.
    setting: names the address in messages.
    """

    def __init__(
        self,
        endpoint: str,
        patience: Patience,
        *,
        headers: Mapping[str, str] | None = None,
        secret: str = "",
        max_reply: int = MAX_REPLY,
        what: str = WHAT,
        setting: str = "tools.endpoint",
    ):
        self.endpoint, self._what = checked(endpoint, setting), what
        sent = {"Accept": "application/json, text/plain", "Accept-Encoding": "identity"}  # no decompression bombs
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        sent |= headers or {}
        self._http = httpx.Client(base_url=self.endpoint, headers=sent, limits=limits, follow_redirects=False)
        self._patience, self._secret, self._max_reply = patience, secret.encode(), max_reply

    def post(self, path: str, body: Any, read: Callable[[bytes, str], Any] = json_value) -> tuple[Any, int]:
        """Return the reply and the number of retries. Raises BadCall.

        read: returns the value of the reply's bytes and content type, or raises BadCall.
        """

        def request(deadline: float) -> Any:
            try:
                return read(*self._once(path, body, deadline))
            except httpx.TimeoutException:
                raise TimeoutError from None
            except httpx.HTTPError as error:
                raise TryAgain(f"cannot be reached ({type(error).__name__})") from None

        return ask(request, self._patience, what=self._what)

    def _once(self, path: str, body: Any, deadline: float) -> tuple[bytes, str]:
        """Send one request. Its time limit holds for every piece of the reply, so that a trickling one ends too."""
        left = max(deadline - time.monotonic(), 0.001)
        with self._http.stream("POST", path, json=body, timeout=left) as reply:
            status, headers = reply.status_code, reply.headers
            if status in (408, 429) or status >= 500:
                wait_s = retry_after(headers.get("retry-after", ""))
                raise TryAgain(f"answered with status {status}", wait_s=wait_s)
            if status != 200:
                raise BadCall("service", f"The {self._what} answered with status {status}.")
            if headers.get("content-encoding", "identity") != "identity":
                raise BadCall("service", f"The {self._what} sent a compressed reply, which was not asked for.")
            data = bytearray()
            for piece in reply.iter_raw():
                data += piece
                if len(data) > self._max_reply:
                    raise BadCall("service", f"The {self._what} sent more than {self._max_reply >> 10} KiB.")
                if time.monotonic() > deadline:
                    raise TimeoutError
        whole = bytes(data).replace(self._secret, b"[key]") if self._secret else bytes(data)
        return whole, headers.get("content-type", "")


def checked(endpoint: str, setting: str) -> str:
    """Return the address without a trailing slash. Raises UserError if it is no http address or has a password.

    setting: names the address in messages.
    """
    none = f"{setting} is '{endpoint}', which is no address: give \"http://host:port\"."
    try:
        url = httpx.URL(endpoint)
    except (httpx.InvalidURL, TypeError) as error:
        raise UserError(none) from error
    if url.userinfo:
        raise UserError(f"{setting} holds a user name or a password: give the address alone.")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UserError(none)
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
