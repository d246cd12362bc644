"""What proxies in front of this one say in ``X-Forwarded-`` headers, if trusted.

The outermost part of a proxy: what comes behind it sees the client's own address and
scheme, and under `FORWARDED_PREFIX` the path that was stripped on the way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Receive, Scope, Send

#: Where in the scope the path is that a trusted proxy has stripped, if it says so.
FORWARDED_PREFIX = "daskserve.forwarded_prefix"

FORWARDED_NAMES = {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-prefix"}
_PROTOCOLS = {b"http": "", b"ws": "", b"https": "s", b"wss": "s"}
#: What would change the meaning of a URL that is made with it is left out.
_PREFIX = re.compile(r"(/[^/\s?#%\\\x00-\x1f\x7f\ufffd]+)+")
#: An address with brackets, or a port, or both, but not a bare one of IPv6.
_ADDRESS = re.compile(r"(?:\[([^]]+)\]|([^:]+))(?::(\d{1,5}))?")


class ForwardedHeaders:
    """Apply ``X-Forwarded-For``, ``-Proto`` and ``-Prefix`` of trusted peers.

    Parameters
    ----------
    app
        What comes behind.
    trusted
        Addresses and networks.
    unix
        Whether all requests come by a Unix socket: its peers have no address, and who
        may connect to it is up to the file's permissions.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[str], *, unix: bool) -> None:
        self._app = app
        self._trusted = [ip_network(network) for network in trusted]
        self._unix = unix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        self.apply(scope)
        await self._app(scope, receive, send)

    def apply(self, scope: Scope) -> None:
        """Apply what the headers say to `scope`; once."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if not any(name in FORWARDED_NAMES for name, _ in headers):
            return
        said = [line for line in headers if line[0] in FORWARDED_NAMES]
        # The connection's own address counts, not one that a header tells.
        peer = scope["client"]
        if self._unix or (peer is not None and self._trusts(peer[0])):
            self._apply(scope, said)

    def _apply(self, scope: Scope, said: list[tuple[bytes, bytes]]) -> None:
        last = dict(said)
        secure = _PROTOCOLS.get(last.get(b"x-forwarded-proto", b"").strip())
        if secure is not None:
            scope["scheme"] = {"http": "http", "websocket": "ws"}[scope["type"]]
            scope["scheme"] += secure
        # Each proxy appends the peer that it sees, to the header or as another one.
        route = b",".join(v for n, v in said if n == b"x-forwarded-for")
        client = self._client(route.decode("latin-1"))
        if client is not None:
            scope["client"] = client
        prefix = unquote_to_bytes(last.get(b"x-forwarded-prefix", b"").rstrip(b"/"))
        if _PREFIX.fullmatch(path := prefix.decode("utf-8", "replace")):
            scope[FORWARDED_PREFIX] = path

    def _client(self, route: str) -> tuple[str, int] | None:
        """Return the last address that is no trusted proxy's, or else the first."""
        host, port = "", 0
        for part in reversed(route.split(",")):
            found = _ADDRESS.fullmatch(part.strip())
            host, port = part.strip(), 0
            if found is not None:
                host, port = found[1] or found[2], int(found[3] or 0)
            if not self._trusts(host):
                break
        return (host, port) if host else None

    def _trusts(self, host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # how a socket of both kinds shows IPv4
        return any(address in network for network in self._trusted)
