"""The quick way of a request through a proxy: callbacks, and no task of its own.

Runs on the transport loop. Most requests come whole and are answered in one message, at
once or after a wait for a replica. These are forwarded while they are parsed, and
answered when the message comes. All others go the ordinary way (`front`, the
middlewares, `forwarder`), from where they are: what has begun is not begun again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from daskserve.exceptions import RequestError
from daskserve.proxy.forwarded import FORWARDED_NAMES, ForwardedHeaders
from daskserve.proxy.forwarder import Forwarder, Forwarding, refuse
from daskserve.proxy.front import Front, access_logger, log_access
from daskserve.proxy.request import FULL_KEY, SCOPE_KEY, RequestInfo
from daskserve.transport.messages import REFUSED, RESPONSE, Headers, Message

#: Timeouts that are shorter have a timer of their own, for others a sweep will do.
EXACT_TIMEOUT_S = 10.0
#: These decide about the connection, which is uvicorn's business.
_FRAMING = frozenset(
    {b"content-length", b"transfer-encoding", b"connection", b"upgrade"}
)


class Express:
    """Requests of one server that go the quick way.

    Parameters
    ----------
    forwarded, front, forwarder
        The ordinary way; there are no middlewares in it.
    """

    def __init__(
        self, forwarded: ForwardedHeaders, front: Front, forwarder: Forwarder
    ) -> None:
        #: The ordinary way of a request that was looked at here.
        self.front: ASGIApp = front
        self.forwarder = forwarder
        self.running: set[ExpressRequest] = set()
        self._forwarded = forwarded
        self._authorized = front.authorized
        self._defaults: list[tuple[bytes, bytes]] = []
        self._default_lines = b""

    def begin(
        self, connection: Any, scope: Any, body: bytes, keep_alive: bool
    ) -> ExpressRequest | None:
        """Forward a request that has come whole; None if `front` is to run for it."""
        info = scope[SCOPE_KEY] = RequestInfo(scope)
        if not FORWARDED_NAMES.isdisjoint(info.headers):
            self._forwarded.apply(scope)
        if (
            FULL_KEY in scope
            or not self._authorized(scope, info)
            or self.forwarder.too_large(len(body))
        ):
            return None
        forwarding = info.forwarding = self.forwarder.prepare(scope, info)
        if forwarding is None:
            return None
        forwarding.body = body
        request = ExpressRequest(self, connection, scope, forwarding, keep_alive)
        try:
            if not forwarding.call.begin(forwarding.make, request.news):
                return None
        except RequestError as err:
            request.refuse(err)
            return request
        self.running.add(request)
        connection.on_lost = request.lost
        if forwarding.deadline is not None:
            if forwarding.timeout_s < EXACT_TIMEOUT_S:  # type: ignore[operator]
                request.timer = connection.loop.call_at(
                    forwarding.deadline, request.time_up
                )
        return request

    def sweep(self, now: float) -> None:
        """End what has waited for its replica for too long."""
        for request in list(self.running):
            deadline = request.forwarding.deadline
            if deadline is not None and now > deadline:
                request.time_up()

    def default_lines(self, defaults: list[tuple[bytes, bytes]]) -> bytes:
        """Return the server's own headers; its list is another one each second."""
        if defaults is not self._defaults:
            self._defaults = defaults
            self._default_lines = b"".join(b"%s: %s\r\n" % line for line in defaults)
        return self._default_lines


class ExpressRequest:
    """One request that waits for its replica, in the place of uvicorn's cycle.

    Parameters
    ----------
    express
        Of the server.
    connection
        Its protocol.
    scope
        The ASGI scope; has our own info, too.
    forwarding
        What was sent to the replica.
    keep_alive
        Whether the connection stays after the response.
    """

    __slots__ = ("_connection", "_express", "_info", "_scope", "disconnected",
                 "forwarding", "keep_alive", "response_complete", "response_started",
                 "timer")  # fmt: skip

    #: Its body is there.
    more_body = False
    #: uvicorn wakes the app of a request so; there is none here.
    message_event = asyncio.Event()

    def __init__(
        self,
        express: Express,
        connection: Any,
        scope: Any,
        forwarding: Forwarding,
        keep_alive: bool,
    ) -> None:
        self.forwarding = forwarding
        self.keep_alive = keep_alive
        self.response_started = self.response_complete = False
        #: It was refused, or its client has gone.
        self.disconnected = False
        self.timer: Any = None
        self._express = express
        self._connection = connection
        self._scope = scope
        self._info: RequestInfo = scope[SCOPE_KEY]

    def news(self) -> None:
        """Answer with the replica's first message, or go on the ordinary way."""
        if self.disconnected:
            return self.lost()
        connection, call = self._connection, self.forwarding.call
        message, failure = call.peek(), call.failure
        if message is not None and message[0] == RESPONSE:
            if not connection.flow.write_paused and self._answer(message):
                return None
        elif message is not None and message[0] == REFUSED:
            try:
                return call.try_again(message[2])
            except RequestError as err:
                failure = err
        if isinstance(failure, RequestError) and not connection.flow.write_paused:
            call.cancel()
            return self.refuse(failure)
        self._leave()
        call.stop_listening()
        connection.take_over(self, self._scope, self.forwarding.body)
        return None

    def refuse(self, error: RequestError) -> None:
        """Answer that the request could not be served."""
        status, headers, body = refuse(self._info, error)
        self._write(status, _lines(headers, len(body)) or [], body)

    def lost(self) -> None:
        """Note that the client has gone."""
        self._leave()
        self.response_complete = True
        self._info.status = 499
        self.forwarding.call.cancel()
        self._finish()

    def time_up(self) -> None:
        """Answer that no answer came in time."""
        forwarding = self.forwarding
        assert forwarding.timeout_s is not None
        forwarding.call.time_up(forwarding.timeout_s)

    def _answer(self, message: Message) -> bool:
        """Write a response; False if that is better left to uvicorn."""
        _, _, status, headers, body = message
        lines = _lines(headers, len(body))
        if lines is None:
            return False
        self._write(status, lines, body)
        return True

    def _write(self, status: int, lines: list[bytes], body: bytes) -> None:
        connection, info = self._connection, self._info
        self._leave()
        lines += (
            b"x-request-id: %s\r\n" % info.request_id.encode(),
            b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n",
            b"" if self.forwarding.head[0] == "HEAD" else body,
        )
        defaults = self._express.default_lines(connection.server_state.default_headers)
        info.status = status
        self.response_started = self.response_complete = True
        connection.transport.write(STATUS_LINE[status] + defaults + b"".join(lines))
        if not self.keep_alive:
            connection.transport.close()
        self._finish()
        connection.on_response_complete()

    def _leave(self) -> None:
        self._express.running.discard(self)
        self._connection.on_lost = None
        if self.timer is not None:
            self.timer.cancel()

    def _finish(self) -> None:
        self._express.forwarder.finish(self.forwarding)
        if access_logger.isEnabledFor(logging.INFO):
            log_access(self.forwarding.head[0], self._info)


def _lines(headers: Headers, body_bytes: int) -> list[bytes] | None:
    """Return the lines of a head, if it says how long the body is, and nothing odd."""
    length: bytes | None = None
    lines = []
    for name, value in headers:
        if name in _FRAMING:
            if name != b"content-length" or length is not None:
                return None
            length = value
        lines.append(b"%s: %s\r\n" % (name, value))
    return lines if length == b"%d" % body_bytes else None
