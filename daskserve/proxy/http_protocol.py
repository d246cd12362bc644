"""uvicorn's HTTP protocol, with every request told when its client has gone."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    HttpToolsProtocol,
    RequestResponseCycle,
)

from daskserve.proxy.express import Express
from daskserve.proxy.request import CONNECTION_KEY

#: Pauses in reading that are shorter are not watched: most of them are.
UNWATCHED_PAUSE_S = 0.5


class HttpProtocol(HttpToolsProtocol):
    """One connection of a client, on the transport loop.

    uvicorn tells only the newest request of a connection that it was lost. With others
    sent behind it (pipelining), the one that runs would stream on to nobody.
    """

    #: Called when the connection is lost; for whoever does not wait in ``receive``.
    on_lost: Callable[[], None] | None = None
    #: The quick way, if the server has one.
    express: Express | None = None
    _running: RequestResponseCycle | None = None
    #: A request that begins when its body is there, or all that came is parsed.
    _unstarted: tuple[RequestResponseCycle, Any] | None = None
    _parsing = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self.flow = _WatchedFlow(transport, self.loop)

    def on_message_begin(self) -> None:
        """Make the connection known to its request."""
        super().on_message_begin()
        self.scope[CONNECTION_KEY] = self  # type: ignore[literal-required]

    def data_received(self, data: bytes) -> None:
        """Parse, and begin the request that is complete, or else is not."""
        self._parsing = True
        super().data_received(data)
        self._parsing = False
        if self._unstarted is not None:
            (cycle, app), self._unstarted = self._unstarted, None
            if not cycle.disconnected:  # it was not refused
                super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        """Begin a request that has come whole."""
        super().on_message_complete()
        if self._unstarted is not None:
            (cycle, app), self._unstarted = self._unstarted, None
            self._start_whole(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that runs, too."""
        super().connection_lost(exc)
        self.flow.stop()  # type: ignore[attr-defined]
        # Not by uvicorn after a reset: all of this would stay until the timer ends.
        self._unset_keepalive_if_required()
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
        if not cycle.more_body:
            self._start_whole(cycle, app)
        elif self._parsing and self.express is not None:
            self._unstarted = (cycle, app)
        else:
            super()._start_asgi_task(cycle, app)

    def _start_whole(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self.express is not None:
            app = self.express.begin(cycle)
        if app is not None:
            super()._start_asgi_task(cycle, app)

    def start_ordinarily(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Run `app` for a request that cannot go on the quick way."""
        super()._start_asgi_task(cycle, app)


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
