"""Search by vectors, and by vectors and words: exact, with queries that an embeddings service encodes."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest

from tapo_jax.config import UserError
from tapo_jax.tools import dense_index, embeddings, passage_index, patience, retrieval_service
from tapo_jax.tools.arguments import BadCall
from tapo_jax.tools.dense_index import DenseIndex, HybridIndex, fuse, nearest, open_vectors
from tapo_jax.tools.embeddings import Embeddings
from tests.served import serving
from tests.test_retrieval_service import program

WORDS = ["lima", "peru", "chad", "river"]
PASSAGES = ["Lima\nlima lima peru", "Peru\nperu river", "Chad\nchad", "Nile\nriver river river"]


def counts(text):
    """The vector of a text: how often each word is in it."""
    return [float(text.lower().split().count(word)) for word in WORDS]


VECTORS = np.array([counts(passage) for passage in PASSAGES], np.float32)


def good(body):
    """Vectors in another order than the texts."""
    items = [{"index": i, "embedding": counts(text)} for i, text in enumerate(body["input"])]
    return 200, json.dumps({"data": items[::-1]})


@contextlib.contextmanager
def embedding(*answers):
    """An embeddings service that gives these answers, the last one again and again, and keeps its requests."""
    requests, waiting = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers, body))
            answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            status, text = answer(body) if callable(answer) else answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between tries, which take no time."""
    found = []
    monkeypatch.setattr(patience.time, "sleep", found.append)
    return found


def client(address, **more):
    return Embeddings(address, "model", **({"dimensions": 4} | more))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_the_nearest_vectors_are_those_of_a_full_sort(kind, monkeypatch):
    """Small whole numbers, so that products are exact and ties are the rule; more vectors than a block."""
    monkeypatch.setattr(dense_index, "BLOCK", 64)
    draw = np.random.default_rng(0)
    vectors = draw.integers(-3, 4, (1000, 8)).astype(kind)
    queries = draw.integers(-3, 4, (20, 8)).astype(np.float32)
    for top_k in (1, 5, 100, 1001):
        for query, (row, score) in zip(queries, nearest(queries, vectors, top_k), strict=True):
            every = vectors.astype(np.float32) @ query
            order = np.argsort(-every, kind="stable")[:top_k]
            assert row.tolist() == order.tolist() and score.tolist() == every[order].tolist()


def test_fusion_is_the_sum_of_reciprocal_ranks():
    number, score = fuse([np.array([7, 2, 5]), np.array([2, 9])], 3)
    assert number.tolist() == [2, 7, 9]
    assert score.tolist() == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])
    number, _ = fuse([np.array([8]), np.array([3])], 5)
    assert number.tolist() == [3, 8]  # ties go to the earlier passage
    assert fuse([np.zeros(0, int), np.zeros(0, int)], 3)[0].tolist() == []


def test_vectors_find_their_passages_and_equal_queries_are_encoded_once():
    passages = passage_index.build(PASSAGES)
    with embedding(good) as (address, requests):
        index = DenseIndex(passages, VECTORS, None, client(address, prefix="query: "))
        found = index.search(["river", " ", "lima", "river"], [1, 3, 2, 2])
    assert found[0] == [(PASSAGES[3], 3.0)] and found[1] == []
    assert found[2] == [(PASSAGES[0], 3.0), (PASSAGES[1], 0.0)]
    assert [hit[0] for hit in found[3]] == [PASSAGES[3], PASSAGES[1]]
    ((path, headers, body),) = requests
    assert path == "/v1/embeddings" and "Authorization" not in headers
    assert body == {"model": "model", "input": ["query: river", "query: lima"], "encoding_format": "float"}


def test_vectors_may_belong_to_some_passages_in_any_order():
    passages = passage_index.build(PASSAGES)
    embed = lambda texts: np.array([counts(text) for text in texts], np.float32)  # noqa: E731
    index = DenseIndex(passages, VECTORS[[3, 1]], np.array([3, 1]), embed)
    assert [hit[0] for hit in index.search(["river"], [5])[0]] == [PASSAGES[3], PASSAGES[1]]


def test_the_hybrid_finds_what_either_finds():
    """The passage about the Nile has not the word; these vectors put it first."""
    passages = passage_index.build(PASSAGES)
    dense = DenseIndex(passages, VECTORS, None, lambda texts: np.array([[0, 0, 0, 1]] * len(texts), np.float32))
    (found,) = HybridIndex(passages, dense).search(["peru"], [4])
    assert found[0] == (PASSAGES[1], pytest.approx(1 / 61 + 1 / 62)) and PASSAGES[3] in [hit[0] for hit in found]
    assert [len(hits) for hits in HybridIndex(passages, dense).search(["zebra", "lima"], [3, 1])] == [3, 1]


def test_many_texts_are_several_requests_and_keep_their_order():
    texts = [WORDS[i % 4] for i in range(150)]
    with embedding(good) as (address, requests):
        assert client(address)(texts).tolist() == [counts(text) for text in texts]
    assert [len(body["input"]) for _, _, body in requests] == [64, 64, 22]


@pytest.mark.parametrize("first", [(429, ""), (500, ""), (503, "")])
def test_a_busy_embeddings_service_is_asked_again(first, waits):
    with embedding(first, good) as (address, requests):
        assert client(address)(["lima"]).tolist() == [[1, 0, 0, 0]]
        assert len(requests) == 2 and len(waits) == 1


