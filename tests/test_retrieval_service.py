"""The retrieval service: Search-R1's contract, many clients at once, an index that is saved."""

import concurrent.futures
import contextlib
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tapo_jax.config import UserError
from tapo_jax.data import corpus
from tapo_jax.tools import passage_index, retrieval_service
from tapo_jax.tools.text_search import TextSearch
from tests.served import serving

HTTP = httpx.Client(verify=False, timeout=30)  # made once: reading certificates takes longer than a test
ROOT = Path(__file__).parents[1]
WORDS = ["lima", "peru", "chad", "river", "lake", "iron", "salt", "café", "north", "old"]


def passages(number=300):
    draw = np.random.default_rng(0)
    return [f"Page {i}\n" + " ".join(draw.choice(WORDS, 6)) for i in range(number)]


@pytest.fixture(scope="module")
def app():
    return retrieval_service.make_app(passage_index.build(passages()))


@pytest.fixture(scope="module")
def service(app):
    with serving(app) as address:
        yield address


def retrieve(address, **body):
    return HTTP.post(f"{address}/retrieve", json=body).raise_for_status().json()["result"]


def test_the_index_finds_what_the_local_search_finds():
    """The local search sorts all scores; ties are the rule here."""
    local, index = TextSearch(passages(), top_k=3, budget=1), passage_index.build(passages())
    queries = ["lima", "peru chad", "old old north", "page 7", "CAFÉ", "", "zebra", "lima"]
    top_k = [1, 5, 100, 3, 400, 3, 3, 7]
    assert index.search(queries, top_k) == [local.search(q, k) for q, k in zip(queries, top_k, strict=True)]


def test_the_contract(service):
    scored = retrieve(service, queries=["page 7", "zebra"], topk=2, return_scores=True)
    assert [len(hits) for hits in scored] == [2, 0] and scored[0][0]["document"]["contents"].startswith("Page 7\n")
    assert scored[0][0]["score"] >= scored[0][1]["score"] > 0
    bare = retrieve(service, queries=["page 7"], topk=2, return_scores=False)
    assert bare == retrieve(service, queries=["page 7"], topk=2) == [[hit["document"] for hit in scored[0]]]
    assert len(retrieve(service, queries=["lima"], topk=None)[0]) == retrieval_service.DEFAULT_TOP_K
    assert retrieve(service, queries=[]) == []
    many = retrieve(service, queries=["lima", "page 7"] * 1000, topk=1)  # more than one batch
    assert len(many) == 2000 and many[1::2] == [[bare[0][0]]] * 1000


def test_health_chunks_and_keep_alive(service):
    with httpx.Client(base_url=service) as client:
        assert client.get("/health").json() == {"status": "ok", "passages": 300}
        chunks = (part for part in (b'{"que', b'ries": ["page 7"]', b"}"))
        reply = client.post("/retrieve", content=chunks)
        assert reply.request.headers["transfer-encoding"] == "chunked" and len(reply.json()["result"][0]) == 3
        kept = [reply.extensions["network_stream"].get_extra_info("client_addr") for _ in range(2)]
        again = client.post("/retrieve", json={"queries": ["x"]}).extensions["network_stream"]
        assert again.get_extra_info("client_addr") == kept[0]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "no JSON"),
        (b"\xff{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"[]", 400, "must be an object"),
        (b'{"queries": "x"}', 400, "list of strings"),
        (b'{"queries": ["x"], "topk": true}', 400, '"topk" must be'),
        (b'{"queries": ["x"], "topk": 101}', 400, '"topk" must be'),
        (b'{"queries": ["x"], "return_scores": 1}', 400, '"return_scores" must be'),
        (b" " * (retrieval_service.MAX_BODY + 1), 413, "larger than"),
    ],
)
def test_a_bad_request_is_one_sentence(service, body, status, says):
    for content in (body, (part for part in (body,))):  # with its length, and in chunks
        reply = HTTP.post(f"{service}/retrieve", content=content)
        assert reply.status_code == status and says in reply.json()["error"]
    for reply in (HTTP.post(f"{service}/other"), HTTP.get(f"{service}/retrieve")):
        assert reply.status_code in (404, 405) and "Use POST /retrieve" in reply.json()["error"]
    assert retrieve(service, queries=["lima"])


def test_64_clients_lose_no_request(app, service):
    """1024 requests, each of its own query, each with its own answer; fewer calls of the index than requests."""
    batches, queries = app.state.batcher.batches, app.state.batcher.queries

    def play(client_number):
        with httpx.Client(base_url=service, timeout=60, verify=False) as client:
            for turn in range(16):
                page = (client_number * 16 + turn) % 300
                body = {"queries": [f"page {page}"], "topk": 1, "return_scores": True}
                (hits,) = client.post("/retrieve", json=body).raise_for_status().json()["result"]
                assert hits[0]["document"]["contents"].startswith(f"Page {page}\n")
        return 16

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(play, range(64))) == 1024
    assert app.state.batcher.queries - queries == 1024
    assert app.state.batcher.batches - batches < 1024


PLAYERS = """
import concurrent.futures, sys
import httpx

address, process = sys.argv[1], int(sys.argv[2])

def play(worker):
    right = 0
    with httpx.Client(base_url=address, timeout=120, verify=False) as client:
        for turn in range(16):
            page = (process * 1024 + worker * 16 + turn) % 300
            body = {"queries": [f"page {page}"], "topk": 1}
            (hits,) = client.post("/retrieve", json=body).raise_for_status().json()["result"]
            right += hits[0]["contents"].startswith(f"Page {page}\\n")
    return right

with concurrent.futures.ThreadPoolExecutor(64) as pool:
    print(sum(pool.map(play, range(64))))
"""


