"""uvicorn's WebSocket protocol, with bounds for clients that mean ill or read nothing.

uvicorn parses all that one read has got. Compressed, that can be hundreds of MiB of
messages; of frames of a few bytes, it keeps all others waiting for long.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import (
    WebSocketsSansIOProtocol,
)
from websockets.datastructures import Headers
from websockets.frames import Frame
from websockets.http11 import Request

#: How long a client that does not answer, or was said goodbye to, may take to read
#: what was sent to it.
GOODBYE_S = 5.0
#: So much is parsed at once. zlib makes up to 1032 times as much of it.
STEP_BYTES = 4096
#: How long a connection parses before others have a turn.
TURN_S = 0.004
#: Fragments that a message may have, besides one for each so many bytes of it.
MAX_FRAGMENTS = 1000
FRAGMENT_BYTES = 32
#: How a frame begins that is a pong.
_PONG = b"\x8a"


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One WebSocket, on the transport loop.

    uvicorn closes a connection whose client does not answer a ping, but what is to be
    sent has to be taken first: a client whose kernel is alive, and which never reads,
    would hold on to its replica for ever.
    """

    _deadline: asyncio.TimerHandle | None = None
    #: What has come and is not parsed yet; nothing is read meanwhile.
    _rest = memoryview(b"")
    _turn: asyncio.Handle | None = None
    _fragments = 0
    #: It was closed here, not by the app, which need not know yet.
    _gave_up = False
    #: The answer to the newest ping, if the client does not take what is sent to it.
    _pong = b""

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

    def data_received(self, data: bytes) -> None:
        """Parse, as much of it as may be at once."""
        if len(data) <= STEP_BYTES and not self._rest and self.handshake_complete:
            super().data_received(data)
            return
        self._rest = memoryview(bytes(self._rest) + data)
        if not self.handshake_complete:
            # Too early: a pong or a goodbye would go out before the handshake's answer.
            self.transport.pause_reading()
        elif self._turn is None and not self.read_paused:
            self._parse()

    def _parse(self) -> None:
        self._turn = None
        self.transport.pause_reading()
        end = self.loop.time() + TURN_S
        while self._rest and not self.read_paused:
            if self.transport.is_closing():
                self._rest = memoryview(b"")
                return
            step, self._rest = self._rest[:STEP_BYTES], self._rest[STEP_BYTES:]
            super().data_received(bytes(step))
            if self.loop.time() > end:
                break
        if not self.read_paused:
            self._go_on()

    def _go_on(self) -> None:
        """Parse what is left when others have had a turn; read on if nothing is."""
        if not self._rest:
            self.transport.resume_reading()
        elif self._turn is None:
            self._turn = self.loop.call_soon(self._parse)

    async def receive(self) -> Any:
        """ASGI ``receive``."""
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._go_on()
        return message

    async def send(self, message: Any) -> None:
        """ASGI ``send``."""
        if self._gave_up:
            raise ClientDisconnected
        await super().send(message)
        if (
            self._rest and not self.read_paused
        ):  # it has closed, and looks for an answer
            self.transport.pause_reading()
            self._go_on()

    def handle_text(self, event: Frame) -> None:
        """Begin a message."""
        self._fragments = 0
        super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        """Begin a message."""
        self._fragments = 0
        super().handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        """Add a fragment to the message; not as an object of its own."""
        if self.close_sent or not self.frames:
            return
        whole: Any = self.frames[0]
        if not isinstance(whole, bytearray):
            whole = bytearray(whole)
        whole += event.data
        self._fragments += 1
        if self._fragments > MAX_FRAGMENTS + len(whole) // FRAGMENT_BYTES:
            self.frames = []
            self.conn.fail(1008, "too many fragments")
            self.handle_parser_exception()
            return
        self.frames = [bytes(whole) if event.fin else whole]
        if event.fin:
            self.send_receive_event_to_app()

    def handle_ping(self) -> None:
        """Answer, if the client takes the answer: else the newest is enough."""
        if self.writable.is_set():
            super().handle_ping()
            return
        for frame in self.conn.data_to_send():
            if frame[:1] == _PONG:
                self._pong = frame
            else:
                self.transport.write(frame)

    def resume_writing(self) -> None:
        """Note that the client has taken what waited."""
        super().resume_writing()
        pong, self._pong = self._pong, b""
        if pong and not self.close_sent:
            self.transport.write(pong)

    def send_receive_event_to_app(self) -> None:
        """Hand on a message; uvicorn's prints a traceback for one that is no UTF-8."""
        if self.curr_msg_data_type == "text" and not _is_utf8(self.frames):
            self.frames = []
            self.conn.send_close(1007)
            self.handle_parser_exception()
            return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Close, in a while by force."""
        self._gave_up = True
        super().handle_parser_exception()
        self._abort_soon()

    def keepalive_timeout(self) -> None:
        """Close, in a while by force."""
        super().keepalive_timeout()
        self._gave_up = self.close_sent
        self._abort_soon()

    async def run_asgi(self) -> None:
        """Run the app and close, in a while by force."""
        await super().run_asgi()
        self._abort_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time limit."""
        super().connection_lost(exc)
        self._rest = memoryview(b"")
        if self._turn is not None:
            self._turn.cancel()
        if self._deadline is not None:
            self._deadline.cancel()

    def _abort_soon(self) -> None:
        if self._deadline is None and not self.disconnected:
            # After `close_timeout`, uvicorn stops waiting for the client's goodbye.
            delay = (self.close_timeout if self.close_timer else 0) + GOODBYE_S
            self._deadline = self.loop.call_later(delay, self.transport.abort)


def _is_utf8(parts: list[bytes]) -> bool:
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
