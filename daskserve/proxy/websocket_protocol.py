"""uvicorn's WebSocket protocol, with answers to all and an end to who reads none."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.websockets.websockets_sansio_impl import (
    WebSocketsSansIOProtocol,
)

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

    def data_received(self, data: bytes) -> None:
        """Parse, and answer a handshake that cannot be: uvicorn leaves it waiting."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.handshake_initiated = self.handshake_complete = self.close_sent = True
            # websockets takes lines up to 8 KiB; what it says of others is here.
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

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
