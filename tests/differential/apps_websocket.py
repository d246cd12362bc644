"""Raw ASGI apps of WebSockets."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.differential.apps_http import describe_scope
from tests.differential.asgi import ByPath, Memory, key_of


def text(data: Any) -> Message:
    return {"type": "websocket.send", "text": data}


async def accept(receive: Receive, send: Send, **options: Any) -> None:
    assert await receive() == {"type": "websocket.connect"}
    await send({"type": "websocket.accept", **options})


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    """Accept the last subprotocol and tell the scope."""
    wanted = scope["subprotocols"]
    headers = [(b"X-App", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    protocol = wanted[-1] if wanted else None
    await accept(receive, send, subprotocol=protocol, headers=headers)
    found = describe_scope(scope)
    random = "sec-websocket-key"
    found["headers"] = [h for h in found["headers"] if random not in str(h)]
    await send(text(str(found)))
    await send({"type": "websocket.close"})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    while (event := await receive())["type"] == "websocket.receive":
        await send({**event, "type": "websocket.send"})


async def keys(scope: Scope, receive: Receive, send: Send) -> None:
    """Tell what is in the events."""
    await accept(receive, send)
    while (event := await receive())["type"] == "websocket.receive":
        await send(text(str(sorted(event))))


async def close(scope: Scope, receive: Receive, send: Send) -> None:
    """Close as the path says: code, then perhaps a reason."""
    code, _, reason = key_of(scope).partition("-")
    await accept(receive, send)
    event: dict[str, Any] = {"type": "websocket.close"}
    if code:
        event |= {"code": int(code), "reason": reason}
    await send(event)


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 4000, "reason": "not seen"})


async def deny(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    start = {"type": "websocket.http.response.start", "status": int(key_of(scope))}
    await send({**start, "headers": [(b"X-Why", b"1"), (b"content-type", b"text/x")]})
    part = {"type": "websocket.http.response.body"}
    await send({**part, "body": b"not ", "more_body": True})
    await send({**part, "body": b"today"})


async def deny_bare(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.http.response.start", "status": 404})
    await send({"type": "websocket.http.response.body", "body": b""})


async def deny_half(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.http.response.start", "status": 404})
    part = {"type": "websocket.http.response.body", "body": b"begun"}
    await send({**part, "more_body": True})


async def raises(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    raise LookupError("on purpose")


async def raises_after(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    await send(text("before"))
    raise LookupError("on purpose")


async def returns(scope: Scope, receive: Receive, send: Send) -> None:
    """Neither accept nor refuse."""


async def returns_after(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    await send(text("before"))


async def accept_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """Accept without having received the handshake."""
    await send({"type": "websocket.accept"})
    await send(text((await receive())["type"]))
    await send({"type": "websocket.close"})


async def send_first(scope: Scope, receive: Receive, send: Send) -> None:
    await send(text("too early"))


async def accept_twice(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    await send({"type": "websocket.accept"})


async def http_event(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    await send({"type": "http.response.start", "status": 200})


async def send_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Send an event with no payload, and with one that is not None."""
    await accept(receive, send)
    await send({"type": "websocket.send"})
    await send({"type": "websocket.send", "text": None, "bytes": b"bytes"})
    await send({"type": "websocket.send", "text": "text", "bytes": None})
    await send({"type": "websocket.close", "reason": None})


async def send_nonsense(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    await send(text(b"bytes for text"))


async def bad_code(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    await send({"type": "websocket.close", "code": 99})


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    await send({"type": "websocket.send", "bytes": bytes(3_000_000)})
    await send(text("ü" * 500_000))
    for n in range(200):
        await send(text(str(n)))
    await send({"type": "websocket.close"})


def sockets() -> ASGIApp:
    memory = Memory()

    async def watch(scope: Scope, receive: Receive, send: Send) -> None:
        """Note how the client goes, and what sending does then."""
        notes = memory.notes[key_of(scope)]
        await accept(receive, send)
        while (event := await receive())["type"] == "websocket.receive":
            pass
        notes.append([event["type"], event["code"], event.get("reason", "")])
        try:
            await send(text("too late"))
        except OSError:
            notes.append("send raises an OSError")
            raise

    async def after_close(scope: Scope, receive: Receive, send: Send) -> None:
        """Note what the app gets after it has closed."""
        notes = memory.notes[key_of(scope)]
        await accept(receive, send)
        await send({"type": "websocket.close", "code": 4001, "reason": "so long"})
        event = await receive()
        notes.append([event["type"], event["code"], event.get("reason", "")])
        for kind in ("websocket.send", "websocket.close"):
            try:
                await send({"type": kind, "text": "too late"})
            except Exception as err:
                notes.append(f"{kind}: {type(err).__name__}")
            else:
                notes.append(f"{kind}: sent")

    async def after_refusal(scope: Scope, receive: Receive, send: Send) -> None:
        notes = memory.notes[key_of(scope)]
        await receive()
        await send({"type": "websocket.close"})
        event = await receive()
        notes.append([event["type"], event["code"], event.get("reason", "")])

    async def after_denial(scope: Scope, receive: Receive, send: Send) -> None:
        notes = memory.notes[key_of(scope)]
        await deny_bare(scope, receive, send)
        assert (await receive())["type"] == "websocket.connect"
        event = await receive()
        notes.append([event["type"], event["code"], event.get("reason", "")])

    async def catches(scope: Scope, receive: Receive, send: Send) -> None:
        """Note which events `send` refuses, and go on."""
        notes = memory.notes[key_of(scope)]

        async def attempt(event: Message) -> None:
            try:
                await send(event)
            except Exception as err:
                notes.append(type(err).__name__)
            else:
                notes.append("sent")

        await receive()
        await attempt(text("before accept"))
        await attempt({"type": "websocket.nonsense"})
        await attempt({"type": "websocket.accept"})
        await attempt({"type": "websocket.accept"})
        await attempt({"type": "websocket.http.response.start", "status": 404})
        await attempt(text("fine"))
        await attempt({"type": "websocket.close"})
        await attempt(text("after close"))

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        """Accept when the gate opens."""
        await memory.wait(key_of(scope))
        await accept(receive, send)
        await send(text("at last"))
        await asyncio.sleep(0)
        await send({"type": "websocket.close"})

    apps: dict[str, ASGIApp] = {app.__name__: app for app in APPS}
    return ByPath(
        memory,
        "websocket",
        **apps,
        watch=watch,
        after_close=after_close,
        after_refusal=after_refusal,
        after_denial=after_denial,
        catches=catches,
        slowly=slowly,
    )


APPS: list[Any] = [
    tell,
    echo,
    keys,
    close,
    refuse,
    deny,
    deny_bare,
    deny_half,
    raises,
    raises_after,
    returns,
    returns_after,
    accept_at_once,
    send_first,
    accept_twice,
    http_event,
    send_nothing,
    send_nonsense,
    bad_code,
    large,
]
