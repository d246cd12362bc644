"""The quick way of a request through a proxy: callbacks, and no task of its own.

Runs on the transport loop. Most requests come whole, find a replica with room and are
answered in one message. These are forwarded while they are parsed, and answered when
the message comes. All others go the ordinary way (`front`, the middlewares,
`forwarder`), from where they are: a call that has begun is not begun again.
"""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from daskserve.proxy.forwarded import ForwardedHeaders
from daskserve.proxy.forwarder import EAGER_BODY_BYTES, Forwarder, Forwarding
from daskserve.proxy.front import Front, access_logger, log_access
from daskserve.proxy.request import FULL_KEY, SCOPE_KEY, RequestInfo
from daskserve.transport.dispatcher import timeout_error
from daskserve.transport.messages import RESPONSE, Headers, Message

#: Timeouts that are shorter have a timer of their own, for others a sweep will do.
EXACT_TIMEOUT_S = 10.0
#: These decide about the connection, which is uvicorn's business.
_FRAMING = frozenset({b"transfer-encoding", b"connection", b"upgrade"})
#: These responses have no body, whatever their head says.
_NO_BODY = frozenset({204, 304})


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
        self.front: ASGIApp = front
        self.forwarder = forwarder
        self.running: set[ExpressRequest] = set()
        self._forwarded = forwarded
        self._authorized = front.authorized
        self._defaults: list[tuple[bytes, bytes]] = []
        self._default_lines = b""

    def begin(self, cycle: RequestResponseCycle) -> ASGIApp | None:
        """Forward a request that has come whole; else return the app to run for it."""
        scope: Any = cycle.scope
        self._forwarded.apply(scope)
        info = scope[SCOPE_KEY] = RequestInfo(scope)
        size = len(cycle.body)
        if (
            size > EAGER_BODY_BYTES
            or cycle.waiting_for_100_continue
            or FULL_KEY in scope
            or not self._authorized(scope, info)
            or self.forwarder.too_large(size)
        ):
            return self.front
        forwarding = info.forwarding = self.forwarder.prepare(scope, info)
        if forwarding is None:
            return self.front
        forwarding.body = bytes(cycle.body)
        request = ExpressRequest(self, cycle, info, forwarding)
        if not forwarding.call.begin_now(forwarding.make, request.news):
            return self.front
        self.running.add(request)
        info.connection.on_lost = request.lost
        if forwarding.deadline is not None:
            if forwarding.timeout_s < EXACT_TIMEOUT_S:  # type: ignore[operator]
                loop = info.connection.loop
                request.timer = loop.call_at(forwarding.deadline, request.time_up)
        return None

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
    """One request that waits for its replica.

    Parameters
    ----------
    express
        Of the server.
    cycle
        uvicorn's part of it.
    info, forwarding
        Our own.
    """

    __slots__ = ("_cycle", "_express", "_info", "forwarding", "timer")

    def __init__(
        self,
        express: Express,
        cycle: RequestResponseCycle,
        info: RequestInfo,
        forwarding: Forwarding,
    ) -> None:
        self.forwarding = forwarding
        self.timer: Any = None
        self._express = express
        self._cycle = cycle
        self._info = info

    def news(self) -> None:
        """Answer with the replica's first message, or go on the ordinary way."""
        cycle = self._cycle
        if cycle.disconnected:  # it was refused meanwhile
            return self.lost()
        message = self.forwarding.call.peek()
        if message is not None and message[0] == RESPONSE:
            if not cycle.flow.write_paused and self._answer(message):
                return None
        self._leave()
        self.forwarding.call.stop_listening()
        self._info.connection.start_ordinarily(cycle, self._express.front)
        return None

    def lost(self) -> None:
        """Note that the client has gone."""
        self._leave()
        self._info.status = 499
        self.forwarding.call.cancel()
        self._finish()

    def time_up(self) -> None:
        """Answer that no answer came in time."""
        forwarding = self.forwarding
        assert forwarding.timeout_s is not None
        forwarding.call.abort(
            timeout_error(self._info.deployment, forwarding.timeout_s)
        )

    def _answer(self, message: Message) -> bool:
        """Write a response; False if that is better left to uvicorn."""
        _, _, status, headers, body = message
        lines = _lines(headers, len(body))
        head_only = self.forwarding.head[0] == "HEAD"
        if lines is None or ((status in _NO_BODY or head_only) and body):
            return False
        cycle, info = self._cycle, self._info
        self._leave()
        parts = [
            STATUS_LINE[status],
            self._express.default_lines(cycle.default_headers),
            *lines,
            b"x-request-id: %s\r\n" % info.request_id.encode(),
            b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n",
            body,
        ]
        info.status = status
        cycle.response_started = cycle.response_complete = True
        cycle.transport.write(b"".join(parts))
        if not cycle.keep_alive:
            cycle.transport.close()
        self._finish()
        cycle.on_response()
        return True

    def _leave(self) -> None:
        self._express.running.discard(self)
        self._info.connection.on_lost = None
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
        low = name.lower()
        if low == b"content-length" and length is None:
            length = value
        elif low == b"content-length" or low in _FRAMING:
            return None
        lines.append(b"%s: %s\r\n" % (low, value))
    return lines if length == b"%d" % body_bytes else None