@pytest.mark.parametrize(
    ("answer", "says", "asked"),
    [
        ((401, ""), "answered with status 401", 1),
        ((500, ""), "answered with status 500", 3),
        ((200, "no"), "no list of embeddings", 1),
        ((200, "[" * 100_000), "no list of embeddings", 1),
        ((200, "[]"), "no list of embeddings", 1),
        ((200, '{"data": []}'), "no list of embeddings", 1),
        ((200, '{"data": [{"index": 1, "embedding": [1, 2, 3, 4]}]}'), "no list of embeddings", 1),
        ((200, '{"data": [{"index": 0, "embedding": ["a"]}]}'), "no list of embeddings", 1),
        ((200, '{"data": [{"index": 0, "embedding": [1, 2]}]}'), "those of the passages have 4 numbers", 1),
        ((200, '{"data": [{"index": 0, "embedding": [1, 2, 3, NaN]}]}'), "not finite", 1),
    ],
)
def test_an_embeddings_service_that_is_of_no_use_is_one_sentence(answer, says, asked):
    with embedding(answer) as (address, requests):
        with pytest.raises(BadCall, match=says) as error:
            client(address)(["lima"])
        assert error.value.kind == "service" and len(requests) == asked
        with pytest.raises(UserError, match=rf"--embeddings is '{address}': .*{says}"):
            client(address).check()


def test_an_embeddings_service_that_is_slow_large_or_gone_is_one_sentence(monkeypatch):
    held = threading.Event()
    with embedding(lambda body: (held.wait(5), good(body))[1]) as (address, _):
        with pytest.raises(BadCall, match="no result in 0.2 seconds") as error:
            client(address, timeout_s=0.2)(["lima"])
        held.set()
        assert error.value.kind == "timeout"
        monkeypatch.setattr(embeddings, "MAX_REPLY", 10)
        with pytest.raises(BadCall, match="sent more than"):
            client(address)(["lima"])
    with pytest.raises(BadCall, match="cannot be reached"):
        client(address)(["lima"])


def test_the_key_comes_from_the_environment_and_addresses_are_checked(monkeypatch):
    monkeypatch.setenv(embeddings.KEY, "planted")
    with embedding(good) as (address, requests):
        client(address)(["lima"])
    assert requests[0][1]["Authorization"] == "Bearer planted"
    monkeypatch.setenv(embeddings.KEY, "plant\u00e9d")
    with pytest.raises(UserError, match=f"{embeddings.KEY} has characters that no key has"):
        client(address)
    monkeypatch.delenv(embeddings.KEY)
    for bad in ("nowhere", "ftp://host", "http://", "http://host?key=1", "http://user:word@host/v1", "http://[::1"):
        with pytest.raises(UserError, match="--embeddings") as error:
            client(bad)
        assert "user:word" not in str(error.value)


def test_vectors_that_do_not_fit_are_one_sentence(tmp_path):
    vectors, ids = tmp_path / "v.npy", tmp_path / "i.npy"

    def opened(some, number=None, passages=4):
        np.save(vectors, some)
        if number is not None:
            np.save(ids, number)
        return open_vectors(str(vectors), str(ids) if number is not None else "", passages)

    mapped, none = opened(VECTORS)
    assert isinstance(mapped, np.memmap) and none is None and (mapped == VECTORS).all()
    assert opened(VECTORS[:2].astype(np.float16), [3, 0])[1].tolist() == [3, 0]
    for some, number, says in (
        (VECTORS.astype(np.int64), None, "an array of int64 and shape"),
        (VECTORS[0], None, "give float32 or float16 of shape"),
        (VECTORS[:3], None, "3 vectors for 4 passages"),
        (VECTORS, [0, 1, 2], "give 4 whole numbers"),
        (VECTORS, [0, 1, 2, 2.5], "give 4 whole numbers"),
        (VECTORS, [0, 1, 2, 4], "0 to 3, once"),
        (VECTORS, [0, 1, 2, 2], "0 to 3, once"),
    ):
        with pytest.raises(UserError, match=says):
            opened(some, number)
    vectors.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(UserError, match="is no .npy file"):
        open_vectors(str(vectors), "", 4)
    np.save(vectors, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        open_vectors(str(vectors), "", 4)
    with pytest.raises(UserError, match="cannot be read"):
        open_vectors(str(tmp_path / "none.npy"), "", 4)


def test_the_program_searches_by_words_and_vectors(tmp_path):
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"contents": text}) for text in PASSAGES))
    np.save(tmp_path / "v.npy", VECTORS)
    with embedding(good) as (address, requests):
        more = (f"--vectors={tmp_path / 'v.npy'}", f"--embeddings={address}", "--embeddings_model=m")
        with program(tmp_path, *more) as (line, service), httpx.Client(verify=False, timeout=30) as http:
            assert line.startswith("4 passages at")
            (hits,) = http.post(f"{service}/retrieve", json={"queries": ["chad"], "topk": 1}).json()["result"]
    assert hits == [{"contents": PASSAGES[2]}]
    assert [body["input"] for _, _, body in requests] == [["test"], ["chad"]]


def test_the_service_says_503_while_queries_cannot_be_encoded():
    passages = passage_index.build(PASSAGES)
    with embedding((400, ""), good) as (address, _):
        hybrid = HybridIndex(passages, DenseIndex(passages, VECTORS, None, client(address)))
        with serving(retrieval_service.make_app(hybrid)) as service, httpx.Client(verify=False) as http:
            body = {"queries": ["river"], "topk": 1, "return_scores": True}
            reply = http.post(f"{service}/retrieve", json=body)
            assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
            assert reply.json() == {"error": "The embeddings service answered with status 400."}
            (hits,) = http.post(f"{service}/retrieve", json=body).raise_for_status().json()["result"]
            assert hits == [{"document": {"contents": PASSAGES[3]}, "score": pytest.approx(2 / 61)}]
            assert http.get(f"{service}/health").json()["passages"] == 4
