"""A text search over HTTP: BM25 behind Search-R1's contract (see tools/remote_search.py), with the standard library's
server."""

import http.server
import json
from typing import Any

from tapo_jax.tools.text_search import TextSearch

MAX_BODY = 1 << 20
MAX_QUERIES = 256


def answer(search: TextSearch, body: Any) -> dict[str, Any]:
    """The reply to one request. Raises ValueError where the request does not fit the contract."""
    if not isinstance(body, dict) or not isinstance(body.get("queries"), list) or len(body["queries"]) > MAX_QUERIES:
        raise ValueError(f'"queries" must be a list of at most {MAX_QUERIES} strings')
    top_k = body.get("topk", 3)
    if (
        not isinstance(top_k, int)
        or not 1 <= top_k <= 100
        or not all(isinstance(query, str) for query in body["queries"])
    ):
        raise ValueError('"topk" must be an integer from 1 to 100 and every query a string')
    found = [search.search(query, top_k) for query in body["queries"]]
    return {"result": [[{"document": {"contents": text}, "score": score} for text, score in hits] for hits in found]}


def make_server(search: TextSearch, host: str, port: int) -> http.server.ThreadingHTTPServer:
    """A server that is not yet running; port 0 takes a free one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != "/retrieve" or not 0 < size <= MAX_BODY:
                self._reply(404 if self.path != "/retrieve" else 413, {"error": "POST /retrieve with a JSON body"})
                return
            try:
                self._reply(200, answer(search, json.loads(self.rfile.read(size))))
            except ValueError as error:
                self._reply(400, {"error": str(error)})

        def _reply(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Quiet: a training run sends thousands of requests a minute."""

    return http.server.ThreadingHTTPServer((host, port), Handler)
