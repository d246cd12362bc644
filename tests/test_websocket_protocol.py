"""What one WebSocket can make a server hold, and do; no cluster."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_client

from tests.test_guard import (
    HANDSHAKE,
    LAST,
    ask,
    connect,
    run,
    tell,
)
from tests.utils import poll

MIB = 2**20
TEXT, BINARY, CONTINUE, CLOSE, PING, PONG = 0x81, 0x82, 0x80, 0x88, 0x89, 0x8A
MORE = 0x80  # taken from the first byte: another fragment follows
COMPRESSED = 0x40


def frame(first: int, payload: bytes = b"") -> bytes:
    """Return a client's frame; its mask changes nothing."""
    size = len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 65536:
        head = bytes((first, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0x80 | 127)) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


def squeeze(size: int) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return (packer.compress(bytes(size)) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Open:
    """An app that accepts, and receives when it may; answers requests as `tell`."""

    def __init__(self, receives: bool = True) -> None:
        self.gate = threading.Event()
        if receives:
            self.gate.set()
        self.protocols: list[Any] = []
        self.sizes: list[int] = []
        self.closed: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            return await tell(scope, receive, send)
        self.protocols.append(receive.__self__)
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            while not self.gate.is_set():
                await asyncio.sleep(0.01)
            event = await receive()
            if event["type"] == "websocket.disconnect":
                return self.closed.append(event["code"])
            self.sizes.append(len(event.get("bytes") or event.get("text") or b""))

    @property
    def held_bytes(self) -> int:
        """How much waits for the app, parsed or not."""
        protocol = self.protocols[0]
        queued = [event.get("bytes") or b"" for event in list(protocol.queue._queue)]
        return sum(map(len, queued)) + len(protocol._rest)


def open_socket(
    port: int, certificate: Path | None = None, extensions: bytes = b""
) -> socket.socket:
    sock = connect(port, certificate)
    sock.sendall(HANDSHAKE + extensions + b"\r\n")
    answer = b""
    while b"\r\n\r\n" not in answer:
        assert (part := sock.recv(1000)), answer
        answer += part
    assert answer.startswith(b"HTTP/1.1 101 ")
    return sock


DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=12\r\n"


def read_close(sock: socket.socket) -> int:
    """Return the code with which the server closes."""
    answer = b""
    with suppress(ConnectionResetError):
        while part := sock.recv(65536):
            answer += part
    at = answer.index(bytes((CLOSE,)))
    return int.from_bytes(answer[at + 2 : at + 4], "big")


def flood(sock: socket.socket, data: bytes, seconds: float) -> threading.Thread:
    """Send again and again in a thread."""

    def send() -> None:
        end = time.monotonic() + seconds
        with suppress(OSError):
            while time.monotonic() < end:
                sock.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_compressed_bomb_is_taken_message_by_message(certificate: Path | None) -> None:
    bomb = frame(BINARY | COMPRESSED, squeeze(16 * MIB))
    app = Open(receives=False)
    with (
        run(app, certificate) as (_, port),
        open_socket(port, certificate, DEFLATE) as sock,
    ):
        thread = flood(sock, bomb * 30, 1)
        poll(lambda: app.protocols[0].queue.qsize())
        time.sleep(0.5)
        assert app.held_bytes < 17 * MIB
        app.gate.set()
        poll(lambda: len(app.sizes) >= 10)
        assert app.held_bytes < 33 * MIB
        thread.join(10)
    assert set(app.sizes) == {16 * MIB}


def test_message_that_is_too_large(certificate: Path | None) -> None:
    for data in (
        frame(BINARY | COMPRESSED, squeeze(17 * MIB)),
        frame(BINARY, bytes(65536))[:2] + (17 * MIB).to_bytes(8, "big") + bytes(4),
    ):
        app = Open()
        with (
            run(app, certificate) as (_, port),
            open_socket(port, certificate, DEFLATE) as sock,
        ):
            sock.sendall(data)
            assert read_close(sock) == 1009
            poll(lambda app=app: app.closed == [1009])  # type: ignore[misc]


@pytest.mark.parametrize("piece", [b"", b"x"])
def test_tiny_fragments(certificate: Path | None, piece: bytes) -> None:
    app = Open()
    with run(app, certificate) as (_, port), open_socket(port, certificate) as sock:
        for size in (1, 900):  # a few are good
            parts = [frame(CONTINUE - MORE, piece)] * size
            sock.sendall(frame(BINARY - MORE) + b"".join(parts) + frame(CONTINUE))
            poll(lambda: app.sizes)
            assert app.sizes.pop() == size * len(piece)
        with suppress(OSError):
            sock.sendall(frame(TEXT - MORE) + frame(CONTINUE - MORE, piece) * 20_000)
        assert read_close(sock) == 1008
        poll(lambda: app.closed == [1008])


def test_many_fragments_of_a_large_message(certificate: Path | None) -> None:
    app = Open()
    with run(app, certificate) as (_, port), open_socket(port, certificate) as sock:
        piece = os.urandom(64)
        parts = frame(BINARY - MORE, piece) + frame(CONTINUE - MORE, piece) * 65_534
        sock.sendall(parts + frame(CONTINUE, piece))
        poll(lambda: app.sizes == [4 * MIB], 20)


def test_pings_without_reading(certificate: Path | None) -> None:
    app = Open()
    with run(app, certificate) as (_, port), open_socket(port, certificate) as sock:
        thread = flood(sock, frame(PING, b"p" * 125) * 1000, 1.5)
        thread.join(10)
        sock.sendall(frame(PING, b"the newest"))
        buffered = app.protocols[0].transport.get_write_buffer_size()
        assert buffered < MIB
        answer = b""
        while not answer.endswith(b"the newest"):
            assert (part := sock.recv(65536))
            answer = answer[-100:] + part


@pytest.mark.parametrize(
    "data",
    [frame(PING), frame(PONG), frame(BINARY), frame(TEXT - MORE) + frame(CONTINUE)],
    ids=["pings", "pongs", "messages", "fragments"],
)
def test_floods_leave_time_for_others(data: bytes) -> None:
    app = Open()
    with run(app) as (_, port):
        socks = [open_socket(port) for _ in range(3)]
        threads = [flood(sock, data * 20_000, 2) for sock in socks]
        assert median_wait(port, 1.5) < 0.25
        assert sum(len(p._rest) for p in app.protocols) < 3 * MIB
        for sock in socks:
            sock.close()
        for thread in threads:
            thread.join(10)


def test_message_of_many_steps_is_whole(certificate: Path | None) -> None:
    app = Open()
    with run(app, certificate) as (_, port), open_socket(port, certificate) as sock:
        sizes = [0, 1, 4095, 4096, 4097, 70_000, 3_000_000, 5]
        sock.sendall(b"".join(frame(BINARY, bytes(size)) for size in sizes))
        poll(lambda: app.sizes == sizes)
        sock.sendall(frame(CLOSE, (1000).to_bytes(2, "big")))
        assert read_close(sock) == 1000


class Talkative:
    """An app that accepts, sends all the time, and says how that ended."""

    def __init__(self) -> None:
        self.ends: list[BaseException] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "text": "x"})
                await asyncio.sleep(0.01)
        except BaseException as err:
            self.ends.append(err)
            raise


