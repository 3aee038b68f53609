"""Pages of the web: what is read, and what nobody can be made to read."""

import socket
import ssl
import threading
import time

import httpcore
import pytest
from test_backends import served

from configs import tapo_grpo
from tapo_jax.config import UserError
from tapo_jax.data import sources
from tapo_jax.tools import page_reader, visit
from tapo_jax.tools.base import BadCall, ToolRunner
from tapo_jax.tools.page_reader import Page, normal_url, public, read_page
from tapo_jax.tools.search_store import Kept
from tapo_jax.tools.visit import Visit
from tapo_jax.types import Identity, ToolCall

pytest.importorskip("trafilatura", reason="needs the extra [web]")

PUBLIC = "93.184.216.34"
HTML = """<html><head><title>Lima</title><style>.x{}</style></head><body><nav>Home About Login</nav><article>
<h1>Lima</h1><p>Lima is the capital of Peru, and its largest city, on the coast of the Pacific.</p>
<p>It was founded in 1535 and has about ten million people in its metropolitan area.</p></article>
<script>alert(1)</script></body></html>"""


class Web:
    """The internet as a test needs it: names with addresses, and one public address that is a server here."""

    def __init__(self, url, names):
        self.port, self.names, self.resolved, self.connected = int(url.rpartition(":")[2]), names, [], []

    def resolve(self, host, port, **_):
        self.resolved.append(host)
        if host not in self.names:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        found = self.names[host]
        addresses = found.pop(0) if found and isinstance(found[0], list) else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def connect(self, address, port, timeout=None):
        self.connected.append((address, port))
        assert address == PUBLIC
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self.port, timeout)

    def read(self, url, timeout_s):
        return read_page(url, timeout_s, resolve=self.resolve, connect=self.connect)


def run(web, url, *, budget=1000, timeout_s=10, **more):
    tool = Visit(budget=budget, timeout_s=timeout_s, read=web.read, **more)
    return ToolRunner([tool], workers=1, timeout_s=30, retries=0).run(ToolCall("visit", {"url": url}), [])


def page(data=HTML, kind="text/html; charset=utf-8", status=200, **headers):
    return lambda *_: (status, {"Content-Type": kind, **headers}, data if isinstance(data, bytes) else data.encode())


def test_a_page_is_its_title_and_main_text():
    with served(page()) as (url, requests):
        web = Web(url, {"example.org": [PUBLIC]})
        call, result = run(web, "HTTP://Example.org:80/lima#history")
    assert result.error is None and result.origin.service == "visit" and result.origin.source == "live"
    assert result.text.startswith("Lima") and "founded in 1535" in result.text
    assert "alert" not in result.text and "Login" not in result.text
    path, headers, _ = requests[0]
    assert path == "/lima" and headers["Host"] == "example.org" and headers["Accept-Encoding"] == "identity"
    assert web.connected == [(PUBLIC, 80)] and web.resolved == ["example.org"]
    assert call.parameters == (Identity('"http://example.org/lima"'),)
    assert call.arguments == {"url": "HTTP://Example.org:80/lima#history"}


