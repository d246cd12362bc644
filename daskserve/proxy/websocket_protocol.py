"""uvicorn's WebSocket protocol, with bounds for clients that mean ill or read nothing.

uvicorn parses all that one read has got. Compressed, that can be hundreds of MiB of
messages; of frames of a few bytes, it keeps all others waiting for long. So does
whatever many connections do at the same time: here they take turns.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import (
    WebSocketsSansIOProtocol,
)
from websockets.datastructures import Headers
from websockets.exceptions import InvalidState
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request

from daskserve.proxy.deflate import SLICE_BYTES, Deflate, PackedFrame
from daskserve.proxy.turns import TURNS_S, anyone_waits, turn, wait_for_turn

#: How long a client that does not answer, or was said goodbye to, may take to read
#: what was sent to it.
GOODBYE_S = 5.0
#: So much is parsed at once.
STEP_BYTES = 4096
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
    #: Whether it waits for its turn to parse.
    _in_line = False
    _deflate: Deflate | None = None
    _fragments = 0
    #: It was closed here, not by the app, which need not know yet.
    _gave_up = False
    #: The answer to the newest ping, if the client does not take what is sent to it.
    _pong = b""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: What is parsed, behind a message that is still to be inflated.
        self._events: deque[Any] = deque()
        #: Held by whoever sends a message: it may go out in fragments.
        self._sending = asyncio.Lock()

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
        if self.conn.extensions:
            (extension,) = self.conn.extensions
            self._deflate = Deflate(cast(PerMessageDeflate, extension))
            self.conn.extensions = [self._deflate]

    def data_received(self, data: bytes) -> None:
        """Parse, as much of it as may be at once."""
        if not (
            len(data) > STEP_BYTES
            or self._rest
            or self._events
            or not self.handshake_complete
            or anyone_waits(self.loop)
        ):
            super().data_received(data)
            if self._events and not self._handle(self.loop.time() + TURNS_S):
                self._go_on()
            return
        self._rest = memoryview(bytes(self._rest) + data)
        if not self.handshake_complete:
            # Too early: a pong or a goodbye would go out before the handshake's answer.
            self.transport.pause_reading()
        elif not self.read_paused:
            self._go_on()

    def _go_on(self) -> None:
        """Parse what is left in the next turn; read on if nothing is."""
        if self._in_line:
            return
        if not self._rest and not self._events:
            self.transport.resume_reading()
        else:
            self._in_line = True
            self.transport.pause_reading()
            wait_for_turn(self.loop, self._parse)

    def _parse(self, end: float) -> bool:
        """Parse until that time; return whether it is to go on then."""
        while not self.transport.is_closing():
            if not self._handle(end):
                return True
            if self.read_paused or not self._rest:
                break
            step, self._rest = self._rest[:STEP_BYTES], self._rest[STEP_BYTES:]
            super().data_received(bytes(step))
            if self.loop.time() > end:
                return True
        else:
            self._forget()
        self._in_line = False
        if not self.read_paused and not self.transport.is_closing():
            self._go_on()
        return False

    def handle_events(self) -> None:
        """Handle what is parsed, or leave it for `_handle` if it may be compressed."""
        if self._deflate is None:
            super().handle_events()
        else:
            self._events += self.conn.events_received()

    def _handle(self, end: float) -> bool:
        """Handle what is parsed until that time; return whether that was all."""
        events = self._events
        while events:
            if isinstance(events[0], PackedFrame):
                if self.loop.time() > end:
                    return False
                if not self._inflate(events[0]):
                    continue
            event = events.popleft()
            self.conn.events.append(event)
            super().handle_events()
            event.data = b""  # the parser has it until the next one comes
        return True

    def _inflate(self, frame: PackedFrame) -> bool:
        """Inflate a slice of the first frame; return whether it is to be handled."""
        assert self._deflate is not None
        if self.close_sent:  # what still comes is nobody's
            self._events.popleft()
            return False
        before = sum(map(len, self.frames)) if frame.opcode is Opcode.CONT else 0
        try:
            done = self._deflate.inflate(frame)
        except zlib.error:
            self.conn.fail(CloseCode.PROTOCOL_ERROR, "decompression failed")
            self.handle_parser_exception()
            return False
        if before + len(frame.inflated or b"") > self.config.ws_max_size:
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, "the message is too large")
            self.handle_parser_exception()
            return False
        if done:
            frame.data, frame.inflated = bytes(frame.inflated or b""), None
        return done

    def _forget(self) -> None:
        self._rest = memoryview(b"")
        self._events.clear()

    async def receive(self) -> Any:
        """ASGI ``receive``."""
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._go_on()
        return message

    async def send(self, message: Any) -> None:
        """ASGI ``send``."""
        async with self._sending:
            if self._gave_up:
                raise ClientDisconnected
            payload = message.get("bytes") or message.get("text") or b""
            if len(payload) > SLICE_BYTES and self._compresses():
                await self._send_slices(payload)
            else:
                await super().send(message)
        # When it has closed, it looks for an answer.
        if (self._rest or self._events) and not self.read_paused:
            self._go_on()

    def _compresses(self) -> bool:
        is_open = self.handshake_complete and not self.close_sent
        return is_open and self._deflate is not None

    async def _send_slices(self, payload: str | bytes) -> None:
        """Send a message in fragments: to compress all at once takes long."""
        is_text = isinstance(payload, str)
        data = memoryview(payload.encode() if isinstance(payload, str) else payload)
        send: Callable[..., None]
        send = self.conn.send_text if is_text else self.conn.send_binary
        while data:
            await self.writable.wait()
            await turn(self.loop)
            if self.disconnected or self._gave_up:
                raise ClientDisconnected
            try:
                send(data[:SLICE_BYTES], fin=len(data) <= SLICE_BYTES)
            except InvalidState as err:
                raise ClientDisconnected from err
            self.transport.write(b"".join(self.conn.data_to_send()))
            send, data = self.conn.send_continuation, data[SLICE_BYTES:]

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
        if self.close_sent:  # what still comes is nobody's
            self.frames = []
            return
        if self.curr_msg_data_type == "text" and not _is_utf8(self.frames):
            self.frames = []
            self.conn.send_close(1007)
            self.handle_parser_exception()
            return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Close, in a while by force."""
        self._gave_up = True
        self._forget()
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
        self._forget()
        self.conn.parser.close()  # it holds the last frame, and is held by itself
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
