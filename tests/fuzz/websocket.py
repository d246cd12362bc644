"""Frames after a handshake: valid messages come back, others end with a code."""

from __future__ import annotations

import asyncio
import random
import zlib
from contextlib import suppress

from tests.fuzz.mutations import harm
from tests.fuzz.target import OVER_S, Target

HANDSHAKE = (
    b"GET /echo/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
DEFLATE = (
    b"Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover\r\n"
)
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
FIN, COMPRESSED = 0x80, 0x40
#: With what a server may close (RFC 6455, 7.4.1, and the registry at IANA).
CODES = {1000, 1001, 1002, 1003, 1005, 1007, 1008, 1009, 1010, 1011, 1012, 1013}
#: Of applications: the server says what it was told.
OWN_CODES = {*range(3000, 5000)}


def frame(rng: random.Random, first: int, payload: bytes) -> bytes:
    """Return a client's frame, masked."""
    size, mask = len(payload), rng.randbytes(4)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 2**16:
        head = bytes((first, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0x80 | 127)) + size.to_bytes(8, "big")
    whole = (mask * (size // 4 + 1))[:size]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(whole, "big")
    return head + mask + masked.to_bytes(size, "big")


def _message(rng: random.Random, deflate: bool) -> tuple[list[bytes], bytes]:
    """Return a valid message in frames, with others between them, and its payload."""
    size = rng.choice([0, 1, 125, 126, 3000, 65535, 65536])
    text = rng.random() < 0.5
    payload = ("é" * (size // 2)).encode() if text else rng.randbytes(size)
    first, data = (TEXT if text else BINARY), payload
    if deflate and rng.random() < 0.5:
        packer = zlib.compressobj(wbits=-15)
        data = (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]
        first |= COMPRESSED
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 9])))
    frames = list[bytes]()
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        fin = FIN if len(frames) == len(cuts) else 0
        frames.append(frame(rng, fin | first, data[start:end]))
        first = 0
    mixed = []
    for each in frames:
        mixed.append(each)
        if rng.random() < 0.3:
            mixed.append(frame(rng, FIN | rng.choice([PING, PONG]), rng.randbytes(5)))
    return mixed, payload


def _odd(rng: random.Random) -> bytes:
    """Return what no client may send, or hardly any does."""
    match rng.randrange(7):
        case 0:
            return frame(
                rng, rng.randrange(256), rng.randbytes(rng.choice([0, 5, 200]))
            )
        case 1:
            return frame(rng, FIN | CLOSE, rng.randbytes(rng.choice([1, 2, 4, 130])))
        case 2:
            return frame(rng, FIN | TEXT, b"\xff\xfe" + rng.randbytes(9))
        case 3:
            return bytes((FIN | BINARY, 5)) + b"naked"
        case 4:
            return bytes((FIN | BINARY, 0xFF)) + rng.randbytes(8)
        case 5:
            return frame(rng, FIN | BINARY | COMPRESSED, rng.randbytes(200))
        case _:
            return rng.randbytes(rng.choice([1, 10, 1000]))


async def try_one(rng: random.Random, target: Target) -> str | None:
    """Open a WebSocket, say something; return what is wrong with what comes back."""
    deflate = rng.random() < 0.5
    data, expected = list[bytes](), list[bytes]()
    for _ in range(rng.choice([0, 1, 3, 20])):
        frames, payload = _message(rng, deflate)
        data += frames
        expected.append(payload)
    valid = rng.random() < 0.3
    if data and not valid and rng.random() < 0.5:
        at = rng.randrange(len(data))
        data[at] = harm(rng, data[at], rng.choice([1, 2]))
    elif not valid:
        data.append(_odd(rng))
    goodbye = frame(rng, FIN | CLOSE, (1000).to_bytes(2, "big")) if valid else b""
    heard = Heard()
    try:
        async with asyncio.timeout(OVER_S):
            head = HANDSHAKE + DEFLATE * deflate + b"\r\n"
            await _converse(
                target.port, head, b"".join(data), len(expected), goodbye, heard
            )
    except TimeoutError:
        return f"it is still open, and its client has gone; {heard}"
    except ValueError as err:
        return str(err)
    if heard.code is not None and heard.code not in CODES | OWN_CODES:
        return f"it was closed with {heard.code}"
    if valid and (heard.code != 1000 or heard.messages != expected):
        sizes = [*map(len, heard.messages)], [*map(len, expected)]
        return f"valid messages: {heard}; sizes that came and went: {sizes}"
    return None


async def _converse(
    port: int, head: bytes, data: bytes, count: int, goodbye: bytes, heard: Heard
) -> None:
    """Send data; then say goodbye when all came back, or hang up when nothing does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    patience_s = 5 if goodbye else 0.3
    try:
        writer.write(head)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 101 "):
            raise ValueError(f"the handshake was answered {answer!r}")
        writer.write(data)
        with suppress(ConnectionError):
            while True:
                if goodbye and len(heard.messages) >= count:
                    writer.write(goodbye)
                    goodbye = b""
                try:
                    async with asyncio.timeout(patience_s):
                        part = await reader.read(65536)
                except TimeoutError:
                    return
                if not part:
                    return
                heard.take(part)
    finally:
        writer.transport.abort()


class Heard:
    """What a server has sent.

    Attributes
    ----------
    messages
        Those that are complete.
    code
        With what it has closed; None: it has not.
    """

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.code: int | None = None
        self._data = b""
        self._message = b""
        self._squeezed = False
        self._inflate = zlib.decompressobj(wbits=-15)

    def __repr__(self) -> str:
        return f"{len(self.messages)} messages and code {self.code}"

    def take(self, data: bytes) -> None:
        """Take what came; raise ValueError if a server may not send it."""
        self._data += data
        while (found := self._frame()) is not None:
            first, payload = found
            opcode = first & 15
            if self.code is not None:
                raise ValueError("more comes after it has closed")
            if opcode >= 8 and (len(payload) > 125 or not first & FIN):
                raise ValueError(f"a malformed control frame: {first:#x} {payload!r}")
            if opcode == CLOSE:
                self.code = int.from_bytes(payload[:2], "big") if payload else 1005
            elif opcode in (TEXT, BINARY, 0):
                self._add(first, payload)
            elif opcode not in (PING, PONG):
                raise ValueError(f"an unknown opcode: {first:#x}")

    def _frame(self) -> tuple[int, bytes] | None:
        data = self._data
        if len(data) < 2:
            return None
        size, at = data[1], 2
        if size > 127:
            raise ValueError("a server's frame has a mask")
        if size > 125:
            at = 4 if size == 126 else 10
            size = int.from_bytes(data[2:at], "big")
        if len(data) < at + size:
            return None
        self._data = data[at + size :]
        return data[0], data[at : at + size]

    def _add(self, first: int, payload: bytes) -> None:
        if first & 15:
            self._squeezed = bool(first & COMPRESSED)
        self._message += payload
        if first & FIN:
            whole, self._message = self._message, b""
            if self._squeezed:
                whole = self._inflate.decompress(whole + b"\0\0\xff\xff")
            self.messages.append(whole)