def test_text_is_cut_and_says_so():
    with served(page("word " * 100, "text/plain")) as (url, _):
        web = Web(url, {"example.org": [PUBLIC]})
        assert run(web, "http://example.org", budget=20)[1].text == (
            "word word word word \n[Cut: 20 of 499 characters are shown.]"
        )
        assert run(web, "http://example.org", budget=499)[1].text == "word " * 99 + "word"


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        ("text/plain; charset=latin-1", "caf\xe9".encode("latin-1"), "café"),
        ("text/plain; charset=nonsense", "café".encode(), "café"),
        ("application/json", b'{"a": 1}', '{"a": 1}'),
        ("text/html", b"<html><title>T</title><body><p>Just this line.</p></body></html>", "T\nJust this line."),
        ("text/plain", b"\xff\x00", "\ufffd\x00"),
    ],
)
def test_types_that_are_read(kind, data, text):
    with served(page(data, kind)) as (url, _):
        assert run(Web(url, {"a.org": [PUBLIC]}), "http://a.org/")[1].text == text


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (page("%PDF", "application/pdf"), "no text but application/pdf"),
        (page("x", "image/png<script>"), "no text but image/pngscript"),
        (page("x", **{"Content-Encoding": "gzip"}), "compressed"),
        (page("x", status=404), "status 404"),
        (page("x", status=500), "status 500"),
        (page(" ", "text/plain"), "has no text"),
        (page(""), "has no text"),
        (page(b"x" * (page_reader.MAX_PAGE + 1), "text/plain"), "more than 2048 KiB"),
        (page(status=302, Location="/again"), "redirects more than 5 times"),
        (page(status=302, Location="http://a:port/"), "redirects to what is no URL"),
        (page(status=302, Location="file:///etc/passwd"), "must begin with http"),
        (page(status=302, Location="http://u:p@example.org/"), "user name"),
        (page(status=302, Location="http://example.org:22/"), "port 22"),
    ],
)
def test_a_page_that_cannot_be_read_is_an_observation(reply, says):
    with served(reply) as (url, requests):
        _, result = run(Web(url, {"example.org": [PUBLIC]}), "http://example.org/")
    assert result.error in ("page", "bad_url") and says in result.text
    assert len(requests) == (6 if "5 times" in says else 1)


INSIDE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "192.0.0.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1", "2002:7f00:1::1", "2002:a9fe:a9fe::", "2001:0:4136:e378:8000:63bf:f5ff:fffe", "fe80::1",
    "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "no address",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_that_are_not_of_the_public_internet(address):
    assert not public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_public_internet(address):
    assert public(address)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "http://127.0.0.1:8080/x", "http://localhost/", "http://LOCALHOST/", "http://127.1/"),
        *("http://2130706433/", "http://0x7f.1/", "http://0x7f000001/", "http://017700000001/"),
        *("http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[0:0:0:0:0:ffff:7f00:1]/", "http://[fe80::1]/"),
        *("http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "https://192.168.0.1/"),
    ],
)
def test_this_machine_and_its_network_are_refused_in_every_spelling(url):
    """By the real resolver. Nothing is connected to."""

    def connect(*_, **__):
        raise AssertionError("connected")

    tool = Visit(budget=100, timeout_s=5, read=lambda to, timeout_s: read_page(to, timeout_s, connect=connect))
    _, result = ToolRunner([tool], workers=1, timeout_s=20, retries=0).run(ToolCall("visit", {"url": url}), [])
    assert (result.error, result.text) == (
        "address",
        "Error: This host is not on the public internet, and is not visited.",
    )


def test_the_tool_as_it_ships_refuses_a_server_of_this_machine():
    with served(page()) as (url, requests):
        port = int(url.rpartition(":")[2])
        tool = Visit(budget=100, timeout_s=5)
        page_reader_ports = page_reader.PORTS["http"]
        page_reader.PORTS["http"] = (80, port)
        try:
            for address in (url, f"http://localhost:{port}/", f"http://0x7f.1:{port}/"):
                with pytest.raises(BadCall, match="not on the public internet"):
                    tool({"url": address}, [])
        finally:
            page_reader.PORTS["http"] = page_reader_ports
    assert requests == []


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/", "http://inner.example.org/", "//169.254.169.254/", "http://[::1]"]
)
def test_a_redirect_into_the_network_is_refused(target):
    with served(page(status=302, Location=target)) as (url, requests):
        web = Web(url, {"example.org": [PUBLIC], "inner.example.org": ["10.0.0.8"]})
        _, result = run(web, "http://example.org/")
    assert result.error == "address" and len(requests) == 1 and len(web.connected) == 1


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1", PUBLIC], []])
def test_a_name_that_resolves_into_the_network_is_refused(addresses):
    with served(page()) as (url, requests):
        web = Web(url, {"evil.example.org": addresses})
        _, result = run(web, "http://evil.example.org/")
    assert result.error == "address" and requests == [] and web.connected == []


