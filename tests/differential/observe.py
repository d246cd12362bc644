"""Talk to a server by raw sockets and write down what it does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import websockets
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.typing import Origin, Subprotocol

#: Longer than anything takes; what takes it hangs.
TIMEOUT_S = 20
#: They differ from second to second, and between any two servers.
VOLATILE = ("date", "server")
HOST = "example.test"

Headers: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Response:
    """One HTTP response; status None if the connection was closed instead."""

    status: int | None
    reason: str = ""
    headers: Headers = ()
    body: bytes = b""
    #: Sizes of the chunks, if it came in chunks.
    chunks: tuple[int, ...] | None = None
    #: Whether it came whole, rather than being cut.
    complete: bool = False
    #: How many ``100 Continue`` came before it.
    continued: int = 0
    #: ``"kept"`` or ``"closed"``: the connection afterwards, where that was asked.
    after: str = ""

    def header(self, name: str) -> str:
        """Return the first header of this name."""
        return dict(reversed(self.headers)).get(name, "")

    def json(self) -> Any:
        """Return the body's content."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Handshake:
    """How a WebSocket's handshake ended."""

    status: int
    reason: str
    headers: Headers
    subprotocol: str | None = None
    body: bytes = b""


@dataclass(frozen=True)
class Closed:
    """How the server closed a WebSocket; code None if it just hung up."""

    code: int | None
    reason: str = ""


@dataclass(frozen=True)
class Note:
    """What else a case wants to be equal."""

    name: str
    value: Any


Seen: TypeAlias = Response | Handshake | Closed | Note


@dataclass(frozen=True)
class Target:
    """Where an app is served."""

    port: int
    prefix: str


def request(
    target: Target,
    path: str = "/",
    method: str = "GET",
    *,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes | None = None,
    version: str = "1.1",
    host: str = HOST,
) -> bytes:
    """Return a request as it goes over the wire; `path` is as the app knows it."""
    lines = [f"{method} {target.prefix}{path} HTTP/{version}", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, "", ""])
    return head.encode("latin-1") + (body or b"")


