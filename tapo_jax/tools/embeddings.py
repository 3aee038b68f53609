"""Vectors of texts from an OpenAI-compatible endpoint: POST ENDPOINT/embeddings {"model": …, "input": [text, …]}.

Every failure is a BadCall: "timeout" if there is no whole reply within the time limit, "service" for anything else.
"""

import json
import os
import random
import time
from typing import Any

import httpx
import numpy as np

from tapo_jax.config import UserError
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.http_client import retry_after

KEY = "TAPO_EMBEDDINGS_KEY"  # the environment variable of the endpoint's key, if it has one
MOST = 64  # texts of a request
MAX_REPLY = 64 << 20
_BACK_OFF_S = (0.25, 8.0)  # the first wait and the longest, before jitter


class Embeddings:
    """Asks the endpoint for vectors of `dimensions` numbers.

    endpoint: "http://host:port/v1".
    prefix: put before each text, where the model wants one ("query: ").
    timeout_s: of a request, including retries and the waits between them.
    retries: further attempts after a failed connection, a 408, a 429 or a 5xx.
    """

    def __init__(
        self, endpoint: str, model: str, *, dimensions: int, prefix: str = "", timeout_s: float = 10, retries: int = 2
    ):
        self._endpoint = _checked(endpoint)
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}  # no decompression bombs
        key = os.environ.get(KEY, "")
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self._endpoint, headers=headers, follow_redirects=False)
        self._model, self._dimensions, self._prefix = model, dimensions, prefix
        self._timeout_s, self._retries = timeout_s, retries

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return [Q, D] float32. Raises BadCall if they cannot be had."""
        return np.concatenate([self._vectors(texts[i : i + MOST]) for i in range(0, len(texts), MOST)])

    def check(self) -> None:
        """Raise UserError if the endpoint cannot be used."""
        try:
            self(["test"])
        except BadCall as error:
            raise UserError(f"--embeddings is '{self._endpoint}': {error}") from error

    def _vectors(self, texts: list[str]) -> np.ndarray:
        body = {"model": self._model, "input": [self._prefix + text for text in texts], "encoding_format": "float"}
        data = self._tries(body, time.monotonic() + self._timeout_s)
        try:
            items = json.loads(data)["data"]
            place = [item["index"] for item in items]  # they may come in another order than the texts
            if sorted(place) != list(range(len(texts))):
                raise ValueError("not one vector for each text")
            found = np.array([item["embedding"] for item in items], np.float32)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BadCall("service", "The embeddings service sent no list of embeddings.") from error
        if found.shape != (len(texts), self._dimensions):
            raise BadCall(
                "service",
                f"The embeddings service sent vectors of shape {found.shape[1:]}; "
                f"those of the passages have {self._dimensions} numbers.",
            )
        if not np.isfinite(found).all():
            raise BadCall("service", "The embeddings service sent numbers that are not finite.")
        return found[np.argsort(place)]

    def _tries(self, body: dict[str, Any], deadline: float) -> bytes:
        for number in range(self._retries + 1):
            wait_s = min(_BACK_OFF_S[0] * 2**number, _BACK_OFF_S[1]) * random.uniform(0.5, 1.0)
            try:
                status, after, data = self._once(body, deadline)
            except httpx.TimeoutException:
                raise self._timeout() from None
            except httpx.HTTPError as error:
                failed = f"cannot be reached ({type(error).__name__})"
            else:
                if status == 200:
                    return data
                failed = f"answered with status {status}"
                if status not in (408, 429) and status < 500:
                    break
                wait_s = max(wait_s, retry_after(after))
            if number == self._retries or time.monotonic() + wait_s >= deadline:
                break
            time.sleep(wait_s)
        raise BadCall("service", f"The embeddings service {failed}.")

    def _once(self, body: dict[str, Any], deadline: float) -> tuple[int, str, bytes]:
        """Send one request; return (status, Retry-After, body of a 200)."""
        left = max(deadline - time.monotonic(), 0.001)
        with self._http.stream("POST", "/embeddings", json=body, timeout=left) as reply:
            if reply.status_code != 200:
                return reply.status_code, reply.headers.get("retry-after", ""), b""
            data = bytearray()
            for piece in reply.iter_raw():
                data += piece
                if len(data) > MAX_REPLY:
                    raise BadCall("service", f"The embeddings service sent more than {MAX_REPLY >> 20} MiB.")
                if time.monotonic() > deadline:
                    raise self._timeout()
            return 200, "", bytes(data)

    def _timeout(self) -> BadCall:
        return BadCall("timeout", f"The embeddings service gave no vectors in {self._timeout_s:g} seconds.")


def _checked(endpoint: str) -> str:
    """Return the address without a trailing slash. Raises UserError if it is no http address or has a password."""
    try:
        url = httpx.URL(endpoint)
    except httpx.InvalidURL as error:
        raise UserError(f"--embeddings is '{endpoint}', which is no address: give \"http://host:port/v1\".") from error
    if url.userinfo:
        raise UserError("--embeddings holds a user name or a password: give the address alone.")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UserError(f"--embeddings is '{endpoint}', which is no address: give \"http://host:port/v1\".")
    return str(url).rstrip("/")