def test_a_name_cannot_change_between_the_check_and_the_connection():
    """The second resolution would be this machine: there is none. A redirect to the same name resolves and fails."""
    with served(page()) as (url, requests):
        web = Web(url, {"rebind.example.org": [[PUBLIC], ["127.0.0.1"]]})
        assert run(web, "http://rebind.example.org/")[1].error is None
        assert web.resolved == ["rebind.example.org"] and web.connected == [(PUBLIC, 80)] and len(requests) == 1
    with served(page(status=301, Location="/next")) as (url, requests):
        web = Web(url, {"rebind.example.org": [[PUBLIC], ["127.0.0.1"]]})
        _, result = run(web, "http://rebind.example.org/")
    assert result.error == "address" and len(requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("example.org/x", "ftp://example.org/", "file:///etc/passwd", "javascript:alert(1)", "gopher://a/", "//a.org"),
        *("http://", "http:///x", "http://user:pass@example.org/", "http://user@example.org", "", " ", "http://a\nb/"),
        *("http://example.org:22/", "https://example.org:80/", "http://\ud83d/", "http://①②⑦.⓪.⓪.①/"),
        "http://example.org/" + "x" * 3000,
    ],
)
def test_what_is_no_address_of_a_page_is_no_step_and_asks_nobody(url):
    def read(*_):
        raise AssertionError("read")

    tool = Visit(budget=100, timeout_s=5, read=read)
    call, result = ToolRunner([tool], workers=1, timeout_s=20, retries=0).run(ToolCall("visit", {"url": url}), [])
    assert result.error in ("bad_url", "bad_arguments") and call.parameters == () and result.origin is None


def test_one_page_has_one_spelling():
    for url in (
        "HTTP://Example.ORG",
        "http://example.org:80/",
        " http://example.org/#top\n",
        "http://example.org/a/..",
    ):
        assert str(normal_url(url)) == "http://example.org/"
    assert str(normal_url("https://example.org/A?q=1#x")) == "https://example.org/A?q=1"
    assert str(normal_url("http://ex\xe4mple.org/\xfc")) == "http://xn--exmple-cua.org/%C3%BC"