class _Wire(asyncio.Protocol):
    """Keeps what has come, also when the connection is reset after it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self.transport: asyncio.Transport
        self._changed = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._changed.set()

    async def more(self) -> bool:
        """Wait for more; False if nothing can come any more."""
        if not self.ended:
            self._changed.clear()
            await self._changed.wait()
        return not self.ended

    async def until(self, end: bytes) -> bytes | None:
        while (at := self.data.find(end)) < 0:
            if not await self.more() and end not in self.data:
                return None
        return self.take(at + len(end))

    def take(self, size: int) -> bytes:
        taken = bytes(self.data[:size])
        del self.data[:size]
        return taken

    async def exactly(self, size: int) -> bytes | None:
        while len(self.data) < size:
            if not await self.more() and len(self.data) < size:
                return None
        return self.take(size)


class Connection:
    """One connection to a server; what it sends is read response by response."""

    def __init__(self, wire: _Wire, talk: Talk) -> None:
        self._wire = wire
        self._talk = talk
        self._response = Response(None)

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._wire.transport.write(data)

    def request(self, path: str = "/", method: str = "GET", **parts: Any) -> None:
        """Send a request; see `request`."""
        self.send(request(self._talk.target, path, method, **parts))

    def abort(self) -> None:
        """Go without a word, if the server has not gone first."""
        # asyncio's transports raise if they were closed by the other end meanwhile.
        if not self._wire.ended:
            self._wire.transport.abort()

    async def head(self) -> Response:
        """Read the head of a response."""
        continued = 0
        while True:
            head = await self._wire.until(b"\r\n\r\n")
            if head is None:
                self._response = Response(None, continued=continued)
                return self._response
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            _, status, reason = first.split(" ", 2)
            if status != "100":
                break
            continued += 1
        pairs = [line.split(": ", 1) for line in lines]
        headers = tuple(_stable(k, v) for k, v in pairs if k.lower() not in VOLATILE)
        self._response = Response(
            int(status), reason, headers, chunks=(), continued=continued
        )
        return self._response

    async def chunk(self) -> bytes | None:
        """Read a chunk; empty after the last one, None if there is none but the end."""
        line = await self._wire.until(b"\r\n")
        if line is None:
            return None
        size = int(line, 16)
        chunk = await self._wire.exactly(size + 2)
        if chunk is None:
            return None
        data, seen = chunk[:-2], self._response
        if data:
            assert seen.chunks is not None
            chunks = (*seen.chunks, len(data))
            self._response = replace(seen, body=seen.body + data, chunks=chunks)
        else:
            self._response = replace(seen, complete=True)
        return data

    async def response(
        self, method: str = "GET", *, end: bool = False, record: bool = True
    ) -> Response:
        """Read a whole response, or what comes of it.

        Parameters
        ----------
        method
            Of the request: there is no body for HEAD.
        end
            Whether to find out what becomes of the connection.
        record
            Whether it has to be the same on both servers.
        """
        await self.head()
        return await self.rest(method, end=end, record=record)

    async def rest(
        self, method: str = "GET", *, end: bool = False, record: bool = True
    ) -> Response:
        """Read a response whose head was read."""
        seen = self._response
        bodiless = method == "HEAD" or seen.status in (204, 304)
        if seen.status is None:
            pass
        elif bodiless:
            self._response = replace(seen, chunks=None, complete=True)
        elif seen.header("transfer-encoding") == "chunked":
            while await self.chunk():
                pass
        else:
            await self._read_known_length(int(seen.header("content-length") or 0))
        if end:
            self._response = replace(self._response, after=await self._after())
        if record:
            self._talk.seen.append(self._response)
        return self._response

    async def _read_known_length(self, size: int) -> None:
        body = await self._wire.exactly(size)
        complete = body is not None
        if body is None:
            body = self._wire.take(size)
        self._response = replace(
            self._response, body=body, chunks=None, complete=complete
        )

    async def _after(self) -> str:
        """Ask for something else: whatever is answered, the connection was kept."""
        if self._response.complete:
            self.request("/probe")
            if await self._wire.until(b"\r\n\r\n") is not None:
                return "kept"
        else:
            while await self._wire.more():
                pass
        return "closed"


class Socket:
    """One WebSocket."""

    def __init__(self, socket: ClientConnection, talk: Talk) -> None:
        self.socket = socket
        self._talk = talk

    async def send(self, message: Any, **options: Any) -> None:
        """Send a message."""
        await self.socket.send(message, **options)

    async def receive(self, count: int = 1) -> Any:
        """Receive messages, which have to be the same; return the last."""
        message: Any = None
        for _ in range(count):
            try:
                message = await self.socket.recv()
            except ConnectionClosed:
                return await self.closed()
            self._talk.note("message", brief(message))
        return message

    async def ask(self, message: Any) -> Any:
        """Send one message and receive one."""
        await self.send(message)
        return await self.receive()

    async def closed(self) -> None:
        """Wait for the server to close."""
        try:
            while True:
                self._talk.note("message", brief(await self.socket.recv()))
        except ConnectionClosed as err:
            seen = Closed(None)
            if err.rcvd is not None:
                seen = Closed(err.rcvd.code, err.rcvd.reason)
            self._talk.seen.append(seen)


class Talk:
    """What one case says to one server, and what it saw.

    Parameters
    ----------
    target
        Where the case's app is.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.seen: list[Seen] = []
        self._connections: list[Connection] = []
        #: Names what this talk does in the app, where others talk too.
        self.key = uuid.uuid4().hex

    def note(self, name: str, value: Any) -> None:
        """Record something that has to be the same."""
        self.seen.append(Note(name, value))

    async def connect(self) -> Connection:
        """Open a connection."""
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(_Wire, "127.0.0.1", self.target.port)
        self._connections.append(Connection(wire, self))
        return self._connections[-1]

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.abort()

    async def ask(
        self, path: str = "/", method: str = "GET", *, end: bool = True, **parts: Any
    ) -> Response:
        """Send a request on a connection of its own and record the response."""
        return await self._ask(path, method, end=end, record=True, parts=parts)

    async def quietly(self, path: str, method: str = "GET", **parts: Any) -> Response:
        """Send a request whose response is not recorded."""
        return await self._ask(path, method, end=False, record=False, parts=parts)

    async def raw(self, data: bytes, method: str = "GET") -> Response:
        """Send bytes, with ``{prefix}`` filled in, and record the response."""
        connection = await self.connect()
        connection.send(data.replace(b"{prefix}", self.target.prefix.encode()))
        return await connection.response(method, end=True)

    async def open(self, name: str = "gate") -> None:
        """Let an app go on that waits at a gate of this talk's."""
        await self.quietly(f"/open/{self.key}-{name}")

    async def notes(self, count: int) -> None:
        """Record what the app has noted for this talk, once it is `count` notes."""
        deadline = time.monotonic() + TIMEOUT_S / 2
        while True:
            found = (await self.quietly(f"/notes/{self.key}")).json()
            if len(found) >= count or time.monotonic() > deadline:
                return self.note("the app's notes", found)
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def websocket(
        self,
        path: str,
        *,
        subprotocols: Sequence[str] = (),
        headers: Sequence[tuple[str, str]] = (),
        compression: str | None = None,
        origin: str | None = None,
    ) -> AsyncIterator[Socket]:
        """Open a WebSocket and record the handshake; `Refused` if there is none."""
        connecting = websockets.connect(
            f"ws://{HOST}{self.target.prefix}{path}",
            host="127.0.0.1",
            port=self.target.port,
            subprotocols=[Subprotocol(name) for name in subprotocols] or None,
            additional_headers=list(headers),
            compression=compression,
            origin=None if origin is None else Origin(origin),
            max_size=None,
            ping_interval=None,
            close_timeout=TIMEOUT_S,
            proxy=None,
        )
        try:
            socket = await connecting
        except InvalidStatus as err:
            self.seen.append(_handshake(err.response))
            raise Refused from err
        except InvalidMessage as err:
            self.seen.append(Closed(None))
            raise Refused from err
        assert socket.response is not None
        seen = _handshake(socket.response)
        self.seen.append(replace(seen, subprotocol=socket.subprotocol))
        try:
            yield Socket(socket, self)
        finally:
            await socket.close()

    async def refused(self, path: str, **options: Any) -> None:
        """Try to open a WebSocket that the server does not want."""
        try:
            async with self.websocket(path, **options):
                pass
        except Refused:
            pass

    async def _ask(
        self, path: str, method: str, end: bool, record: bool, parts: dict[str, Any]
    ) -> Response:
        connection = await self.connect()
        connection.request(path, method, **parts)
        return await connection.response(method, end=end, record=record)


class Refused(Exception):
    """The handshake failed; how, was recorded."""


def _stable(name: str, value: str) -> tuple[str, str]:
    """Return a header; Starlette makes the one of methods from a set."""
    if name == "allow":
        value = ", ".join(sorted(value.split(", ")))
    return name, value


def brief(message: str | bytes) -> Any:
    """Return a message, or of a long one what tells whether two are equal."""
    if len(message) < 1000:
        return message
    data = message.encode() if isinstance(message, str) else message
    return type(message).__name__, len(message), hashlib.sha256(data).hexdigest()


def _handshake(response: Any) -> Handshake:
    # The accept header follows from the client's key, which is random.
    skip = (*VOLATILE, "sec-websocket-accept")
    return Handshake(
        response.status_code,
        response.reason_phrase,
        tuple(
            (k.lower(), v)
            for k, v in response.headers.raw_items()
            if k.lower() not in skip
        ),
        body=bytes(response.body or b""),
    )
