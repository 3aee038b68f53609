"""python launch/retrieval_server.py --corpus=passages.jsonl --port=8000: text search for `config.tools.endpoint`."""

from absl import flags

from tapo_jax.config import run_main
from tapo_jax.data.corpus import read_corpus
from tapo_jax.tools.retrieval_service import make_server
from tapo_jax.tools.text_search import TextSearch

_CORPUS = flags.DEFINE_string("corpus", None, 'JSON lines, {"contents": "Title\\ntext"} each.', required=True)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.")


def main(argv: list[str]) -> None:
    del argv
    passages = read_corpus(_CORPUS.value)
    server = make_server(TextSearch(passages, top_k=3, budget=1 << 30), _HOST.value, _PORT.value)
    print(f"{len(passages)} passages at http://{_HOST.value}:{server.server_port}/retrieve", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_main(main)