def trickle(sends):
    """A server that sends these bytes, one piece each 50 ms, without an end; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            try:
                for piece in sends():
                    connection.sendall(piece)
                    time.sleep(0.05)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def endless(first, then):
    yield first
    while True:
        yield then


@pytest.mark.parametrize(
    "sends",
    [
        lambda: endless(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", b"x"),
        lambda: endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        lambda: endless(b"", b""),
    ],
)
def test_a_page_that_trickles_ends_at_the_time_limit(sends):
    web, start = Web(trickle(sends), {"slow.org": [PUBLIC]}), time.monotonic()
    _, result = run(web, "http://slow.org/", timeout_s=1)
    assert result.error == "timeout" and time.monotonic() - start < 10


def test_the_certificate_is_that_of_the_name_and_not_of_the_address():
    seen = {}

    class Stream(httpcore.NetworkStream):
        def start_tls(self, ssl_context, server_hostname=None, timeout=None):
            seen.update(name=server_hostname, checks=ssl_context.check_hostname, mode=ssl_context.verify_mode)
            raise httpcore.ConnectError

        def close(self):
            pass

    def resolve(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, port))]

    with pytest.raises(BadCall, match="cannot be reached"):
        read_page(normal_url("https://example.org/"), 5, resolve=resolve, connect=lambda *_, **__: Stream())
    assert seen == {"name": "example.org", "checks": True, "mode": ssl.CERT_REQUIRED}


def test_a_host_that_does_not_exist_or_refuses_is_an_observation():
    def nobody(host, port, **_):
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(BadCall, match="no host of this name") as caught:
        read_page(normal_url("http://nowhere.example/"), 5, resolve=nobody)
    assert caught.value.kind == "page"

    def refuse(*_, **__):
        raise httpcore.ConnectError

    web = Web("http://x:1", {"a.org": [PUBLIC, "93.184.216.35"]})
    with pytest.raises(BadCall, match=r"cannot be reached \(ConnectError\)"):
        read_page(normal_url("http://a.org/"), 5, resolve=web.resolve, connect=refuse)


@pytest.mark.parametrize("data", [b"<" * 50_000, b"<div>" * 30_000, b"\x00\xff" * 1000, b"<p>" + b"&#x0;" * 1000])
def test_no_page_breaks_the_reader(data):
    tool = Visit(budget=100, timeout_s=60, read=lambda url, timeout_s: Page(data, "text/html"))
    _, result = ToolRunner([tool], workers=1, timeout_s=60, retries=0).run(
        ToolCall("visit", {"url": "http://a.org/"}), []
    )
    assert result.error in (None, "page") and isinstance(result.text, str)


def test_pages_are_cached_recorded_and_replayed(tmp_path):
    with served(page()) as (url, requests):
        web = Web(url, {"a.org": [PUBLIC], "b.org": ["127.0.0.1"]})
        kept = {"cache": str(tmp_path / "c"), "record": str(tmp_path / "r")}
        seen = [run(web, to, kept=Kept(**kept))[1] for to in ("http://a.org/", "http://A.org", "http://b.org/")]
        assert len(requests) == 1 and [result.origin.source for result in seen] == ["live", "cache", "live"]
    replay = Visit(budget=1000, timeout_s=5, read=None, kept=Kept(replay=str(tmp_path / "r")))
    runner = ToolRunner([replay], workers=1, timeout_s=5, retries=0)
    for _ in range(2):
        again = [
            runner.run(ToolCall("visit", {"url": to}), [])[1]
            for to in ("http://a.org/", "http://a.org:80", "http://b.org/")
        ]
        assert [(one.text, one.error) for one in again] == [(one.text, one.error) for one in seen]
        assert {one.origin.source for one in again} == {"replay"}
    assert runner.run(ToolCall("visit", {"url": "http://c.org/"}), [])[1].error == "replay_miss"


def config(**changes):
    made = tapo_grpo.get_config("test")
    made.update_from_flattened_dict({f"tools.{name}": value for name, value in changes.items()})
    return made


def test_the_config_gives_the_tool_where_it_is_named(monkeypatch):
    names = ("text_search_tool", "visit")
    found = sources.tools(config(names=names, visit_budget=77))
    assert [tool.name for tool in found] == list(names) and found[1]._budget == 77 and not hasattr(found[0], "service")
    assert "visit" not in [tool.name for tool in sources.tools(config())]
    monkeypatch.setitem(__import__("sys").modules, "trafilatura", None)
    with pytest.raises(UserError, match=r"tools.names has 'visit', which needs more: pip install 'tapo_jax\[web\]'"):
        sources.tools(config(names=names))
    assert visit.VISIT == "visit"


def test_a_replay_of_nothing_but_visits_leaves_the_text_search_as_it_was(tmp_path):
    names, folder = ("text_search_tool", "visit"), str(tmp_path / "r")
    with pytest.raises(UserError, match="tools.replay"):
        sources.tools(config(names=names, replay=folder))
    Kept(record=folder)._record.put("k", '["visit", "", "http://a.org/", 0, 9, "{}"]', None, "x")
    assert [type(tool).__name__ for tool in sources.tools(config(names=names, replay=folder))] == [
        "TextSearch",
        "Visit",
    ]
    Kept(record=folder)._record.put("l", '["search-r1", "", "lima", 1, 9, "{}"]', None, "x")
    found = sources.tools(config(names=names, replay=folder))
    assert [type(tool).__name__ for tool in found] == ["RemoteTextSearch", "Visit"]


class Handbook:
    name = "visit"
    schema = visit.SCHEMA

    def __call__(self, arguments, images):
        return "own"


def own_tools(config):
    return [Handbook()]


def test_a_tool_of_ones_own_with_the_same_name_stays():
    assert isinstance(sources.tools(config(source=f"{__name__}:own_tools", names=("visit",)))[0], Handbook)
