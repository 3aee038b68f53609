"""Serve text search over a corpus, for `config.tools.endpoint`.

Run it by `python launch/retrieval_server.py --corpus=passages.jsonl --port=8000`.
"""

import socket
from typing import TYPE_CHECKING

from absl import flags

from tapo_jax.config import UserError, run_main
from tapo_jax.data.corpus import open_index
from tapo_jax.tools import dense_index, embeddings

if TYPE_CHECKING:
    from tapo_jax.tools.retrieval_service import Index

_CORPUS = flags.DEFINE_string(
    "corpus", None, 'JSON lines (.jsonl, .jsonl.gz) or .parquet: "contents", or "title" and "text".', required=True
)
_INDEX = flags.DEFINE_string("index", "", "Folder of the index: made at the first start, loaded at the next ones.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 or ::, every one of this machine.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: a free one.")
_SEARCH = flags.DEFINE_enum(
    "search",
    None,
    ["bm25", "dense", "hybrid"],
    "What ranks the passages: their words, their vectors, or both. Default: hybrid with --vectors, else bm25.",
)
_VECTORS = flags.DEFINE_string("vectors", "", "Vectors of the passages, computed before: .npy, float32 or float16.")
_VECTOR_IDS = flags.DEFINE_string(
    "vector_ids", "", "Which passage each vector belongs to, counted from 0: .npy. Default: vector i is of passage i."
)
_EMBEDDINGS = flags.DEFINE_string(
    "embeddings", "", 'OpenAI-compatible endpoint that encodes queries, "http://host:port/v1".'
)
_EMBEDDINGS_MODEL = flags.DEFINE_string("embeddings_model", "", "Its name of the model that made the vectors.")
_QUERY_PREFIX = flags.DEFINE_string("query_prefix", "", 'Put before a query that is encoded, such as "query: ".')


def make_index() -> "Index":
    kind = _SEARCH.value or ("hybrid" if _VECTORS.value else "bm25")
    given = {"vectors": _VECTORS.value, "embeddings": _EMBEDDINGS.value, "embeddings_model": _EMBEDDINGS_MODEL.value}
    if kind == "bm25":
        for flag in (*given, "vector_ids", "query_prefix"):
            if flags.FLAGS[flag].value:
                raise UserError(f"--{flag} has no use with --search=bm25: leave it out, or give --search=hybrid.")
        return open_index(_CORPUS.value, _INDEX.value)
    if missing := [flag for flag, value in given.items() if not value]:
        raise UserError(f"--search={kind} needs --{missing[0]}.")
    passages = open_index(_CORPUS.value, _INDEX.value)
    vectors, number = dense_index.open_vectors(_VECTORS.value, _VECTOR_IDS.value, len(passages))
    embed = embeddings.Embeddings(
        _EMBEDDINGS.value, _EMBEDDINGS_MODEL.value, dimensions=vectors.shape[1], prefix=_QUERY_PREFIX.value
    )
    embed.check()
    dense = dense_index.DenseIndex(passages, vectors, number, embed)
    return dense if kind == "dense" else dense_index.HybridIndex(passages, dense)


def main(argv: list[str]) -> None:
    del argv
    try:
        import uvicorn  # noqa: PLC0415 - an extra

        from tapo_jax.tools.retrieval_service import make_app  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise UserError(f"The service needs {error.name}: pip install 'tapo_jax[serve]'.") from error
    listener = socket.socket(socket.AF_INET6 if ":" in _HOST.value else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST.value, _PORT.value))
    except OSError as error:
        raise UserError(f"--host={_HOST.value} --port={_PORT.value}: {error.strerror}.") from error
    index = make_index()
    listener.listen(4096)  # connections from now on wait until the loop runs
    print(f"{len(index)} passages at http://{_HOST.value}:{listener.getsockname()[1]}/retrieve", flush=True)
    config = uvicorn.Config(make_app(index), log_level="warning", backlog=4096, timeout_keep_alive=75)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run_main(main)
