"""Read a page of the public web over HTTP, for an address that nobody should trust.

Only http and https, only the usual ports, and only addresses of the public internet: never this machine, its network or
its cloud. A host name is resolved once for each connection, every address that it has must be public, and the
connection goes to an address that was checked, so that a name cannot change in between. Redirects go the same way.
"""

import dataclasses
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore
import httpx

from tapo_jax.tools.arguments import BadCall

MAX_URL = 2048
MAX_PAGE = 2 << 20  # bytes
MAX_REDIRECTS = 5
PORTS = {"http": (80, 8080), "https": (443, 8443)}
TYPES = ("text/", "application/xhtml+xml", "application/xml", "application/json")
# Addresses that the registries call public and that are a service of the network that this machine is in.
_INNER = (ipaddress.ip_network("168.63.129.16/32"), ipaddress.ip_network("192.88.99.0/24"))
_HEADERS = {"User-Agent": "tapo_jax", "Accept": "text/html, text/plain;q=0.9", "Accept-Encoding": "identity"}


@dataclasses.dataclass(frozen=True)
class Page:
    """What a server sent."""

    data: bytes
    content_type: str
    """In small letters, with its parameters."""


def normal_url(text: str) -> httpx.URL:
    """Return an address in its one spelling: small letters in scheme and host, no usual port, no fragment.

    Raises BadCall "bad_url" if it is no http or https address, has a password, or an unusual port.
    """
    text = text.strip()
    if len(text) > MAX_URL:
        raise BadCall("bad_url", f"The URL has {len(text)} characters, more than {MAX_URL}.")
    try:
        url = httpx.URL(text).copy_with(fragment=None)
        url = url.copy_with(raw_path=url.raw_path)  # "/" where there is none
    except (httpx.InvalidURL, UnicodeError, ValueError, TypeError) as error:
        raise BadCall("bad_url", "This is no URL.") from error
    if url.scheme not in PORTS or not url.host:
        raise BadCall("bad_url", "The URL must begin with http:// or https:// and name a host.")
    if url.userinfo:
        raise BadCall("bad_url", "The URL must not hold a user name or a password.")
    if url.port is not None and url.port not in PORTS[url.scheme]:
        raise BadCall("bad_url", f"The port {url.port} is none that pages are read from.")
    return url


def public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet, also where it holds an IPv4 address inside."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        teredo = ip.teredo or ()
        inside = [held for held in (ip.ipv4_mapped, ip.sixtofour, *teredo) if held is not None]
        if inside:
            return all(public(str(held)) for held in inside)
        if ip.is_site_local:
            return False
    kinds = (ip.is_private, ip.is_loopback, ip.is_link_local, ip.is_multicast, ip.is_reserved, ip.is_unspecified)
    return ip.is_global and not any(kinds) and not any(ip in network for network in _INNER)


class Guarded(httpcore.NetworkBackend):
    """Connects to checked addresses only, and ends every read and write at one time limit.

    deadline: by time.monotonic.
    resolve: as socket.getaddrinfo.
    connect: opens a connection to an IP address, as the method connect_tcp of httpcore's own backend.
    """

    def __init__(self, deadline: float, resolve: Callable[..., Any], connect: Callable[..., httpcore.NetworkStream]):
        self._deadline, self._resolve, self._connect = deadline, resolve, connect

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = self._resolve(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise BadCall("page", "There is no host of this name.") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not addresses or not all(map(public, addresses)):
            raise BadCall("address", "This host is not on the public internet, and is not visited.")
        for last, address in zip([False] * (len(addresses) - 1) + [True], addresses, strict=True):
            try:
                return Limited(self._connect(address, port, timeout=_left(self._deadline)), self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last:
                    raise
        raise AssertionError("unreachable")


class Limited(httpcore.NetworkStream):
    """A connection on which everything ends at the deadline, however slowly the other side sends."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float):
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return Limited(self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def read_page(
    url: httpx.URL,
    timeout_s: float,
    *,
    resolve: Callable[..., Any] = socket.getaddrinfo,
    connect: Callable[..., httpcore.NetworkStream] | None = None,
) -> Page:
    """Return the page at an address, after at most MAX_REDIRECTS redirects.

    timeout_s: of everything together.
    resolve, connect: as in `Guarded`.

    Raises BadCall: "address" for a host that is not public, "bad_url" for a redirect to what is no page, "timeout", or
    "page" if there is none, it is too large, or it is no text.
    """
    deadline = time.monotonic() + timeout_s
    guarded = Guarded(deadline, resolve, connect or httpcore.SyncBackend().connect_tcp)
    try:
        with httpcore.ConnectionPool(network_backend=guarded, max_keepalive_connections=0, retries=0) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                found = _request(pool, url, deadline)
                if isinstance(found, Page):
                    return found
                url = found
    except httpcore.TimeoutException as error:
        raise BadCall("timeout", f"The page was not there within {timeout_s:g} seconds.") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
        raise BadCall("page", f"The page cannot be reached ({type(error).__name__}).") from error
    raise BadCall("page", f"The page redirects more than {MAX_REDIRECTS} times.")


def _request(pool: httpcore.ConnectionPool, url: httpx.URL, deadline: float) -> Page | httpx.URL:
    """Return the page at an address, or the address that it redirects to."""
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    host = url.netloc
    with pool.stream("GET", target, headers=[(b"Host", host), *_encoded(_HEADERS)]) as reply:
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in reply.headers}
        if reply.status in (301, 302, 303, 307, 308) and "location" in headers:
            return normal_url(_joined(url, headers["location"]))
        if reply.status != 200:
            raise BadCall("page", f"The server answered with status {reply.status}.")
        kind = headers.get("content-type", "text/html").strip().lower()
        if not kind.startswith(TYPES):
            shown = re.sub(r"[^\w/+.-]", "", kind.partition(";")[0])[:60]
            raise BadCall("page", f"The page is no text but {shown or 'something else'}.")
        if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise BadCall("page", "The page is compressed, which was not asked for.")
        data = bytearray()
        for piece in reply.iter_stream():
            data += piece
            if len(data) > MAX_PAGE:
                raise BadCall("page", f"The page has more than {MAX_PAGE >> 10} KiB.")
            _left(deadline)
        return Page(bytes(data), kind)


def _joined(url: httpx.URL, location: str) -> str:
    try:
        return str(url.join(location))
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise BadCall("bad_url", "The page redirects to what is no URL.") from error


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _left(deadline: float) -> float:
    """Return the seconds before the deadline. Raises httpcore.ReadTimeout after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left
