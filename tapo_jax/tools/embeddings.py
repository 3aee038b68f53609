"""Vectors of texts from an OpenAI-compatible endpoint: POST ENDPOINT/embeddings {"model": …, "input": [text, …]}.

Every failure is a BadCall: "timeout" if there is no whole reply within the time limit, "service" for anything else.
"""

import json

import numpy as np

from tapo_jax.config import UserError, key_from
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.http_client import Client
from tapo_jax.tools.patience import Patience

KEY = "TAPO_EMBEDDINGS_KEY"  # the environment variable of the endpoint's key, if it has one
MOST = 64  # texts of a request
MAX_REPLY = 64 << 20
WHAT = "embeddings service"


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
        key = key_from(KEY)
        self._client = Client(
            endpoint,
            Patience(timeout_s, retries),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            secret=key,
            max_reply=MAX_REPLY,
            what=WHAT,
            setting="--embeddings",
        )
        self._model, self._dimensions, self._prefix = model, dimensions, prefix

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return [Q, D] float32. Raises BadCall if they cannot be had."""
        return np.concatenate([self._vectors(texts[i : i + MOST]) for i in range(0, len(texts), MOST)])

    def check(self) -> None:
        """Raise UserError if the endpoint cannot be used."""
        try:
            self(["test"])
        except BadCall as error:
            raise UserError(f"--embeddings is '{self._client.endpoint}': {error}") from error

    def _vectors(self, texts: list[str]) -> np.ndarray:
        body = {"model": self._model, "input": [self._prefix + text for text in texts], "encoding_format": "float"}
        data, _ = self._client.post("/embeddings", body, lambda data, content_type: data)
        try:
            items = json.loads(data)["data"]
            place = [item["index"] for item in items]  # they may come in another order than the texts
            if sorted(place) != list(range(len(texts))):
                raise ValueError("not one vector for each text")
            found = np.array([item["embedding"] for item in items], np.float32)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BadCall("service", f"The {WHAT} sent no list of embeddings.") from error
        if found.shape != (len(texts), self._dimensions):
            raise BadCall(
                "service",
                f"The {WHAT} sent vectors of shape {found.shape[1:]}; "
                f"those of the passages have {self._dimensions} numbers.",
            )
        if not np.isfinite(found).all():
            raise BadCall("service", f"The {WHAT} sent numbers that are not finite.")
        return found[np.argsort(place)]