@contextlib.contextmanager
def program(folder, *arguments):
    """The service as a process of its own, over c.jsonl of a folder; gives the line that it prints and its address."""
    command = [sys.executable, "launch/retrieval_server.py", "--port=0", f"--corpus={folder / 'c.jsonl'}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            yield line, line.split()[-1].removesuffix("/retrieve")
        finally:
            process.terminate()


@pytest.mark.nightly
def test_four_processes_of_64_workers_lose_no_request(tmp_path):
    """4096 requests from 256 connections to the program itself, each with its own answer."""
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"contents": text}) for text in passages()))
    with program(tmp_path) as (_, address):
        command = [sys.executable, "-c", PLAYERS, address]
        players = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(4)]
        assert [int(player.communicate(timeout=500)[0]) for player in players] == [1024] * 4


def test_a_failing_search_is_a_500_and_the_service_goes_on(monkeypatch):
    index = passage_index.build(passages(5))
    with serving(retrieval_service.make_app(index)) as address:
        with monkeypatch.context() as patched:
            patched.setattr(index, "_best", lambda query, k: 1 / 0)
            reply = HTTP.post(f"{address}/retrieve", json={"queries": ["lima", "chad"]})
            assert reply.status_code == 500 and reply.json() == {"error": "The search failed: ZeroDivisionError."}
        assert retrieve(address, queries=["lima"])


def test_a_saved_index_is_loaded_and_belongs_to_its_corpus(tmp_path, monkeypatch):
    file, folder = tmp_path / "c.jsonl", tmp_path / "index"
    file.write_text("\n".join(json.dumps({"contents": text}) for text in passages(50)))
    built = corpus.open_index(str(file), str(folder))
    monkeypatch.setattr(passage_index, "build", lambda passages: 1 / 0)
    loaded = corpus.open_index(str(file), str(folder))
    assert all(isinstance(array, np.memmap) for array in loaded.arrays.values())
    memory = TextSearch(passages(50), top_k=3, budget=1)
    for index in (built, loaded):
        assert len(index) == 50 and index.search(["lima café"], [5]) == [memory.search("lima café", 5)]
    file.write_text('{"contents": "other"}')
    with pytest.raises(UserError, match="made from another corpus: remove it"):
        corpus.open_index(str(file), str(folder))
    (folder / "about.json").write_text(json.dumps({"format": 1, "fingerprint": corpus.fingerprint(str(file))}))
    with pytest.raises(UserError, match="another version of this program made: remove it"):
        corpus.open_index(str(file), str(folder))
    (folder / "about.json").unlink()
    with pytest.raises(UserError, match="holds no index"):
        corpus.open_index(str(file), str(folder))


def test_an_index_that_was_not_finished_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "c.jsonl"
    file.write_text('{"contents": "lima"}')
    with monkeypatch.context() as patched:
        patched.setattr(np, "save", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            corpus.open_index(str(file), str(tmp_path / "index"))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    assert len(corpus.open_index(str(file), str(tmp_path / "index"))) == 1


def test_corpora_of_every_form(tmp_path):
    rows = [{"title": "Peru", "text": "Lima."}, {"title": None, "text": "Chad."}]
    lines = "\n".join(json.dumps({"id": 1, **row}) for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert list(corpus.read_corpus(str(tmp_path / name))) == ["Peru\nLima.", "Chad."], name
    pyarrow.parquet.write_table(pyarrow.table({"contents": ["x", None]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    (tmp_path / "d.jsonl.gz").write_bytes(lines)
    for name, says in (
        ("b.parquet", "row 2: the field 'contents' is null"),
        ("c.parquet", "cannot be read as parquet"),
        ("c.jsonl.gz", "cannot be unpacked"),
        ("d.jsonl.gz", "cannot be unpacked"),
    ):
        with pytest.raises(UserError, match=says):
            list(corpus.read_corpus(str(tmp_path / name)))


def test_the_program_restarts_from_its_saved_index(tmp_path):
    """As a process of its own, twice; the second start needs no corpus that can be parsed, only its bytes."""
    (tmp_path / "c.jsonl").write_text('{"contents": "Peru\\nThe capital is Lima."}\n')
    made = []
    for _ in range(2):
        with program(tmp_path, f"--index={tmp_path / 'index'}") as (line, address):
            assert line.startswith("1 passages at http://127.0.0.1:")
            assert retrieve(address, queries=["lima"]) == [[{"contents": "Peru\nThe capital is Lima."}]]
        made.append((tmp_path / "index" / "about.json").stat().st_mtime_ns)
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--search=hybrid"], "error: --search=hybrid needs --vectors."),
        (["--vectors=v.npy"], "error: --search=hybrid needs --embeddings."),
        (
            ["--search=dense", "--vectors=v.npy", "--embeddings=http://x/v1"],
            "error: --search=dense needs --embeddings_model.",
        ),
        (["--search=bm25", "--vectors=v.npy"], "error: --vectors has no use with --search=bm25"),
        (["--query_prefix=query: "], "error: --query_prefix has no use with --search=bm25"),
        (
            ["--vectors=none.npy", "--embeddings=http://x/v1", "--embeddings_model=m"],
            "error: --vectors is 'none.npy', which cannot be read",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(tmp_path, arguments, says):
    (tmp_path / "c.jsonl").write_text('{"contents": "lima"}')
    command = [sys.executable, str(ROOT / "launch" / "retrieval_server.py"), "--port=0", "--corpus=c.jsonl", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr.startswith(says) and len(ended.stderr.splitlines()) == 1
