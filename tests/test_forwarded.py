"""Which headers of which peers are believed; no sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from daskserve.proxy.forwarded import FORWARDED_PREFIX, ForwardedHeaders

LOOPBACK = ["127.0.0.1", "::1"]


def apply(
    headers: dict[str, str] | list[tuple[str, str]],
    *,
    peer: tuple[str, int] | None = ("127.0.0.1", 5),
    trusted: list[str] = LOOPBACK,
    unix: bool = False,
    kind: str = "http",
) -> tuple[Any, Any, Any]:
    """Return client, scheme and prefix as what comes behind sees them."""
    seen = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)

    pairs = headers.items() if isinstance(headers, dict) else headers
    scope = {
        "type": kind,
        "scheme": {"http": "http", "websocket": "ws"}[kind],
        "client": peer,
        "headers": [(n.encode(), v.encode("latin-1")) for n, v in pairs],
    }
    wrapped = ForwardedHeaders(app, trusted, unix=unix)
    asyncio.run(wrapped(scope, None, None))  # type: ignore[arg-type]
    return seen["client"], seen["scheme"], seen.get(FORWARDED_PREFIX)


SAID = {
    "x-forwarded-for": "192.0.2.7",
    "x-forwarded-proto": "https",
    "x-forwarded-prefix": "/outer",
}
BELIEVED = (("192.0.2.7", 0), "https", "/outer")


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("127.0.0.1", LOOPBACK),
        ("::1", LOOPBACK),
        ("::ffff:127.0.0.1", LOOPBACK),
        ("10.1.2.3", ["10.0.0.0/8"]),
        ("10.1.2.3", ["fd00::/8", "10.1.2.3"]),
        ("fd00::5", ["fd00::/8"]),
        ("192.0.2.9", ["0.0.0.0/0"]),
    ],
)
def test_trusted_peer(peer: str, trusted: list[str]) -> None:
    assert apply(SAID, peer=(peer, 5), trusted=trusted) == BELIEVED


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("127.0.0.2", LOOPBACK),
        ("::ffff:10.0.0.1", LOOPBACK),
        ("::2", LOOPBACK),
        ("11.0.0.1", ["10.0.0.0/8"]),
        ("127.0.0.1", ["10.0.0.0/8"]),
        ("127.0.0.1", []),
        ("", LOOPBACK),
    ],
)
def test_untrusted_peer(peer: str, trusted: list[str]) -> None:
    ignored = ((peer, 5), "http", None)
    assert apply(SAID, peer=(peer, 5), trusted=trusted) == ignored


def test_peer_without_an_address() -> None:
    assert apply(SAID, peer=None, unix=True, trusted=[]) == BELIEVED
    # A TCP client that has gone already has none either.
    assert apply(SAID, peer=None) == (None, "http", None)


@pytest.mark.parametrize(
    ("route", "client"),
    [
        ("192.0.2.7", ("192.0.2.7", 0)),
        ("192.0.2.7:443", ("192.0.2.7", 443)),
        ("2001:db8::1", ("2001:db8::1", 0)),
        ("[2001:db8::1]", ("2001:db8::1", 0)),
        ("[2001:db8::1]:443", ("2001:db8::1", 443)),
        ("198.51.100.1, 192.0.2.7", ("192.0.2.7", 0)),  # the first one can be made up
        ("198.51.100.1, 192.0.2.7 ,127.0.0.1", ("192.0.2.7", 0)),
        ("127.0.0.1, ::1", ("127.0.0.1", 0)),
        ("unknown, 127.0.0.1", ("unknown", 0)),
        ("", ("127.0.0.1", 5)),
        (" ", ("127.0.0.1", 5)),
    ],
)
def test_client(route: str, client: tuple[str, int]) -> None:
    assert apply({"x-forwarded-for": route})[0] == client


def test_client_in_repeated_headers() -> None:
    headers = [("x-forwarded-for", "192.0.2.7"), ("x-forwarded-for", "127.0.0.1")]
    assert apply(headers)[0] == ("192.0.2.7", 0)


@pytest.mark.parametrize(
    ("proto", "http", "websocket"),
    [
        ("https", "https", "wss"),
        ("wss", "https", "wss"),
        ("http", "http", "ws"),
        (" https ", "https", "wss"),
        ("ftp", "http", "ws"),
        ("", "http", "ws"),
    ],
)
def test_scheme(proto: str, http: str, websocket: str) -> None:
    headers = {"x-forwarded-proto": proto}
    assert apply(headers)[1] == http
    assert apply(headers, kind="websocket")[1] == websocket


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        ("/a", "/a"),
        ("/a/b/", "/a/b"),
        ("/user/me@example.org/proxy/8000", "/user/me@example.org/proxy/8000"),
        ("/user/m%C3%BC%2Dller", "/user/mü-ller"),
        ("/m\xc3\xbc", "/mü"),
        ("", None),
        ("/", None),
        ("a", None),
        ("//host", None),  # a redirect would lead to that host
        ("/%2Fhost", None),
        ("/\\host", None),
        ("/%5Chost", None),
        ("/a b", None),
        ("/a%20b", None),
        ("/a?b", None),
        ("/a%3Fb", None),
        ("/a%23b", None),
        ("/a%00", None),
        ("/a%0d%0ab", None),
        ("/a%FF", None),
        ("/a, /b", None),
    ],
)
def test_prefix(prefix: str, path: str | None) -> None:
    assert apply({"x-forwarded-prefix": prefix})[2] == path
