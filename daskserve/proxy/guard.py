"""uvicorn's HTTP/1.1 with an end to every wait for a client; on the transport loop.

A `Guard` for each server has the limits and sweeps over its connections, so that no
request costs a timer. Who asks properly and in time does not notice any of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from httptools import HttpParserError, HttpRequestParser

from daskserve.config import HTTPOptions
from daskserve.proxy.express import Express
from daskserve.proxy.http_protocol import INVALID, Cycle, HttpProtocol
from daskserve.proxy.request import FULL_KEY
from daskserve.transport.files import max_files, missing_files, reserve_files
from daskserve.transport.handshakes import TlsListener
from daskserve.transport.memory import give_back

logger = logging.getLogger(__name__)

#: Seconds between two looks at the connections.
SWEEP_S = 0.5
#: A client that takes less of a response that waits for it has stalled, in bytes/s
#: (as Kestrel's ``MinResponseDataRate``).
MIN_RATE = 240
#: How long a client that is not done sending is listened to, once it has its answer.
LINGER_S = 5.0
#: Connections beyond the limit that still get an answer, health checks a real one.
SPARE_CONNECTIONS = 64
#: So many files are to be free: with fewer, who waits for nothing has to go. And so
#: many are kept for when others in this process have taken all.
FREE_FILES, RESERVED_FILES = 16, 8
#: Once of so many connections at least no more than this share is left, memory is
#: given back to the system.
CROWD, CROWD_LEFT = 256, 0.1
#: Seconds between two warnings that files are missing.
FILES_WARNING_S = 60.0


class Guard:
    """What the connections of one server share.

    Parameters
    ----------
    options
        The instance's HTTP options.
    """

    def __init__(self, options: HTTPOptions) -> None:
        self.header_timeout_s = options.header_timeout_s
        self.max_header_bytes = options.max_header_bytes
        self.stall_timeout_s = options.stall_timeout_s
        self.keep_alive_timeout_s = options.keep_alive_timeout_s
        #: The quick way of requests, if there is one.
        self.express: Express | None = None
        # The rest of the files is for the worker's own connections and user code.
        self.max_connections = min(options.max_connections, max_files() // 2)
        self.spare_connections = min(SPARE_CONNECTIONS, max_files() // 16)
        self.connections: set[GuardedProtocol] = set()
        #: Those between two requests; who has been idle for longest comes first.
        self.idle: dict[GuardedProtocol, None] = {}
        #: Whether connections end with the response that they wait for next.
        self.closing = False
        #: Where TLS connections are before they are in `connections`.
        self.listener: TlsListener | None = None
        #: Whether hardly any files can be opened.
        self.short_of_files = False
        self._reserve: list[int] = []
        self._warn_after = 0.0
        self._most = 0

    @property
    def protocol(self) -> Callable[..., asyncio.Protocol]:
        """What makes the protocol of a connection."""
        return functools.partial(GuardedProtocol, self)

    def sweep(self, now: float) -> None:
        """End what has waited for its client for too long."""
        for connection in list(self.connections):
            connection.check(now)
        if self.express is not None:
            self.express.sweep(now)
        self.look_at_files(now)
        self._look_at_memory()

    def admit_handshake(self) -> bool:
        """Whether one more TLS connection may come, for which room is made."""
        assert self.listener is not None
        there = len(self.connections) + len(self.listener.handshakes)
        excess = there + 1 - self.max_connections
        return excess <= 0 or self.make_room() or excess <= self.spare_connections

    def has_room(self, connection: GuardedProtocol) -> tuple[bool, bool]:
        """Whether a new connection is to be served, and whether it is to be heard."""
        if self.listener is not None:
            self.listener.handshakes.pop(connection, None)
        excess = len(connection.connections) - self.max_connections
        if self.listener is not None:
            excess += len(self.listener.handshakes)
        if excess <= 0:
            if self.short_of_files:
                self.make_room()
            return True, True
        return self.make_room(), excess <= self.spare_connections

    def look_at_files(self, now: float) -> None:
        """See that some files can be opened, if only by who asks whether we live."""
        missing = missing_files(FREE_FILES)
        self.short_of_files = missing > 0
        if not missing:
            if not self._reserve and not missing_files(FREE_FILES + RESERVED_FILES):
                self._reserve = reserve_files(RESERVED_FILES)
            return
        closed = 0
        while closed < missing and self.make_room():
            closed += 1
        if closed < missing:
            self.release_files()
        if now >= self._warn_after:
            self._warn_after = now + FILES_WARNING_S
            logger.warning(
                "Hardly any of the %d files that this process may open (ulimit -n) is "
                "left: closed %d idle or half-open connections",
                max_files(),
                closed,
            )

    def _look_at_memory(self) -> None:
        there = len(self.connections)
        if self.listener is not None:
            there += len(self.listener.handshakes)
        self._most = max(self._most, there)
        if self._most >= CROWD and there <= self._most * CROWD_LEFT:
            self._most = there
            asyncio.get_running_loop().run_in_executor(None, give_back)

    def release_files(self) -> None:
        """Let others have what is kept for need."""
        for file in self._reserve:
            os.close(file)
        self._reserve = []

    def close_gently(self) -> None:
        """Let every connection end with its next response, which says so."""
        self.closing = True
        for connection in self.connections:
            if connection.cycle is not None:
                connection.cycle.keep_alive = False

    def close_idle(self, idle_s: float, now: float) -> None:
        """Close the connections on which nothing was asked for some time."""
        for connection in list(self.idle):
            if now - connection.idle_since >= idle_s:
                connection.transport.close()

    def make_room(self) -> bool:
        """Close what has been half-open or idle for longest, if there is anything."""
        if self.listener is not None and self.listener.drop_oldest():
            return True
        connection = next(iter(self.idle), None)
        if connection is None:
            return False
        del self.idle[connection]
        connection.transport.abort()
        return True


class GuardedProtocol(HttpProtocol):
    """One connection.

    Parameters
    ----------
    guard
        The server's.
    """

    def __init__(self, guard: Guard, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._guard = guard
        self.express = guard.express
        #: Since when a request's head is awaited; None if its first byte is, which
        #: is what the time for keeping a connection alive is about.
        self._head_since: float | None = None
        #: Since when the next request is awaited; or was, if it is being answered.
        self.idle_since = self.loop.time()
        #: What is being parsed; a part of it is left when an upgrade is not heeded.
        self._data: bytes | memoryview = b""
        self._rest: memoryview | None = None
        #: Size of the read in which the head began: no less than its part of it.
        self._first_bytes = 0
        #: A WebSocket's handshake, or the refusal of what cannot be understood, waits
        #: until the requests before it are answered; nothing is read meanwhile.
        self._handshake_waits = False
        self._refusal: tuple[HTTPStatus, str] | None = None
        #: Since when, and from which size on, a response waits to be taken.
        self._unsent: tuple[float, int] | None = None
        self._linger_until: float | None = None
        self._full = False
        self._verdict: tuple[HTTPStatus, str] | None = None

    # What uvicorn and the parser call.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection if there is room, or can be made."""
        super().connection_made(transport)
        guard = self._guard
        room, heard = guard.has_room(self)
        self._full = not room
        if not (room or heard):
            transport.abort()
        self._gently_closed = _GentlyClosed(self)
        guard.connections.add(self)
        guard.idle[self] = None
        self._head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent."""
        if self._refusal or self._linger_until is not None or self._handshake_waits:
            return
        self._data = data
        self._overhead += len(data)
        super().data_received(data)
        while self._rest is not None:
            self._data, self._rest = self._rest, None
            super().data_received(self._data)  # type: ignore[arg-type]
        self._data = b""
        # Of the read in which a head begins or ends, none of it is counted: others
        # may stand before it, many of them.
        if self._overhead > self._guard.max_header_bytes:
            if self._linger_until is None and not self.transport.is_closing():
                if self._refusal is None:
                    self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._overhead < 0:
            self._overhead = 0

    def on_message_begin(self) -> None:
        """Start the clock of a request's head."""
        super().on_message_begin()
        self._first_bytes = len(self._data)
        if self._head_since is None:
            self._head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Begin a request, unless its head is not to be accepted."""
        self._guard.idle.pop(self, None)
        self._head_since = None
        if not self.flow.write_paused:  # what waits will grow by this response
            self._unsent = None
        self._check_head()
        super().on_headers_complete()
        if self._websocket:
            self._check_handshake()
        if self._full:
            self.scope[FULL_KEY] = True  # type: ignore[literal-required]
            self._keep_alive = False
        if self._guard.closing:
            self._keep_alive = False
            if self.cycle is not None and not self._pending:
                self.cycle.keep_alive = False  # one that waits for its turn

    def on_message_complete(self) -> None:
        """Note that the body is there."""
        if not self._other_protocol:
            super().on_message_complete()
        # Else the parser stops, see `_go_on_without`.

    def on_response_complete(self) -> None:
        """Wait for the next request; uvicorn's would set a timer for that."""
        self.server_state.total_requests += 1
        self.idle_since = now = self.loop.time()
        if self._head_since is not None:  # its head has begun to come already
            self._head_since = now
        if not self.transport.is_closing():
            if self.flow.read_paused:
                self.flow.resume_reading()
            if self.pipeline:
                if not self.flow.write_paused:  # what waits will grow
                    self._unsent = None
                self._start_asgi_task(*self.pipeline.pop())
            elif self._refusal is not None:
                return self._write_refusal(*self._refusal)
            elif self._handshake_waits:
                self._handshake_waits = False
                return self.handle_websocket_upgrade()
        if not self._responding() and self._linger_until is None:
            self._guard.idle[self] = None

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection to the WebSocket protocol, when it is its turn."""
        if self._responding():
            self._handshake_waits = True
            self.flow.pause_reading()
        elif self._full:
            self._write_refusal(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections.")
        elif self.scope["method"] != "GET":
            text = "A WebSocket's handshake is a GET request."
            self._write_refusal(HTTPStatus.METHOD_NOT_ALLOWED, text)
        else:
            self._leave()
            super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """Note that the client takes a response slowly."""
        super().pause_writing()
        self._unsent = (self.loop.time(), self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Note that the client has taken what waited."""
        super().resume_writing()
        self._unsent = None

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be understood, after all that came before it."""
        answered = self._in_body and not self._pending and not self._responding()
        self._pending = False
        status, text = self._verdict or (HTTPStatus.BAD_REQUEST, msg)
        error = sys.exception()
        # Other texts of the parser can have a part of the request in them.
        reason = str(error) if type(error) is HttpParserError else type(error).__name__
        why = reason if self._verdict is None else text
        logger.info("Refused a request from %s: %d, %s", self._peer, status, why)
        if answered:  # another answer would be taken for that of the next request
            self.linger()
        elif not self._responding():
            self._write_refusal(status, text)
        elif not self._in_body or self.pipeline:
            self._refusal, self._head_since = (status, text), None
            if self._in_body:
                self.pipeline.popleft()  # it was to wait for its turn
        else:
            if self.cycle.response_started:
                self.transport.abort()  # it would be read as a part of the response
            else:
                self._write_refusal(status, text)
            self.cycle.disconnected = True  # nothing that the app says is sent any more
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()

    # What the guard calls.

    def check(self, now: float) -> None:
        """End the connection if its client has kept us waiting for too long."""
        if self._linger_until is not None and now > self._linger_until:
            self.transport.abort()
        guard, responding = self._guard, self._responding()
        since = self._head_since
        if since is not None and not responding:
            if now - since > guard.header_timeout_s:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        elif self in guard.idle and now - self.idle_since > guard.keep_alive_timeout_s:
            self.transport.close()
        elif not responding and self._unsent is None:
            # After its end a response can wait below the mark that pauses writing.
            size = self.transport.get_write_buffer_size()
            self._unsent = (now, size) if size else None
        if self._unsent is not None:
            self._check_progress(now, *self._unsent)

    def _check_progress(self, now: float, since: float, size_then: int) -> None:
        size = self.transport.get_write_buffer_size()
        seconds = now - since
        if size == 0:
            self._unsent = None
        elif seconds > self._guard.stall_timeout_s:
            self._unsent = (now, size)  # what it took before does not count any more
            if (size_then - size) / seconds < MIN_RATE:
                logger.info(
                    "Cut %s off: it takes next to nothing of a response", self._peer
                )
                self.transport.abort()

    def linger(self) -> None:
        """Close when the client has stopped sending, or soon.

        If anything that it sent is unread then, the kernel resets the connection, and
        the answer may be lost on the way (RFC 9112, 9.6).
        """
        if self._linger_until is None:
            self._linger_until = self.loop.time() + LINGER_S
            self._guard.idle.pop(self, None)
            if self.transport.can_write_eof():  # not with TLS
                self.transport.write_eof()
            self.flow.resume_reading()

    # Parts.

    def _new_cycle(self, scope: Any, keep_alive: bool) -> Cycle:
        cycle = super()._new_cycle(scope, keep_alive)
        cycle.transport = self._gently_closed  # type: ignore[assignment]
        return cycle

    def _go_on_without(self, data: bytes, end: int) -> None:
        """Go on as if no upgrade had been asked for (RFC 9110, 7.8, allows that).

        The parser has stopped after the head. Java's client asks for ``h2c`` with
        every first request, and its body is not to be lost, nor taken for a request.
        """
        framing = [
            b"%s: %s\r\n" % header
            for header in self.headers
            if header[0] in (b"content-length", b"transfer-encoding")
        ]
        self._other_protocol = False
        self.parser = HttpRequestParser(_AfterUpgrade(self))
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(framing))
        except HttpParserError:  # of an upgrade's body, it is known only now
            self.send_400_response(INVALID)
        else:
            self._rest = memoryview(data)[end:]

    def _responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _peer(self) -> str:
        return "a client" if self.client is None else f"{self.client[0]}"

    def _check_head(self) -> None:
        """Raise, which makes the parser stop, if the head is not to be accepted."""
        limit = self._guard.max_header_bytes
        if self._first_bytes + self._overhead > limit:
            parts = (len(name) + len(value) + 4 for name, value in self.headers)
            if len(self.url) + sum(parts) > limit:
                self._verdict = _verdict(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if len([name for name, _ in self.headers if name == b"host"]) > 1:
            # RFC 9112, 3.2: whoever reads the first would see another request.
            self._verdict = (HTTPStatus.BAD_REQUEST, "More than one Host header.")
        if self._verdict is not None:
            raise ValueError(self._verdict[1])

    def _check_handshake(self) -> None:
        """Raise if a WebSocket's handshake has, or may have, a body."""
        for name, value in self.headers:
            if name == b"transfer-encoding" or (
                name == b"content-length" and value.strip() != b"0"
            ):
                text = "A WebSocket's handshake has no body."
                self._verdict = (HTTPStatus.BAD_REQUEST, text)
        if self._verdict is not None:
            raise ValueError(self._verdict[1])

    def _refuse(self, status: HTTPStatus) -> None:
        """Refuse a request whose head, or what stands beside its body, is too much."""
        if status == HTTPStatus.REQUEST_TIMEOUT and not self._first_bytes:
            self.transport.abort()  # nothing was asked
            return
        self._head_since = None
        self._verdict = _verdict(status)
        self.send_400_response("")

    def _write_refusal(self, status: HTTPStatus, text: str) -> None:
        body = text.encode()
        allow = b"allow: GET\r\n" if status == HTTPStatus.METHOD_NOT_ALLOWED else b""
        self.transport.write(
            b"HTTP/1.1 %d %s\r\n"
            b"content-type: text/plain; charset=utf-8\r\n"
            b"content-length: %d\r\n%s"
            b"connection: close\r\n\r\n%s"
            % (status, status.phrase.encode(), len(body), allow, body)
        )
        self.linger()

    def _leave(self) -> None:
        self._guard.connections.discard(self)
        self._guard.idle.pop(self, None)


class _AfterUpgrade:
    """What a parser tells a connection, but for a first head that we wrote."""

    def __init__(self, connection: GuardedProtocol) -> None:
        self._connection = connection
        self._ours = True
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete

    def on_message_begin(self) -> None:
        if not self._ours:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._ours:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._ours:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._ours:
            self._connection.on_headers_complete()
        self._ours = False


class _GentlyClosed:
    """A connection's transport as its requests have it."""

    def __init__(self, connection: GuardedProtocol) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        connection = self._connection
        if connection.cycle.more_body and not connection.pipeline:
            connection.linger()
        else:
            connection.transport.close()


def _verdict(status: HTTPStatus) -> tuple[HTTPStatus, str]:
    return status, f"{status.phrase}."
