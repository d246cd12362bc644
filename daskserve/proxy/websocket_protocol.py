"""uvicorn's WebSocket protocol, with answers to all and an end to who reads none."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import (
    WebSocketsSansIOProtocol,
)
from websockets.datastructures import Headers
from websockets.http11 import Request

#: How long a client that does not answer, or was said goodbye to, may take to read
#: what was sent to it.
GOODBYE_S = 5.0


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One WebSocket, on the transport loop.

    uvicorn closes a connection whose client does not answer a ping, but what is to be
    sent has to be taken first: a client whose kernel is alive, and which never reads,
    would hold on to its replica for ever.
    """

    _deadline: asyncio.TimerHandle | None = None

    def begin(self, scope: Any) -> None:
        """Begin with the handshake in a request's scope.

        It is no larger than any head may be. websockets' own parser has lower limits,
        and says nothing when they are passed; so it gets a smaller one.
        """
        self.conn.receive_data(b"GET / HTTP/1.1\r\n\r\n")
        self.conn.events_received()
        target = scope["raw_path"] + b"?" + scope["query_string"]
        headers = Headers(
            (name.decode("ascii"), value.decode("ascii", "backslashreplace"))
            for name, value in scope["headers"]
        )
        self.handle_connect(Request(target.decode("ascii"), headers))
        if self.close_sent:  # refused
            self._abort_soon()
        else:
            self.scope["headers"] = scope["headers"]

    def keepalive_timeout(self) -> None:
        """Close, in a while by force."""
        super().keepalive_timeout()
        self._abort_soon()

    async def run_asgi(self) -> None:
        """Run the app and close, in a while by force."""
        await super().run_asgi()
        self._abort_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time limit."""
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _abort_soon(self) -> None:
        if self._deadline is None and not self.disconnected:
            # After `close_timeout`, uvicorn stops waiting for the client's goodbye.
            delay = (self.close_timeout if self.close_timer else 0) + GOODBYE_S
            self._deadline = self.loop.call_later(delay, self.transport.abort)
