"""uvicorn's HTTP protocol, with requests that go the quick way; on the transport loop.

And with every request told when its client has gone.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    HttpToolsProtocol,
    RequestResponseCycle,
)

from daskserve.proxy.express import Express, ExpressRequest
from daskserve.proxy.forwarder import EAGER_BODY_BYTES
from daskserve.proxy.request import CONNECTION_KEY
from daskserve.proxy.websocket_protocol import WebSocketProtocol

#: As uvicorn's.
ASGI_VERSIONS = {"version": "3.0", "spec_version": "2.3"}
#: Pauses in reading that are shorter are not watched: most of them are.
UNWATCHED_PAUSE_S = 0.5
#: As uvicorn's.
INVALID = "Invalid HTTP request received."
#: How long the lines are, each with its CRLFs, that chunks of a body may need.
CHUNK_LINE_BYTES = 24
#: These responses have no body, whatever their head says (RFC 9110, 6.4.1).
NO_BODY = frozenset({204, 304})


class Cycle(RequestResponseCycle):
    """uvicorn's, without bodies where none may be: the next response would begin there.

    Replicas send none; this is for the middlewares of the instance.
    """

    _bodiless = False

    async def send(self, message: Any) -> None:
        """ASGI ``send``."""
        if message["type"] == "http.response.start":
            status = message["status"]
            if status < 200:
                raise RuntimeError(f"Invalid HTTP status {status} in the response.")
            if status in NO_BODY and not self.response_started:
                self._bodiless = True
                lines = message.get("headers", ())
                headers = [line for line in lines if _fits(status, line)]
                start: Any = {**message, "headers": headers}
                await super().send(start)
                self.expected_content_length = 0  # of a 304, it is of what is not sent
                return
        elif self._bodiless and message.get("body"):
            message = {**message, "body": b""}
        await super().send(message)


def _fits(status: int, line: tuple[bytes, bytes]) -> bool:
    name = line[0].lower()
    return name != b"transfer-encoding" and (status, name) != (204, b"content-length")


class HttpProtocol(HttpToolsProtocol):
    """One connection of a client.

    A request begins when all of it has been parsed, or all that has come. One that is
    complete may go the quick way; for others uvicorn's cycle is made, and a task.

    uvicorn tells only the newest request of a connection that it was lost. With others
    sent behind it (pipelining), the one that runs would stream on to nobody. And it
    would take trailers for headers, of a request that has begun.
    """

    #: Called when the connection is lost; for whoever does not wait in ``receive``.
    on_lost: Callable[[], None] | None = None
    #: The quick way, if the server has one.
    express: Express | None = None
    _running: RequestResponseCycle | None = None
    #: A request's head has come, and nothing was begun for it.
    _pending = False
    _body = b""
    _keep_alive = True
    #: In a body; what is like a header there is a trailer.
    _in_body = False
    #: The request is a WebSocket's handshake; one that asks for another protocol.
    _websocket = _other_protocol = False
    #: At least what came since the head began, or ended, and is no body.
    _overhead = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self.flow = _WatchedFlow(transport, self.loop)

    def data_received(self, data: bytes) -> None:
        """Parse, and begin what is not complete yet."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response(INVALID)
            return
        except httptools.HttpParserUpgrade as upgrade:
            if self._websocket:
                self.handle_websocket_upgrade()
            else:
                self._go_on_without(data, upgrade.args[0])
            return
        if self._pending:
            self._begin_ordinarily(more_body=True)

    # What the parser calls: as uvicorn's, but that no cycle is made.

    def on_message_begin(self) -> None:
        """Take note of a new request."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._body = b""
        self._in_body = False
        self._overhead = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers are dropped (RFC 9110, 6.5.1)."""
        name = name.lower()
        if self._in_body:
            if name == b"connection":  # the parser heeds it, as it does framing
                raise ValueError("Connection can't be a trailer")
            return
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Make the request's scope, and keep it until its body is there."""
        parser = self.parser
        version = parser.get_http_version()
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": ASGI_VERSIONS,
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": "",
            "headers": self.headers,
            "state": {},
            CONNECTION_KEY: self,
        }
        self.scope = scope  # type: ignore[assignment]
        raw_path, scope["query_string"] = _split(self.url)
        path = raw_path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        self._overhead = 0
        self._websocket = self._other_protocol = False
        if parser.should_upgrade():
            self._websocket = self._should_upgrade()
            self._other_protocol = not self._websocket
            if self._websocket:
                return
        self._in_body = True
        self._keep_alive = version != "1.0" and parser.should_keep_alive()
        if self.cycle is None or self.cycle.response_complete:
            self._pending = True
        else:  # pipelined: it waits for its turn
            self.cycle = self._new_cycle(scope, self._keep_alive)
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._overhead -= len(body) + CHUNK_LINE_BYTES
        if not self._pending:
            return super().on_body(body)
        self._body += body
        if len(self._body) > EAGER_BODY_BYTES:
            self._begin_ordinarily(more_body=True)

    def on_message_complete(self) -> None:
        """Begin a request that has come whole."""
        self._in_body = False
        if not self._pending:
            return super().on_message_complete()
        if self.express is None or self.expect_100_continue:
            return self._begin_ordinarily(more_body=False)
        self._pending = False
        request = self.express.begin(self, self.scope, self._body, self._keep_alive)
        if request is not None:
            self.cycle = request  # type: ignore[assignment]
        else:
            self._begin(self.express.front, more_body=False)

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over; uvicorn writes the head anew to parse it again."""
        self.connections.discard(self)
        protocol = WebSocketProtocol(self.config, self.server_state, self.app_state)
        protocol.connection_made(self.transport)
        self.transport.set_protocol(protocol)
        self.flow.resume_reading()
        if self.flow.write_paused:
            protocol.pause_writing()
        protocol.begin(self.scope)

    # Parts.

    def _go_on_without(self, data: bytes, end: int) -> None:
        """Go on behind a head that asks for a protocol which is not known here."""
        raise NotImplementedError

    def take_over(self, request: ExpressRequest, scope: Any, body: bytes) -> None:
        """Go on with a request that the quick way has begun, in a task of its own."""
        cycle = self._new_cycle(scope, request.keep_alive)
        cycle.waiting_for_100_continue = False  # that may be about one behind it
        newest: Any = self.cycle
        if newest is request:  # else another one was sent behind it
            self.cycle = cycle
        assert self.express is not None
        self._start(cycle, self.express.front, body, more_body=False)

    def _begin_ordinarily(self, more_body: bool) -> None:
        self._pending = False
        self._begin(self.app, more_body)

    def _begin(self, app: Any, more_body: bool) -> None:
        self.cycle = self._new_cycle(self.scope, self._keep_alive)
        self._start(self.cycle, app, self._body, more_body)

    def _start(
        self, cycle: RequestResponseCycle, app: Any, body: bytes, more_body: bool
    ) -> None:
        cycle.body.extend(body)
        cycle.more_body = more_body
        if body or not more_body:
            cycle.message_event.set()
        self._start_asgi_task(cycle, app)

    def _new_cycle(self, scope: Any, keep_alive: bool) -> Cycle:
        return Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that runs, too."""
        super().connection_lost(exc)
        self.flow.stop()  # type: ignore[attr-defined]
        if self.scope is not None:
            self.scope.pop(CONNECTION_KEY, None)  # type: ignore[misc]
        running, self._running = self._running, None
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        if self.on_lost is not None:
            self.on_lost()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)


