"""Cases of WebSockets."""

from __future__ import annotations

import asyncio
from typing import Any

from websockets.frames import Opcode

from tests.differential.cases import Case, Scripts, raw
from tests.differential.observe import Talk

script = Scripts()


def listen(app: str, path: str, name: str = "", **options: Any) -> Case:
    """Return the case of a client that only listens."""

    async def listening(talk: Talk) -> None:
        async with talk.websocket(path, **options) as socket:
            await socket.closed()

    return Case(app, name or f"WebSocket {path}", listening)


def refused(app: str, path: str, name: str = "", **options: Any) -> Case:
    """Return the case of a handshake that fails."""

    async def connecting(talk: Talk) -> None:
        await talk.refused(path, **options)

    return Case(app, name or f"WebSocket {path}", connecting)


def handshake(headers: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    """Return a handshake with these headers besides the host."""
    line = method + b" {prefix}/echo HTTP/" + version + b"\r\n"
    return line + b"Host: example.test\r\n" + headers + b"\r\n"


UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
VERSION = b"Sec-WebSocket-Version: 13\r\n"

HANDSHAKES = [
    raw("sockets", "no key", handshake(UPGRADE + VERSION)),
    raw("sockets", "bad key", handshake(UPGRADE + VERSION + KEY[:-8] + b"\r\n")),
    raw("sockets", "no version", handshake(UPGRADE + KEY)),
    raw("sockets", "old version", handshake(UPGRADE + KEY + VERSION[:-4] + b"8\r\n")),
    raw("sockets", "no upgrade", handshake(KEY + VERSION)),
    raw("sockets", "no connection", handshake(UPGRADE[21:] + KEY + VERSION)),
    raw("sockets", "POST", handshake(UPGRADE + KEY + VERSION, b"POST")),
    raw("sockets", "HTTP/1.0", handshake(UPGRADE + KEY + VERSION, version=b"1.0")),
    listen("sockets", "/tell"),
    listen("sockets", "/tell/a%20%C3%BC%2Fb//?q=%ff&x", name="path"),
    listen("sockets", "/tell", name="subprotocols", subprotocols=["a", "b"]),
    listen("sockets", "/tell", name="headers", origin="https://x.test", headers=[
        ("Cookie", "a=b"), ("X-Many", "1"), ("X-Many", "2"),
        ("X-Forwarded-Proto", "https")]),
    listen("sockets", "/tell", name="deflate", compression="deflate"),
    refused("websockets", "/nothing"),
    refused("websockets", "/denied"),
    refused("websocket-api", "/chat/5", name="without token"),
    refused("websocket-api", "/chat/x?token=t", name="not valid"),
    refused("items", "/items/5", name="where there is none"),
]  # fmt: skip

ENDINGS = [
    *(
        listen("sockets", f"/{path}")
        for path in (
            "close/",
            "close/1000-",
            "close/1001-going",
            "close/3000-" + "r" * 123,
            "close/4999-so%20long",
            "close/1011-ü",
            "close/1005-not%20allowed",
            "close/4000-" + "r" * 124,
            "raises-after",
            "returns-after",
            "accept-at-once",
            "accept-twice",
            "http-event",
            "send-nothing",
            "send-nonsense",
            "bad-code",
            "large",
        )
    ),
    *(
        refused("sockets", f"/{path}")
        for path in (
            "refuse",
            "deny/401",
            "deny/503",
            "deny/302",
            "deny-bare",
            "deny-half",
            "raises",
            "returns",
            "send-first",
        )
    ),
    listen("sockets", "/large", name="large, deflated", compression="deflate"),
]


@script("sockets")
async def messages(talk: Talk) -> None:
    for compression in (None, "deflate"):
        async with talk.websocket("/echo", compression=compression) as socket:
            for message in ("text", "ü\0€", "", b"", b"\x00\xff", "x" * 70_000):
                await socket.ask(message)
            await socket.ask(bytes(2_000_000))
            for n in range(100):
                await socket.send(str(n))
            await socket.receive(100)


@script("sockets")
async def fragments(talk: Talk) -> None:
    async with talk.websocket("/echo") as socket:
        await socket.ask(["one ", "", "message ", "ü"])
        await socket.ask([b"\x00", b"\xff"])


@script("sockets")
async def event_keys(talk: Talk) -> None:
    async with talk.websocket("/keys") as socket:
        await socket.ask("text")
        await socket.ask(b"bytes")


@script("sockets")
async def pings(talk: Talk) -> None:
    async with talk.websocket("/echo") as socket:
        await (await socket.socket.ping(b"are you there?"))
        await socket.ask("after the ping")
        await socket.socket.pong(b"unasked")
        await socket.ask("after the pong")


@script("sockets")
async def text_that_is_not_utf8(talk: Talk) -> None:
    async with talk.websocket("/echo") as socket:
        await socket.send(b"\xff\xfe", text=True)
        await socket.closed()


def frame(first_byte: int, payload: bytes, mask: bool = True) -> bytes:
    """Return a frame that a client of good manners would not send."""
    size = len(payload) | (0x80 if mask else 0)
    # A mask of zeros leaves the payload as it is.
    return bytes([first_byte, size]) + bytes(4 if mask else 0) + payload


FRAMES = {
    "continues nothing": frame(0x80, b"x"),
    "reserved bit": frame(0x80 | 0x20 | Opcode.TEXT, b"x"),
    "reserved opcode": frame(0x80 | 0x3, b"x"),
    "no mask": frame(0x80 | Opcode.TEXT, b"x", mask=False),
    "ping in parts": frame(Opcode.PING, b"x"),
    "close of one byte": frame(0x80 | Opcode.CLOSE, b"x"),
    "close code that is not allowed": frame(0x80 | Opcode.CLOSE, b"\x03\xed"),
    "close without code": frame(0x80 | Opcode.CLOSE, b""),
    "begins anew in a message": frame(Opcode.TEXT, b"x") + frame(Opcode.TEXT, b"y"),
}


def wrong(name: str) -> Case:
    """Return the case of a frame that breaks the protocol."""

    async def script(talk: Talk) -> None:
        async with talk.websocket("/echo") as socket:
            write(socket.socket, FRAMES[name])
            await socket.closed()

    return Case("sockets", f"frame: {name}", script)


def write(socket: Any, data: bytes) -> None:
    """Write bytes past the client's own protocol."""
    socket.transport.write(data)


@script("sockets")
async def too_large_a_message(talk: Talk) -> None:
    async with talk.websocket("/echo") as socket:
        try:
            await socket.send(bytes(17 * 1024 * 1024))
        except Exception as err:
            talk.note("error", type(err).__name__)
        await socket.closed()


async def watched(talk: Talk, *close: Any) -> None:
    """Close a WebSocket, and compare what the app sees of it."""
    async with talk.websocket(f"/watch/{talk.key}") as socket:
        await socket.send("first")
        if close:
            await socket.socket.close(*close)
        else:
            socket.socket.transport.abort()
    await talk.notes(2)


@script("sockets")
async def client_closes(talk: Talk) -> None:
    await watched(talk, 1000)


@script("sockets")
async def client_closes_with_a_reason(talk: Talk) -> None:
    await watched(talk, 4002, "enough, ü")


@script("sockets")
async def client_hangs_up(talk: Talk) -> None:
    await watched(talk)


@script("sockets")
async def after_the_app_closed(talk: Talk) -> None:
    async with talk.websocket(f"/after-close/{talk.key}") as socket:
        await socket.closed()
    await talk.notes(3)


@script("sockets")
async def after_a_refusal(talk: Talk) -> None:
    await talk.refused(f"/after-refusal/{talk.key}")
    await talk.notes(1)


@script("sockets")
async def after_a_denial(talk: Talk) -> None:
    await talk.refused(f"/after-denial/{talk.key}")
    await talk.notes(1)


@script("sockets")
async def what_send_raises(talk: Talk) -> None:
    async with talk.websocket(f"/catches/{talk.key}") as socket:
        await socket.closed()
    await talk.notes(8)


@script("sockets")
async def accepted_late(talk: Talk) -> None:
    async def connect() -> None:
        async with talk.websocket(f"/slowly/{talk.key}") as socket:
            await socket.closed()

    connecting = asyncio.ensure_future(connect())
    await talk.open()
    await connecting


@script("sockets")
async def many_at_once(talk: Talk) -> None:
    async def one(n: int) -> list[Any]:
        own = Talk(talk.target)
        async with own.websocket("/echo") as socket:
            return [await socket.ask(f"{n}-{i}") for i in range(5)]

    talk.note("all", await asyncio.gather(*map(one, range(10))))


# Frameworks.


@script("websockets")
async def endpoint_class(talk: Talk) -> None:
    async with talk.websocket("/counting") as socket:
        await socket.ask('{"a": 1}')
        await socket.send("no JSON")
        await socket.closed()


@script("websockets")
async def path_parameters(talk: Talk) -> None:
    async with talk.websocket("/by/a%20b") as socket:
        await socket.receive()
        await socket.ask("message")


@script("websocket-api")
async def chat(talk: Talk) -> None:
    async with talk.websocket("/chat/5?token=t") as socket:
        await socket.ask('{"x": [1]}')
        await socket.send('"stop"')
        await socket.closed()


CASES = [*HANDSHAKES, *ENDINGS, *map(wrong, FRAMES), *script.cases]
