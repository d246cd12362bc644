"""WebSockets through a proxy: events both ways over one exchange; transport loop."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from daskserve.exceptions import ReplicaDiedError, RequestError
from daskserve.transport.call import Call
from daskserve.transport.channel import ConnectionLostError
from daskserve.transport.messages import CONNECT, CREDIT, ERROR, EVENT, PUSH, STOPPED

logger = logging.getLogger(__name__)

#: The replica, or the way to it, is gone; try again (RFC 6455, IANA registry).
SERVICE_RESTART = 1012


class WebSocketRelay:
    """Relay one WebSocket between its client and a replica.

    Parameters
    ----------
    call
        To the deployment.
    timeout_s
        Time until the app has to accept or refuse; None for no limit.
    """

    def __init__(self, call: Call, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._call = call
        self._call.on_grant = self._grant
        self._granted = 0
        self._room = asyncio.Event()
        self._accepted = False
        #: How the client has gone, if it has.
        self._gone: Message | None = None

    async def run(
        self, head: tuple[Any, ...], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Relay until one side has closed.

        Raises
        ------
        RequestError
            The WebSocket could not be handed to a replica; nothing was sent.
        """
        await receive()  # websocket.connect
        call = self._call
        timer: asyncio.TimerHandle | None = None
        if self._timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(
                self._timeout_s, call.time_up, self._timeout_s
            )
        pump = asyncio.ensure_future(self._pump(receive))
        fields = (*head, tuple(scope["subprotocols"]))
        try:
            message = await call.first(
                lambda exchange_id, replica_id: (
                    CONNECT,
                    exchange_id,
                    replica_id,
                    fields,
                ),
                retry_lost=True,  # nothing but the handshake was sent
            )
            while message[0] == PUSH:
                if timer is not None:
                    timer.cancel()
                await self._pass_on(message[2], send)
                message = await call.next()
            self._check_end(message)
        except (ReplicaDiedError, ConnectionLostError) as err:
            if not self._accepted:
                raise ReplicaDiedError(str(err)) from err
            logger.info("WebSocket to %r: %s", self._call.deployment, err)
            await send({"type": "websocket.close", "code": SERVICE_RESTART})
        except BaseException:
            call.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            pump.cancel()
            call.finish()

    def _check_end(self, message: tuple[Any, ...]) -> None:
        """Raise if the app did not just return."""
        if message[0] == ERROR and message[2] == STOPPED:
            raise ReplicaDiedError(message[4])
        if message[0] == ERROR and not self._accepted:
            raise RequestError("Internal Server Error")

    async def _pass_on(self, event: Message, send: Send) -> None:
        if event["type"] == "websocket.accept":
            self._accepted = True
        try:
            await send(event)
        except OSError:  # the client has gone, and the pump may wait for room
            self._call.send(EVENT, {"type": "websocket.disconnect", "code": 1006})
            return
        payload = event.get("bytes") or event.get("text") or event.get("body")
        if payload:
            self._call.send(CREDIT, len(payload))

    async def _pump(self, receive: Receive) -> None:
        """Pass on what the client sends, as fast as the app takes it."""
        while True:
            event = await receive()
            if event["type"] != "websocket.disconnect":
                while self._granted <= 0:
                    self._room.clear()
                    await self._room.wait()
                payload = event.get("bytes") or event.get("text") or b""
                self._granted -= len(payload)
            if event["type"] == "websocket.disconnect":
                self._gone = dict(event)  # sent again if no replica has it yet
            self._call.send(EVENT, dict(event))
            if self._gone is not None:
                return

    def _grant(self, more_bytes: int) -> None:
        self._granted += more_bytes
        self._room.set()
        if self._gone is not None:
            self._call.send(EVENT, self._gone)


async def refuse(send: Send, status: int, text: str) -> None:
    """Answer the handshake with an HTTP response instead."""
    body = text.encode()
    headers = [  # as in refusals of uvicorn's own
        (b"connection", b"close"),
        (b"content-length", b"%d" % len(body)),
        (b"content-type", b"text/plain; charset=utf-8"),
    ]
    start = {"type": "websocket.http.response.start", "status": status}
    await send({**start, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
