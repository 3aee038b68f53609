"""Text search over HTTP: an index of passages behind Search-R1's contract, as a Starlette app.

POST /retrieve {"queries": [text, …], "topk": k or null, "return_scores": bool} returns {"result": [[hit, …], …]}, one
list of hits per query; a hit is {"document": {"contents": text}, "score": number}, or without return_scores the bare
document. GET /health reports that the service is up and how many passages it has.

One thread searches. Queries that arrive while it is busy wait, and are then searched in one call.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tapo_jax.tools.arguments import BadCall

MAX_BODY = 16 << 20
MAX_TOP_K = 100
MAX_WAITING = 1 << 16  # queries; further ones get a 503
MAX_BATCH = 256
DEFAULT_TOP_K = 3

Hits = list[tuple[str, float]]


class Index(Protocol):
    """What the service searches; called by one thread."""

    def __len__(self) -> int: ...

    def search(self, queries: Sequence[str], top_k: Sequence[int]) -> list[Hits]:
        """Return the best top_k[i] passages of queries[i]. Raises BadCall if they cannot be had now."""
        ...


class BadRequest(Exception):
    """A request that is refused, with the status and the message of the reply."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Batcher:
    """Searches all waiting queries in one call, on its own thread."""

    def __init__(self, index: Index):
        self._index = index
        self._waiting: asyncio.Queue[tuple[str, int, asyncio.Future[Hits]]] = asyncio.Queue()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="search")
        self.batches = self.queries = 0

    async def search(self, queries: list[str], top_k: int) -> list[Hits]:
        if self._waiting.qsize() + len(queries) > MAX_WAITING and not self._waiting.empty():
            raise BadRequest(503, "Too many queries are waiting: try again in a second.")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in queries]
        for query, future in zip(queries, futures, strict=True):
            self._waiting.put_nowait((query, top_k, future))
        return list(await asyncio.gather(*futures))

    async def run(self) -> None:
        """Answer until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MAX_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [item for item in batch if not item[2].done()]  # drop cancelled queries
            queries, top_k, futures = ([item[part] for item in batch] for part in range(3))
            self.batches, self.queries = self.batches + 1, self.queries + len(batch)
            try:
                found: list[Any] = await loop.run_in_executor(self._thread, self._index.search, queries, top_k)
            except BadCall as error:  # a query could not be encoded
                found = [BadRequest(503, str(error))] * len(futures)
            except Exception as error:  # the service continues; the requests of this batch get a 500
                logging.exception("A search failed.")
                found = [BadRequest(500, f"The search failed: {type(error).__name__}.")] * len(futures)
            for future, hits in zip(futures, found, strict=True):
                if future.done():
                    continue
                if isinstance(hits, Exception):
                    future.set_exception(hits)
                else:
                    future.set_result(hits)


def make_app(index: Index) -> Starlette:
    """Return the ASGI app; while it runs, `app.state.batcher` counts its calls."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.batcher = Batcher(index)
        task = asyncio.create_task(app.state.batcher.run())
        yield
        task.cancel()

    async def retrieve(request: Request) -> Response:
        try:
            queries, top_k, scored = parse(await read_body(request))
            found = await request.app.state.batcher.search(queries, top_k)
        except ClientDisconnect:
            return Response(status_code=499)
        except BadRequest as error:
            headers = {503: {"Retry-After": "1"}, 413: {"Connection": "close"}}.get(error.status)
            return JSONResponse({"error": str(error)}, error.status, headers)
        return JSONResponse({"result": [[shown(hit, scored) for hit in hits] for hits in found]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "passages": len(index)})

    async def other(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": "Use POST /retrieve with a JSON body, or GET /health."}, error.status_code)

    routes = [Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: other, 405: other})


async def read_body(request: Request) -> bytes:
    """Read a body of at most MAX_BODY bytes, chunked or not."""
    too_much = BadRequest(413, f"The body is larger than {MAX_BODY} bytes: send fewer queries at a time.")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_much
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise too_much
    return bytes(body)


def parse(body: bytes) -> tuple[list[str], int, bool]:
    """Return the queries, top_k and return_scores of a request. Raises BadRequest."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, "The body is no JSON.") from error
    if not isinstance(asked, dict):
        raise BadRequest(400, 'The body must be an object: {"queries": ["…"], "topk": 3, "return_scores": true}.')
    queries, top_k, scored = asked.get("queries"), asked.get("topk"), asked.get("return_scores")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise BadRequest(400, '"queries" must be a list of strings.')
    top_k = DEFAULT_TOP_K if top_k is None else top_k
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= MAX_TOP_K:
        raise BadRequest(400, f'"topk" must be an integer from 1 to {MAX_TOP_K}, or null for {DEFAULT_TOP_K}.')
    if scored is not None and not isinstance(scored, bool):
        raise BadRequest(400, '"return_scores" must be true or false.')
    return queries, top_k, bool(scored)


def shown(hit: tuple[str, float], scored: bool) -> dict[str, Any]:
    document = {"contents": hit[0]}
    return {"document": document, "score": hit[1]} if scored else document
