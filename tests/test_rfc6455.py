"""What RFC 6455 says to frames: the kinds of cases that Autobahn's test suite has."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.test_guard import run
from tests.test_websocket_protocol import (
    BINARY,
    CLOSE,
    CONTINUE,
    MORE,
    PING,
    PONG,
    TEXT,
    frame,
    open_socket,
)

Frames = list[tuple[int, bytes]]
MIB = 2**20
VALID = "κόσμε 𝄞 \U0010ffff".encode()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({**event, "type": "websocket.send"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with run(echo, stall_timeout_s=10) as (_, port):
        yield port


def cut(first: int, payload: bytes, size: int) -> bytes:
    """Return a message in fragments of so many bytes."""
    parts = [payload[i : i + size] for i in range(0, len(payload), size)]
    frames = [frame(first - MORE, parts[0])]
    frames += [frame(CONTINUE - MORE, part) for part in parts[1:-1]]
    return b"".join([*frames, frame(CONTINUE, parts[-1])])


def closing(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


GOODBYE = closing(1000)
#: What a client sends, and all that comes before the server closes.
GOOD: dict[str, tuple[bytes, Frames]] = {
    **{
        f"{size} bytes": (
            frame(TEXT, b"*" * size) + frame(BINARY, b"\xfe" * size),
            [(TEXT, b"*" * size), (BINARY, b"\xfe" * size)],
        )
        for size in (0, 1, 125, 126, 127, 128, 65535, 65536)
    },
    "large": (frame(TEXT, b"*" * 4 * MIB), [(TEXT, b"*" * 4 * MIB)]),
    "large, in fragments": (cut(BINARY, b"*" * MIB, 4096), [(BINARY, b"*" * MIB)]),
    "byte by byte": (cut(TEXT, VALID, 1), [(TEXT, VALID)]),
    "empty fragments": (
        frame(TEXT - MORE) + frame(CONTINUE - MORE, b"x") + frame(CONTINUE),
        [(TEXT, b"x")],
    ),
    "ping": (frame(PING, b"\0\xff" * 62), [(PONG, b"\0\xff" * 62)]),
    "empty ping": (frame(PING), [(PONG, b"")]),
    "ten pings": (
        b"".join(frame(PING, b"%d" % i) for i in range(10)),
        [(PONG, b"%d" % i) for i in range(10)],
    ),
    "pong that nobody asked for": (
        frame(PONG, b"x") + frame(PING, b"y"),
        [(PONG, b"y")],
    ),
    "ping between fragments": (
        frame(TEXT - MORE, b"a") + frame(PING, b"p") + frame(CONTINUE, b"b"),
        [(PONG, b"p"), (TEXT, b"ab")],
    ),
    "character in two fragments": (
        frame(TEXT - MORE, VALID[:1]) + frame(CONTINUE, VALID[1:]),
        [(TEXT, VALID)],
    ),
    "null and noncharacters": (
        frame(TEXT, "\0\ufffe\uffff".encode()),
        [(TEXT, "\0\ufffe\uffff".encode())],
    ),
}
#: What ends with a code.
BAD: dict[str, tuple[bytes, int]] = {
    "long ping": (frame(PING, bytes(126)), 1002),
    "ping in fragments": (frame(PING - MORE, b"a") + frame(CONTINUE, b"b"), 1002),
    "close in fragments": (frame(CLOSE - MORE, b"\x03\xe8"), 1002),
    "rest of nothing": (frame(CONTINUE, b"x"), 1002),
    "rest of a whole message": (frame(TEXT) + frame(CONTINUE, b"x"), 1002),
    "message within another": (frame(TEXT - MORE, b"a") + frame(TEXT, b"b"), 1002),
    **{f"reserved bit {b:#x}": (frame(TEXT | b, b"x"), 1002) for b in (64, 32, 16)},
    **{
        f"reserved opcode {code}": (frame(0x80 | code, b"x"), 1002)
        for code in (3, 4, 7, 11, 12, 15)
    },
    "no mask": (b"\x81\x01x", 1002),
    **{
        f"text {text!r}": (frame(TEXT, b"a" + text), 1007)
        for text in (
            b"\xff", b"\x80", b"\xc0\xaf", b"\xce", b"\xe0\x80\xaf", b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", VALID[:-1],
        )
    },
    "text that ends early, in fragments": (cut(TEXT, VALID[:-1], 3), 1007),
    "close of one byte": (frame(CLOSE, b"\x03"), 1002),
    "close with a long reason": (closing(1000, b"r" * 124), 1002),
    "close with a reason that is no text": (closing(1000, b"\xce"), 1007),
    **{
        f"close with {code}": (closing(code), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65535)
    },
}  # fmt: skip
#: What a goodbye is answered with: itself.
GOODBYES = {
    "nothing": b"",
    **{
        f"{code}": code.to_bytes(2, "big") + reason
        for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999,
                     4000, 4999)
        for reason in (b"", b"r" * 123)
    },
}  # fmt: skip


def hear(sock: socket.socket) -> Frames:
    """Return the frames that come until the server hangs up."""
    data = bytearray()
    with suppress(ConnectionResetError):
        while part := sock.recv(MIB):
            data += part
    frames, at = Frames(), 0
    while at < len(data):
        size, begin = data[at + 1], at + 2
        assert size < 128, "a server's frame has no mask"
        if size > 125:
            begin += 2 if size == 126 else 8
            size = int.from_bytes(data[at + 2 : begin], "big")
        frames.append((data[at], bytes(data[begin : begin + size])))
        at = begin + size
    return frames


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", GOOD)
def test_messages_come_back(port: int, name: str, pieces: int) -> None:
    data, expected = GOOD[name]
    with open_socket(port) as sock:
        step = len(data) // pieces + 1
        for at in range(0, len(data), step):
            sock.sendall(data[at : at + step])
        came = Frames()
        while len(came) < len(expected):
            came.append(read_frame(sock))
        sock.sendall(GOODBYE)
        assert came == expected
        assert hear(sock) == [(CLOSE, b"\x03\xe8")]


def read_frame(sock: socket.socket) -> tuple[int, bytes]:
    first, size = read(sock, 2)
    if size > 125:
        size = int.from_bytes(read(sock, 2 if size == 126 else 8), "big")
    return first, read(sock, size)


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        assert (part := sock.recv(size - len(data))), data
        data += part
    return data


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_ends_with_a_code(port: int, name: str) -> None:
    data, code = BAD[name]
    with open_socket(port) as sock:
        sock.sendall(data)
        *others, (first, payload) = hear(sock)
    assert (first, int.from_bytes(payload[:2], "big")) == (CLOSE, code)
    assert all(first == TEXT for first, _ in others)  # what was whole before it


@pytest.mark.parametrize("name", GOODBYES)
def test_goodbye_is_answered_by_itself(port: int, name: str) -> None:
    payload = GOODBYES[name]
    with open_socket(port) as sock:
        sock.sendall(frame(CLOSE, payload) + frame(PING, b"after") + frame(CLOSE))
        ((first, answer),) = hear(sock)
    assert (first, answer[:2]) == (CLOSE, payload[:2])