def _split(url: bytes) -> tuple[bytes, bytes]:
    """Return path and query of a request's target, as `httptools.parse_url` does."""
    if url.startswith(b"/") and b"#" not in url:  # all but what proxies are asked
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)
    return parsed.path, parsed.query or b""


class _WatchedFlow(FlowControl):
    """Close a connection whose client hangs up while reading is paused.

    A loop notices that by reading, so it would not until there is room for more.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(transport)
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._epoll: select.epoll | None = None

    def pause_reading(self) -> None:
        if not self.read_paused:
            self._timer = self._loop.call_later(UNWATCHED_PAUSE_S, self._watch)
        super().pause_reading()

    def resume_reading(self) -> None:
        self.stop()
        super().resume_reading()

    def stop(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _watch(self) -> None:
        self._timer = None
        if not hasattr(select, "epoll") or self._transport.is_closing():
            return  # not Linux: noticed when the reading goes on
        # The loop has the socket in an epoll of its own, and a loop can wait for an
        # epoll as for any other file.
        self._epoll = select.epoll()
        fd = self._transport.get_extra_info("socket").fileno()
        self._epoll.register(fd, select.EPOLLRDHUP)
        self._loop.add_reader(self._epoll.fileno(), self._hung_up)

    def _hung_up(self) -> None:
        self.stop()
        self._transport.abort()
