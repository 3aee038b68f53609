"""Tools of MCP servers: found, called, lost and found again, closed; in a run of three steps."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from tapo_jax import records
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.rollout import episode
from tapo_jax.rollout.chat import ParsedTurn
from tapo_jax.tools import ToolRunner
from tapo_jax.tools.base import stop
from tapo_jax.tools.mcp_file import read_servers
from tapo_jax.tools.mcp_tools import mcp_tools
from tapo_jax.train import train
from tapo_jax.types import ToolCall

SERVER = {"command": sys.executable, "args": [str(Path(__file__).with_name("mcp_server.py"))]}
KEY = "sesame-open-4711"


def write(path: Path, **servers) -> str:
    file = path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    return str(file)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Session:
    """A runner over the tools of a file, and what calls of it say."""

    def __init__(self, file: str, timeout_s: float = 60.0):
        self.tools = mcp_tools(file, timeout_s=timeout_s)
        self.runner = ToolRunner(self.tools, workers=4, timeout_s=timeout_s, retries=1)

    def __call__(self, tool: str, *, of: str | None = None, **arguments):
        return self.runner.run(ToolCall(tool, arguments), [], None, of)[1]

    def close(self) -> None:
        self.runner.close()
        stop(self.tools)


@contextlib.contextmanager
def session(*args, **settings):
    made = Session(*args, **settings)
    try:
        yield made
    finally:
        made.close()


def test_a_server_on_stdio_is_called_lost_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURES_TOKEN", KEY)
    file = write(tmp_path, pictures=SERVER | {"env": {"PICTURES_KEY": "${PICTURES_TOKEN}"}})
    with session(file) as call:
        assert [tool.name for tool in call.tools] == ["find_pictures", "count", "crash", "say_key", "fail", "sleep"]
        assert call.runner.schemas[0]["function"]["description"] == "Find pictures of what the query says."
        found = call("find_pictures", query="tower", n=2)
        assert [part if isinstance(part, str) else part.pixels[0, 0, 0] for part in found.parts] == [
            "Title 1: tower", 5, "Title 2: tower", 6,
        ]  # fmt: skip
        assert found.images[0].pixels.shape == (16, 16, 3) and found.error is None
        pid, first = map(int, call("count").text.split())
        assert (first, call("count").text) == (1, f"{pid} 2")  # no cache: it remembers
        assert call("fail").error == "tool_error" and call("count").text == f"{pid} 3"
        assert call("say_key").text == "the key is ${PICTURES_TOKEN}"  # as it is written in the file
        assert call("find_pictures", n=1).error == "bad_arguments"
        for _ in range(2):
            lost = call("crash")
            assert lost.error == "service" and "its server was lost" in lost.text
        again, number = map(int, call("count").text.split())
        assert again != pid and number == 1 and not runs(pid)
        futures = [call.runner.submit(ToolCall("count", {}), []) for _ in range(16)]
        assert sorted(int(future.result()[1].text.split()[1]) for future in futures) == list(range(2, 18))
    assert not runs(again)
    assert call("count").text == "Error: count failed: its server is stopped."


def test_a_late_call_is_a_timeout_and_the_next_is_answered(tmp_path):
    with session(write(tmp_path, pictures=SERVER), timeout_s=2.0) as call:
        pid = call("count").text.split()[0]
        late = call("sleep", seconds=4)
        assert late.error == "timeout" and late.text == "Error: sleep gave no result in 1.8 seconds."
        time.sleep(2.5)
        assert call("count").text == f"{pid} 2"


def test_a_server_of_an_episode_remembers_that_episode_alone(tmp_path):
    with session(write(tmp_path, pictures=SERVER | {"per_episode": True, "tools": ["count"]})) as call:
        assert list(call.runner.tools) == ["count"]
        pids = {}
        for name, number in (("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3)):
            pid, found = map(int, call("count", of=name).text.split())
            assert found == number and pids.setdefault(name, pid) == pid
        assert pids["a"] != pids["b"]
        call.runner.end("a")
        deadline = time.monotonic() + 30
        while runs(pids["a"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not runs(pids["a"]) and runs(pids["b"])
        assert call("count", of="c").text.split()[1] == "1"
    assert not runs(pids["b"])


def serve(port: int) -> subprocess.Popen:
    process = subprocess.Popen([*[SERVER["command"], *SERVER["args"]], str(port)], stderr=subprocess.DEVNULL)
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        time.sleep(0.1)
    process.kill()
    raise TimeoutError("the server does not listen")


def test_a_server_at_an_address_is_called_lost_and_found_again(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = serve(port)
    try:
        file = write(tmp_path, pictures={"url": f"http://127.0.0.1:{port}/mcp", "headers": {"X-Name": "x"}})
        with session(file) as call:
            assert call("find_pictures", query="tower").images[0].pixels[0, 0, 0] == 5
            assert call("count").text.split()[1] == "1"
            process.kill()
            process.wait()
            assert call("count").error == "service"
            process = serve(port)
            call("count")  # may still be of the lost connection
            assert call("count").error is None
    finally:
        process.kill()
        process.wait()
    before = threading.active_count()
    with pytest.raises(UserError, match=r"The MCP server 'pictures' did not start \((Connect|Read)Error"):
        mcp_tools(file, timeout_s=5)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("servers", "sentence"),
    [
        ("nothing", "has no servers"),
        ({}, "has no servers"),
        ({"a": {}}, "'a' of tools.mcp .* has neither a command and a url"),
        ({"a": {"command": "x", "url": "http://y"}}, "has both a command and a url"),
        ({"a": {"command": ["x"]}}, "has command .* it must be a text"),
        ({"a": {"command": "x", "args": "y"}}, "it must be a list of texts"),
        ({"a": {"command": "x", "env": {"K": "${NO_SUCH_VARIABLE_1}"}}}, "NO_SUCH_VARIABLE_1 is not set: set it"),
        ({"a": {"url": "file:///etc/passwd"}}, "no http:// or https:// address"),
        ({"a": {"type": "sse", "url": "http://x"}}, "speaks SSE, which is not supported"),
        ({"a": {"command": "x", "disabled": True}}, "every server is disabled"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, servers, sentence):
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    with pytest.raises(UserError, match=sentence):
        read_servers(file)


def test_a_server_that_does_not_start_is_one_sentence_without_its_key(tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURES_TOKEN", KEY)
    ends = {
        "command": sys.executable,
        "args": ["-c", "import sys; sys.exit('no: ' + sys.argv[1])", "${PICTURES_TOKEN}"],
    }
    with pytest.raises(UserError, match=r"'ends' did not start \(no: \$\{PICTURES_TOKEN\}; ") as found:
        mcp_tools(write(tmp_path, ends=ends), timeout_s=5)
    assert KEY not in str(found.value)
    with pytest.raises(UserError, match=r"'none' did not start \(FileNotFoundError"):
        mcp_tools(write(tmp_path, none={"command": "no_such_command_4711"}), timeout_s=5)
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        mcp_tools(tmp_path / "damaged.json", timeout_s=5)


def test_the_token_and_the_variables_are_filled_in_and_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURES_TOKEN", KEY)
    made = read_servers(
        write(tmp_path, a={"url": "https://x/mcp?k=${PICTURES_TOKEN}", "auth_token": "${PICTURES_TOKEN}"})
    )
    assert made[0].headers == {"Authorization": f"Bearer {KEY}"} and made[0].url.endswith(KEY)
    assert KEY not in repr(made) and made[0].hide(f"at {made[0].url}") == "at https://x/mcp?k=${PICTURES_TOKEN}"


def read_turn(text: str) -> ParsedTurn:
    """The text's hash decides: 6 of 32 search, 8 count, 3 ask for the key, 3 end the server, 12 answer. Process numbers
    are among the results, so no two runs play the same."""
    kind, rest = zlib.crc32(text.encode()) % 32, zlib.crc32(text.encode()) // 32
    if kind < 6:
        return ParsedTurn(call=ToolCall("find_pictures", {"query": ("tower", "bridge")[rest % 2]}))
    if kind < 14:
        return ParsedTurn(call=ToolCall("count", {}))
    if kind < 17:
        return ParsedTurn(call=ToolCall("say_key", {}))
    return ParsedTurn(call=ToolCall("crash", {})) if kind < 20 else ParsedTurn(answer="x")


def run(workdir: str, model: str, file: str) -> None:
    """Train three steps with the tools of a file, on one device."""
    tools = sources.tools
    tiny_run.patch(setattr)
    sources.tools, episode.parse_turn = tools, read_turn
    config = tiny_run.config(Path(model), total_steps=3, log__episodes_every=1)
    config.tools.update(source="mcp", mcp=file, timeout_s=60.0, names=("find_pictures", "count", "crash", "say_key"))
    config.rollout.max_length = 200
    config.eval.update(at_start=False, at_end=False)
    train(config, workdir)


def test_three_steps_with_pictures_a_counter_and_crashes(tmp_path):
    """In a process of its own, so that it has one device and its end shows what is left running."""
    file = write(tmp_path, pictures=SERVER | {"env": {"PICTURES_KEY": "${PICTURES_TOKEN}"}})
    model = tiny_run.write_model(tmp_path / "model")
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PICTURES_TOKEN": KEY}
    command = [sys.executable, __file__, str(tmp_path / "run"), str(model), file]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert KEY not in done.stdout + done.stderr
    steps = [line for line in records.read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] > 0]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(np.isfinite(line["loss/policy"]) for line in steps)
    for name in ("find_pictures", "count", "crash", "say_key"):
        assert sum(line[f"tools/calls/{name}"] for line in steps) > 0, name
    played = [e for n in (1, 2, 3) for e in records.load(tmp_path / "run" / "episodes" / f"step_{n:06d}.npz")]
    turns = [turn for e in played for turn in e.turns if turn.result]
    pictures = [turn for turn in turns if turn.call_name == "find_pictures" and turn.error is None]
    assert all(turn.result.startswith("Title 1: ") and turn.slot >= 0 for turn in pictures)
    assert any(turn.result_images for turn in pictures)
    counts = [turn.result.split() for turn in turns if turn.call_name == "count" and turn.error is None]
    assert max(int(number) for _, number in counts) > 1
    crashed = [turn for turn in turns if turn.call_name == "crash"]
    assert crashed and all(turn.error == "service" and turn.slot == -1 for turn in crashed)
    pids = {int(pid) for pid, _ in counts}
    assert len(pids) > 1 and not any(runs(pid) for pid in pids)
    assert any(turn.result == "the key is ${PICTURES_TOKEN}" for turn in turns)
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert kept and not any(KEY.encode() in path.read_bytes() for path in kept)


if __name__ == "__main__":
    run(*sys.argv[1:])
