"""A judge on this machine that is late, full, broken or talks garbage, and scoring on threads."""

import contextlib
import dataclasses
import http.server
import json
import threading
import time

import numpy as np
import pytest

from tapo_jax.config import UserError
from tapo_jax.rewards.judge import Judge, Settings
from tapo_jax.rewards.judged import JudgedScore, Scored
from tapo_jax.rewards.pool import ScorePool, ScoreStream
from tapo_jax.types import Episode, Images, Prompt

PROMPT = Prompt("q", "Which city?", (np.zeros((4, 4, 3), np.uint8),), ("Lima", "Ciudad de los Reyes"))


@contextlib.contextmanager
def served(replies, delay_s=0.0):
    """An endpoint: `replies(n, body)` is (status, headers, text) of its n-th request, or None to hang up."""
    bodies, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                bodies.append(body)
                number = len(bodies) - 1
            time.sleep(delay_s)
            reply = replies(number, body)
            if reply is None:
                self.close_connection = True
                return
            status, headers, text = reply
            self.send_response(status)
            for name, value in headers.items() | {"Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()


def said(word):
    return 200, {}, json.dumps({"choices": [{"message": {"content": f"<judge>{word}</judge>"}}]})


def judge(url, **fields):
    return Judge(Settings(url, "m", **({"key_variable": "", "backoff_s": 0.01} | fields)))


def test_every_accepted_answer_is_asked_about_with_the_image():
    with served(lambda n, body: said("Yes" if n == 1 else "No")) as (url, bodies):
        assert judge(url)(PROMPT, "City of Kings").right is True
    assert len(bodies) == 2
    shown, text = bodies[0]["messages"][1]["content"]
    assert shown["image_url"]["url"].startswith("data:image/jpeg;base64,") and "Lima" in text["text"]


@pytest.mark.parametrize("fault", [(429, {"Retry-After": "0"}, ""), (500, {}, "x"), (200, {}, "garbage"), None,
                                   (200, {}, '{"choices": []}'), (200, {}, "[]")])  # fmt: skip
def test_a_fault_is_tried_again_and_is_never_a_wrong_answer(fault):
    with served(lambda n, body: fault if n < 2 else said("Yes")) as (url, _):
        assert judge(url)(PROMPT, "x").right is True
    with served(lambda n, body: fault) as (url, _):
        assert judge(url, retries=1)(PROMPT, "x").right is None


def test_a_refusal_is_not_tried_again():
    with served(lambda n, body: (401, {}, "")) as (url, bodies):
        assert judge(url)(PROMPT, "x").right is None
    assert len(bodies) == len(PROMPT.answers)


def test_too_many_failures_stop_with_a_sentence():
    with served(lambda n, body: (500, {}, "")) as (url, _):
        failing = judge(url, retries=0, min_judged=2)
        failing(PROMPT, "x")
        with pytest.raises(UserError, match="2 of 2 judgements failed"):
            failing(PROMPT, "x")


def test_verdicts_are_kept_on_disk_by_all_that_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-planted")
    keep = {"cache": str(tmp_path / "c.sqlite"), "key_variable": "JUDGE_API_KEY"}
    with served(lambda n, body: said("No")) as (url, bodies):
        for answer, asked in (("x", 2), ("x", 2), ("y", 4)):
            one = judge(url, **keep)
            assert one(PROMPT, answer).right is False
            one.close()
            assert len(bodies) == asked
    assert all(b"sk-planted" not in file.read_bytes() for file in tmp_path.iterdir())


def test_a_key_that_is_not_set_is_a_sentence(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_API_KEY"):
        Judge(Settings("http://127.0.0.1:1/v1", "m"))
    monkeypatch.setenv("JUDGE_API_KEY", "sk-\u2026planted")
    with pytest.raises(UserError, match="JUDGE_API_KEY has characters that no key has") as caught:
        Judge(Settings("http://127.0.0.1:1/v1", "m"))
    assert "planted" not in str(caught.value)


def test_a_closed_judge_holds_no_connection_and_no_file(tmp_path):
    with served(lambda n, body: said("Yes")) as (url, _):
        one = judge(url, cache=str(tmp_path / "c.sqlite"))
        assert one(PROMPT, "x").right is True
        one.close()
        one.close()
        assert one._client.is_closed
        with pytest.raises(UserError, match=r"cache .*c\.sqlite cannot be used .*closed database"):
            one(PROMPT, "x")


def test_the_images_of_a_question_are_decoded_once_for_its_group():
    decoded = []

    def picture():
        decoded.append(1)
        return np.zeros((4, 4, 3), np.uint8)

    shown = dataclasses.replace(PROMPT, images=Images([picture]), answers=("Lima",))
    with served(lambda n, body: said("Yes")) as (url, bodies):
        one = judge(url)
        for answer in ("x", "y", "z"):
            assert one(shown, answer).right is True
        assert one(dataclasses.replace(shown, images=Images([picture])), "x").right is True
    assert len(bodies) == 4 and len(decoded) == 2
    assert len({json.dumps(body["messages"][1]["content"][0]) for body in bodies}) == 1


@pytest.mark.parametrize("kind", ["a folder", "another kind of file"])
def test_a_cache_that_cannot_be_used_is_a_sentence(tmp_path, kind):
    cache = tmp_path / "c.sqlite"
    if kind == "a folder":
        cache.mkdir()
    else:
        cache.write_bytes(b"x" * 4096)
    with pytest.raises(UserError, match=r"cache .*c\.sqlite cannot be used .*give another file"):
        judge("http://127.0.0.1:1", cache=str(cache))


def test_when_too_many_have_failed_the_others_do_not_ask_again():
    """Seven wait ten seconds or more before they would ask again; the eighth may not ask again, and ends the run."""

    def replies(number, body):
        last = body["messages"][1]["content"][-1]["text"].endswith("Response: 7")
        return (400, {}, "") if last else (500, {"Retry-After": "30"}, "")

    with served(replies) as (url, _):
        one = judge(url, min_judged=1)
        pool = ScorePool(lambda e: {"accuracy": float(one(e.prompt, e.answer).right is True)}, 8)
        episodes = [episode(number) for number in range(8)]
        for given in episodes[:7]:
            pool.submit(given)
        time.sleep(0.5)
        began = time.perf_counter()
        with pytest.raises(UserError, match="judgements failed"):
            pool.wait(episodes)
        pool.close()
        one.close()
    assert time.perf_counter() - began < 8


def episode(number):
    nothing = np.zeros(0, np.float32)
    prompt = Prompt(str(number), "?", (), ("Lima",))
    return Episode(
        prompt, 0, nothing.astype(np.int32), nothing.astype(bool), nothing, [], [], [], str(number), "answer"
    )


def judged_in(count, delay_s):
    """-> seconds from the end of the last episode to all rewards."""
    episodes = [episode(i) for i in range(count)]
    with served(lambda n, body: said("Yes"), delay_s) as (url, _):
        one = judge(url, concurrency=64)
        pool = ScorePool(lambda e: {"accuracy": float(one(e.prompt, e.answer).right), "n": float(e.answer)}, 64)
        for given in episodes:
            pool.submit(given)
        pool.wait(episodes)
        pool.close()
    assert [e.rewards for e in episodes] == [{"accuracy": 1.0, "n": float(i)} for i in range(count)]
    return pool.waited_s


def test_64_verdicts_of_a_fifth_of_a_second_add_less_than_a_second():
    assert judged_in(64, 0.2) < 1.0


@pytest.mark.nightly
def test_1024_verdicts_of_a_second_take_less_than_25_seconds():
    assert judged_in(1024, 1.0) < 25.0


def test_what_a_scorer_raises_reaches_the_caller():
    def broken(episode):
        raise UserError("stop")

    pool = ScorePool(broken, 2)
    with pytest.raises(UserError, match="stop"):
        pool.wait([episode(0)])
    pool.close()


def test_only_what_fails_exact_match_is_judged_and_a_failure_is_marked():
    def ended(answer):
        return dataclasses.replace(episode(0), answer=answer)

    with served(lambda n, body: said("Yes") if n == 0 else (500, {}, "")) as (url, bodies):
        score = JudgedScore(judge(url, retries=0))
        exact, right, failed = score(ended("Lima")), score(ended("the capital")), score(ended("x"))
    assert len(bodies) == 2
    assert (exact.rewards["accuracy"], exact.judged, exact.rewards["published"]) == (1.0, True, 1.0)
    assert (right.rewards["accuracy"], right.rewards["exact_match"], right.judged) == (1.0, 0.0, True)
    assert (failed.rewards["accuracy"], failed.judged) == (0.0, False)


def test_a_stream_of_scores_passes_on_each_episode_once_and_waits_for_a_slow_scorer():
    """Two threads: at most two episodes are scored and two wait; the fifth waits for room."""
    running, most, lock, passed = 0, 0, threading.Lock(), []

    def score(given):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return Scored({"accuracy": 1.0}, judged=given.answer != "3", word=f"said of {given.answer}")

    stream = ScoreStream(score, 2, lambda index, episode: passed.append((index, episode)))
    ahead = 0
    for index in range(9):
        stream.submit(index, episode(index))
        ahead = max(ahead, index + 1 - len(passed))
    stream.finish()
    assert sorted(index for index, _ in passed) == list(range(9)) and most == 2 and ahead <= 5
    assert all(one.word == f"said of {index}" and one.judged == (index != 3) for index, one in passed)


def test_after_the_error_of_a_scorer_a_stream_drops_episodes_and_says_so():
    def score(episode):
        raise UserError("judgements failed")

    stream = ScoreStream(score, 1, lambda index, episode: pytest.fail("it was passed on"))
    stream.submit(0, episode(0))
    time.sleep(0.2)
    stream.submit(1, episode(1))
    assert stream.failed
    with pytest.raises(UserError, match="judgements failed"):
        stream.finish()
    stream.close()