@pytest.mark.parametrize(
    ("code", "data"),
    [
        (1007, frame(TEXT, b"\xff\xfe")),
        (1007, frame(TEXT - MORE, b"\xc3") + frame(CONTINUE, b"\x28")),
        (1002, frame(0x83, b"of an unknown kind")),
        (1002, frame(CONTINUE, b"of nothing")),
        (1002, b"\x82\x05naked"),
    ],
)
def test_nonsense_ends_with_a_code_and_no_traceback(
    certificate: Path | None, code: int, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    app = Talkative()
    with run(app, certificate) as (_, port), open_socket(port, certificate) as sock:
        sock.sendall(data)
        assert read_close(sock) == code
        poll(lambda: app.ends)
    assert isinstance(app.ends[0], OSError)  # as when a client has gone
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (frame(PING, b"early"), b"\x8a\x05early"),
        (frame(TEXT, b"early"), b"\x81\x05early"),
        (frame(CLOSE, b"\x03\xe8"), b"\x88\x02\x03\xe8"),
        (b"\x82\x05naked", b"\x88\x13\x03\xea"),
        (frame(PING, b"p" * 100) * 1000, b"\x8a\x64" + b"p" * 100),
    ],
)
def test_frames_before_the_handshake_is_answered(
    certificate: Path | None,
    data: bytes,
    answer: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No client may send them; what they are answered with comes after the answer."""
    gate = threading.Event()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            return await tell(scope, receive, send)
        await receive()
        while not gate.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            await send({**event, "type": "websocket.send"})

    with run(late, certificate) as (_, port), connect(port, certificate) as sock:
        sock.sendall(HANDSHAKE + b"\r\n")
        time.sleep(0.05)  # what comes in one packet with it is nobody's
        sock.sendall(data)
        time.sleep(0.05)
        assert b" 200 " in ask(port, LAST, certificate)
        gate.set()
        came = b""
        while answer not in came:
            assert (part := sock.recv(65536)), came
            came += part
    head, _, frames = came.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert frames.startswith(answer)
    assert "Traceback" not in caplog.text and "Fatal error" not in caplog.text


async def echo(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        return await tell(scope, receive, send)
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({**event, "type": "websocket.send"})


def median_wait(port: int, seconds: float) -> float:
    """Return how long a request takes, tried for so long."""
    took = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        assert b" 200 " in ask(port, LAST)
        took.append(time.monotonic() - began)
    return sorted(took)[len(took) // 2]


def wait_beside(
    act: Callable[[int], object], port: int, end: Callable[[], None]
) -> float:
    """Return how long a request takes while eight clients do something."""
    threads = [threading.Thread(target=act, args=(port,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.2)  # until all are at it
        return median_wait(port, 2)
    finally:
        end()
        for thread in threads:
            thread.join(10)


@pytest.mark.parametrize("size", [MIB // 2, 16 * MIB, 17 * MIB])
def test_bombs_leave_time_for_others(size: int) -> None:
    bomb = frame(BINARY | COMPRESSED, squeeze(size))
    ended = threading.Event()
    socks = set[socket.socket]()

    def throw(port: int) -> None:
        while not ended.is_set():
            with open_socket(port, None, DEFLATE) as sock, suppress(OSError):
                socks.add(sock)
                while not ended.is_set():
                    sock.sendall(bomb)

    def end() -> None:
        ended.set()
        for sock in list(socks):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    with run(Open()) as (_, port):
        assert wait_beside(throw, port, end) < 0.1


def test_large_answers_leave_time_for_others() -> None:
    """To compress takes longer than to inflate."""
    large = bytes(16 * MIB)
    ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            return await tell(scope, receive, send)
        await receive()
        await send({"type": "websocket.accept"})
        while not ended.is_set():
            await send({"type": "websocket.send", "bytes": large})

    def drink(port: int) -> None:
        with open_socket(port, None, DEFLATE) as sock:
            while sock.recv(1 << 20):
                pass

    with run(app) as (_, port):
        assert wait_beside(drink, port, ended.set) < 0.1


@contextmanager
def client(port: int, certificate: Path | None) -> Iterator[ClientConnection]:
    """Connect by a library, which compresses."""
    context = None
    if certificate is not None:
        context = ssl.create_default_context(cafile=certificate)
        context.check_hostname = False
    scheme = "ws" if context is None else "wss"
    with connect_client(
        f"{scheme}://127.0.0.1:{port}", ssl=context, max_size=None, max_queue=None
    ) as websocket:
        yield websocket


def test_compressed_messages_are_whole_and_in_order(certificate: Path | None) -> None:
    sizes = [0, 1, 65_535, 65_536, 65_537, 3_000_000, 5]
    sent: list[Any] = [make(size) for size in sizes for make in (bytes, os.urandom)]
    sent += ["é" * size for size in sizes]
    with run(echo, certificate) as (_, port), client(port, certificate) as websocket:
        for message in sent:
            websocket.send(message)
            websocket.ping()
            half = len(message) // 2
            websocket.send(iter([message[:half], message[half:]]))
        for message in sent:
            assert websocket.recv(10) == message
            assert websocket.recv(10) == message
    assert websocket.protocol.close_code == 1000


def test_messages_before_a_goodbye(certificate: Path | None) -> None:
    app = Open()
    with (
        run(app, certificate) as (_, port),
        open_socket(port, certificate, DEFLATE) as sock,
    ):
        bomb = frame(BINARY | COMPRESSED, squeeze(MIB))
        goodbye = frame(CLOSE, (1000).to_bytes(2, "big"))
        sock.sendall(bomb + frame(BINARY, b"x") + goodbye)
        assert read_close(sock) == 1000
        poll(lambda: app.closed == [1000])
        assert app.sizes == [MIB, 1]


def test_two_senders_do_not_mix_their_messages() -> None:
    async def talk(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        large = {"type": "websocket.send", "bytes": bytes(3 * MIB)}
        small = {"type": "websocket.send", "text": "small"}
        await asyncio.gather(*(send(event) for event in [large, small] * 3))
        await receive()

    with run(talk) as (_, port), client(port, None) as websocket:
        assert [websocket.recv(10) for _ in range(6)] == [bytes(3 * MIB), "small"] * 3


@pytest.mark.parametrize(
    ("code", "data"),
    [
        (1002, frame(BINARY | COMPRESSED, b"\xff" * 9)),
        (1002, frame(BINARY | COMPRESSED, squeeze(MIB)) + frame(0x83)),
        (1007, frame(TEXT | COMPRESSED, b"\x00\x02\x00\xfd\xff\xff\xfe")),
        (
            1009,
            frame(BINARY - MORE | COMPRESSED, squeeze(9 * MIB) + b"\x00\x00\xff\xff")
            + frame(CONTINUE, squeeze(9 * MIB)),
        ),
    ],
    ids=["not compressed", "of an unknown kind", "no UTF-8", "too large"],
)
def test_compressed_nonsense(
    certificate: Path | None, code: int, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    app = Open()
    with (
        run(app, certificate) as (_, port),
        open_socket(port, certificate, DEFLATE) as sock,
    ):
        sock.sendall(data)
        assert read_close(sock) == code
        poll(lambda: app.closed == [code])
    assert "Traceback" not in caplog.text


def test_last_block_is_not_the_last_message() -> None:
    """As in RFC 7692, 7.2.3.4; nothing is kept of what a decompressor is done with."""
    hello = bytes.fromhex("f3 48 cd c9 c9 07 00 00")
    inflate = zlib.decompressobj(-12)
    with run(echo) as (_, port), open_socket(port, None, DEFLATE) as sock:
        for _ in range(3):
            sock.sendall(frame(TEXT | COMPRESSED, hello))
            answer = sock.recv(100)
            packed = answer[2:] + b"\x00\x00\xff\xff"
            assert inflate.decompress(packed) == b"Hello", answer


def test_memory_is_free_when_a_connection_ends(certificate: Path | None) -> None:
    kept: list[weakref.ref[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kept.append(weakref.ref(receive.__self__))
        kept.append(weakref.ref(receive.__self__.conn))
        await echo(scope, receive, send)

    gc.collect()
    gc.disable()
    try:
        with run(app, certificate) as (_, port):
            with open_socket(port, certificate, DEFLATE) as sock:
                sock.sendall(frame(BINARY | COMPRESSED, squeeze(MIB)) * 2)
                sock.recv(1000)
            assert kept
            poll(lambda: [ref() for ref in kept] == [None, None])
    finally:
        gc.enable()


@pytest.mark.parametrize("extensions", [b"", DEFLATE])
def test_nonsense_after_a_goodbye(
    extensions: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody looks at it any more; it ends when the client says goodbye as well."""

    async def leave(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        await send({"type": "websocket.close", "code": 3001})

    packed = COMPRESSED if extensions else 0
    with run(leave) as (_, port), open_socket(port, None, extensions) as sock:
        goodbye = (3001).to_bytes(2, "big")
        sock.sendall(frame(TEXT))
        assert sock.recv(100) == bytes((CLOSE, 2)) + goodbye
        sock.sendall(frame(TEXT | packed, b"\xff\xff") * 3 + frame(CLOSE, goodbye))
        assert sock.recv(100) == b""
    assert "Traceback" not in caplog.text and "Fatal error" not in caplog.text
