"""The client of search services, against services that fail in every way that has been seen."""

import concurrent.futures
import json
import threading
import time

import httpx
import pytest

from tapo_jax.config import UserError
from tapo_jax.tools import backends, patience
from tapo_jax.tools.backends import passages_of
from tapo_jax.tools.base import BadCall, ToolRunner
from tapo_jax.tools.http_client import Client, retry_after
from tapo_jax.tools.patience import Joined, Pace, Patience
from tapo_jax.tools.remote_search import RemoteTextSearch, folded, tidy
from tapo_jax.types import ToolCall

GOOD = {"result": [[{"document": {"contents": "Peru\nLima."}, "score": 1.0}]]}


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, which take no time."""
    found, sleep, mine = [], time.sleep, threading.get_ident()
    # Threads that earlier tests have left may sleep too.
    monkeypatch.setattr(
        patience.time, "sleep", lambda s: found.append(s) if threading.get_ident() == mine else sleep(s)
    )
    return found


def client(handler, *, timeout_s=5.0, retries=2, **more):
    """A client whose requests go to a function."""
    made = Client("http://search", Patience(timeout_s, retries), **more)
    made._http = httpx.Client(
        transport=httpx.MockTransport(handler), base_url=made.endpoint, headers=made._http.headers, verify=False
    )
    return made


def replies(*answers):
    """A service that gives these answers, one after another: statuses, exceptions, or replies."""
    waiting = list(answers)

    def handler(request):
        answer = waiting.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer) if isinstance(answer, int) else answer

    return handler


def reply_of(data):
    """A reply that is not read yet, as from a network."""
    return httpx.Response(200, stream=httpx.ByteStream(data))


def good():
    return reply_of(json.dumps(GOOD).encode())


@pytest.mark.parametrize("first", [408, 429, 500, 503, httpx.ConnectError("no"), httpx.RemoteProtocolError("gone")])
def test_what_may_pass_is_tried_again(first, waits):
    assert client(replies(first, first, good())).post("/retrieve", {}) == (GOOD, 2)
    assert 0.125 <= waits[0] <= 0.25 and 0.25 <= waits[1] <= 0.5  # exponential, with jitter


@pytest.mark.parametrize(
    ("answers", "kind", "says"),
    [
        ((500, 500, 500), "service", "status 500"),
        ((400,), "service", "status 400"),
        ((302,), "service", "status 302"),
        ((httpx.ConnectError("key=SECRET"),) * 3, "service", r"cannot be reached \(ConnectError\)"),
        ((httpx.ReadTimeout("slow"),), "timeout", "no result in 5 seconds"),
        ((httpx.ConnectTimeout("slow"),), "timeout", "no result in 5 seconds"),
        ((httpx.PoolTimeout("slow"),), "timeout", "no result in 5 seconds"),
        ((reply_of(b"<html>"),), "service", "no JSON"),
        ((reply_of(b"\xff\xfe\x00"),), "service", "no JSON"),
        ((reply_of(b"[" * 100_000),), "service", "no JSON"),
        (
            (httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"")),),
            "service",
            "compr",
        ),
        ((httpx.Response(429, headers={"retry-after": "60"}),), "service", "status 429"),  # later than there is time
    ],
)
def test_one_event_has_one_name(answers, kind, says, waits):
    with pytest.raises(BadCall, match=says) as caught:
        client(replies(*answers)).post("/retrieve", {})
    assert caught.value.kind == kind and "SECRET" not in str(caught.value)


def test_retry_after_is_waited_for(waits):
    busy = httpx.Response(429, headers={"retry-after": "3"})
    assert client(replies(busy, good())).post("/retrieve", {}) == (GOOD, 1)
    assert waits == [3.0]
    assert retry_after("nan") == retry_after("soon") == retry_after("") == retry_after("-5") == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 < retry_after("Wed, 21 Oct 2099 07:28:00 GMT")


def test_a_reply_of_200_mb_is_not_read():
    sent = []

    def pieces():
        for _ in range(200):
            sent.append(1)
            yield b"x" * (1 << 20)

    with pytest.raises(BadCall, match="more than 8192 KiB"):
        client(lambda request: httpx.Response(200, content=pieces())).post("/retrieve", {})
    assert len(sent) <= 10


def test_a_reply_that_trickles_ends_at_the_time_limit():
    def pieces():
        while True:
            time.sleep(0.02)
            yield b" "

    start = time.monotonic()
    with pytest.raises(BadCall) as caught:
        client(lambda request: httpx.Response(200, content=pieces()), timeout_s=0.3).post("/retrieve", {})
    assert caught.value.kind == "timeout" and time.monotonic() - start < 5


def test_equal_calls_at_one_time_are_one_call():
    started, go, calls, joined = threading.Event(), threading.Event(), [], Joined()

    def call():
        calls.append(1)
        started.set()
        assert go.wait(10)
        return "found"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(joined, "key", call)
        assert started.wait(10)
        others = [pool.submit(joined, "key", call) for _ in range(7)]
        time.sleep(0.1)
        go.set()
        assert first.result(10) == ("found", False)
        assert [other.result(10) for other in others] == [("found", True)] * 7
    assert len(calls) == 1
    assert joined("key", call) == ("found", False) and len(calls) == 2  # nothing is kept


def test_a_failure_is_that_of_all_who_joined():
    started, go, joined = threading.Event(), threading.Event(), Joined()

    def call():
        started.set()
        assert go.wait(10)
        raise BadCall("service", "no")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(joined, "key", call)]
        assert started.wait(10)
        calls.append(pool.submit(joined, "key", call))
        time.sleep(0.1)
        go.set()
        assert [str(one.exception(10)) for one in calls] == ["no", "no"]


def test_requests_come_no_faster_than_the_limit(waits):
    pace = Pace(4.0)
    for _ in range(4):
        pace.wait(time.monotonic() + 100)
    assert waits == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.1)
    with pytest.raises(TimeoutError):  # its turn would come after its time: at once, and it takes no turn
        pace.wait(time.monotonic() + 0.5)
    Pace(0.0).wait(0.0)
    assert len(waits) == 4
    late = client(replies(good()))
    late._patience = Patience(0.5, 0, pace)
    with pytest.raises(BadCall) as caught:
        late.post("/retrieve", {})
    assert caught.value.kind == "timeout"


def test_a_key_is_sent_and_told_to_nobody(monkeypatch):
    seen = []

    def handler(request):
        seen.append(request.headers["authorization"])
        return httpx.Response(500)

    with pytest.raises(BadCall) as caught:
        client(handler, retries=0, headers={"Authorization": "Bearer PLANTED"}).post("/retrieve", {})
    assert seen == ["Bearer PLANTED"] and "PLANTED" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["host:8000", "ftp://host", "http://", "http://u:SECRET@host", "http://h?q=1", "x\n"]
)
def test_a_wrong_address_is_one_sentence(endpoint):
    with pytest.raises(UserError, match=r"tools\.endpoint") as caught:
        Client(endpoint, Patience(1.0))
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (GOOD, ["Peru\nLima."]),
        ({"result": []}, []),
        ({"result": [[]]}, []),
        ({"result": [[{"contents": "bare"}]]}, ["bare"]),
        ({"result": [{"contents": "flat"}, {"contents": "too"}]}, ["flat", "too"]),
        ({"result": [["text"]]}, ["text"]),
        ({"result": [[{"title": "T", "text": "x"}, {"text": "y"}]]}, ["T\nx", "y"]),
        ({"result": [[{"document": {"contents": None}}, {"contents": "kept"}]]}, ["kept"]),
        ({"result": [[{"document": {"contents": None, "title": "T", "text": "x"}}]]}, ["T\nx"]),
        ({"result": [["half \ud83d"]]}, ["half ?"]),
    ],
)
def test_replies_that_are_understood(reply, found):
    assert passages_of(reply) == found


@pytest.mark.parametrize(
    "reply",
    [
        *({}, [], None, 5, "x", {"result": None}, {"result": {}}, {"result": [[], []]}, {"error": "x"}),
        {"result": [[{"document": {"contents": None}}]]},
        {"result": [[None, 3, {"document": 5}, {"contents": " "}, {}]]},
    ],
)
def test_other_replies_are_an_observation(reply):
    search = RemoteTextSearch("http://search", top_k=3, budget=100, timeout_s=5)
    made = client(lambda request: reply_of(json.dumps(reply).encode()))
    search._search = backends.posted(backends.BACKENDS["search-r1"], made, {})
    _, result = ToolRunner([search], workers=1, timeout_s=5, retries=1).run(
        ToolCall("text_search_tool", {"query": "x"}), []
    )
    assert result.error == "service" and result.text.startswith("Error: The search service sent")


def test_spellings_of_a_query_are_one_and_the_service_sees_that_of_the_policy():
    spellings = [" Chad:  capital\n", "chad: capital", "CHAD:\tCAPITAL"]
    assert {folded(tidy(query)) for query in spellings} == {"chad: capital"}
    assert [tidy(query) for query in spellings] == ["Chad: capital", "chad: capital", "CHAD: CAPITAL"]
    assert folded("cafe\u0301") == folded("CAF\u00c9") == "caf\u00e9" and tidy("\ud83d") == "?"
