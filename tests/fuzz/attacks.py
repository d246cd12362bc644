"""Attacks by many clients: ``python -m tests.fuzz.attacks NAME PORT SECONDS``.

Whoever measures is another process: what an attacker takes of a processor is its own.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
import zlib
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from tests.fuzz.websocket import (
    BINARY,
    COMPRESSED,
    DEFLATE,
    FIN,
    HANDSHAKE,
    PING,
    frame,
)

MIB = 2**20
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
#: Handshakes that are to be refused.
MALFORMED = [
    HANDSHAKE.replace(b"GET", b"POST"),
    HANDSHAKE.replace(b"Version: 13", b"Version: 12"),
    HANDSHAKE.replace(b"AAAA==", b"A"),
    HANDSHAKE.replace(b"Connection: Upgrade", b"Connection: close"),
    HANDSHAKE.replace(b"Upgrade: websocket", b"Upgrade: websocket, \xff"),
    HANDSHAKE + b"Sec-WebSocket-Extensions: ;;=\r\n",
    HANDSHAKE + b"Sec-WebSocket-Key: BBBBBBBBBBBBBBBBBBBBBB==\r\n",
]


@asynccontextmanager
async def connected(
    port: int, head: bytes = b""
) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    """Connect, and open a WebSocket if there is a head for it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if head:
            writer.write(head + b"\r\n")
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 101 "), answer
        yield reader, writer
    finally:
        writer.transport.abort()


async def pour(writer: StreamWriter, data: bytes) -> None:
    """Send the same again and again."""
    while True:
        writer.write(data)
        await writer.drain()


async def drink(reader: StreamReader) -> None:
    """Read all that comes."""
    while await reader.read(65536):
        pass


async def silent(port: int) -> None:
    """Connect and say nothing."""
    async with connected(port) as (reader, _):
        await drink(reader)


async def handshake(port: int) -> None:
    """Try once a second to open a WebSocket, in a wrong way."""
    await asyncio.sleep(random.random())
    async with connected(port) as (reader, writer):
        writer.write(random.choice(MALFORMED) + b"\r\n")
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await drink(reader)
    await asyncio.sleep(random.random())


async def trailers(port: int) -> None:
    """Send trailers without an end."""
    async with connected(port) as (reader, writer):
        writer.write(POST + b"1\r\nx\r\n0\r\n")
        pouring = asyncio.create_task(pour(writer, b"X-Trailer: of many\r\n" * 100))
        try:
            await drink(reader)
        finally:
            pouring.cancel()


async def pings(port: int) -> None:
    """Send pings and read no pongs."""
    async with connected(port, HANDSHAKE) as (_, writer):
        await pour(writer, frame(random, FIN | PING, b"p" * 125) * 500)  # type: ignore[arg-type]


def bombs(size: int, count: int) -> Callable[[int], Awaitable[None]]:
    """Send messages that inflate to so many bytes, and read what comes back."""
    packer = zlib.compressobj(wbits=-15)
    packed = (packer.compress(bytes(size)) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]
    data = frame(random.Random(1), FIN | BINARY | COMPRESSED, packed) * count

    async def send(port: int) -> None:
        async with connected(port, HANDSHAKE + DEFLATE) as (reader, writer):
            pouring = asyncio.create_task(pour(writer, data))
            try:
                await drink(reader)
            finally:
                pouring.cancel()

    return send


@dataclass
class Attack:
    """What each of so many clients does again and again."""

    clients: int
    do: Callable[[int], Awaitable[None]]


ATTACKS = {
    "silent-tls": Attack(1000, silent),
    "handshakes": Attack(1000, handshake),
    "trailers": Attack(50, trailers),
    "bombs": Attack(10, bombs(16 * MIB, 1)),
    "small-bombs": Attack(10, bombs(MIB, 16)),
    "too-large": Attack(10, bombs(17 * MIB, 1)),
    "pings": Attack(20, pings),
}


async def run(attack: Attack, port: int, seconds: float) -> None:
    """Attack for so long."""
    end = time.monotonic() + seconds

    async def go_on() -> None:
        while time.monotonic() < end:
            try:
                await attack.do(port)
            except (OSError, IncompleteReadError):  # it was turned away
                await asyncio.sleep(0.01)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(go_on() for _ in range(attack.clients)))


if __name__ == "__main__":
    asyncio.run(run(ATTACKS[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3])))
