"""Serve text search over a corpus, for `config.tools.endpoint`.

Run it by `python launch/retrieval_server.py --corpus=passages.jsonl --port=8000`.
"""

import socket

from absl import flags

from tapo_jax.config import UserError, run_main
from tapo_jax.data.corpus import open_index

_CORPUS = flags.DEFINE_string(
    "corpus", None, 'JSON lines (.jsonl, .jsonl.gz) or .parquet: "contents", or "title" and "text".', required=True
)
_INDEX = flags.DEFINE_string("index", "", "Folder of the index: made at the first start, loaded at the next ones.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: a free one.")


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
    index = open_index(_CORPUS.value, _INDEX.value)
    listener.listen(4096)  # connections from now on wait until the loop runs
    print(f"{len(index)} passages at http://{_HOST.value}:{listener.getsockname()[1]}/retrieve", flush=True)
    config = uvicorn.Config(make_app(index), log_level="warning", backlog=4096, timeout_keep_alive=75)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run_main(main)
