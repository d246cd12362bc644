"""Raw ASGI apps that break the protocol."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tests.differential.asgi import ByPath, Memory, answer, body, key_of, start


class OnPurpose(Exception):
    """What the apps raise."""


async def returns(scope: Scope, receive: Receive, send: Send) -> None:
    """Do not answer at all."""


async def returns_value(scope: Scope, receive: Receive, send: Send) -> Any:
    await answer(send, b"complete")
    return "a value"


async def returns_after_start(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())


async def returns_in_the_middle(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await send(body(b"begun", True))


async def raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise OnPurpose


async def raises_exit(scope: Scope, receive: Receive, send: Send) -> None:
    raise asyncio.CancelledError


async def raises_after_start(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"5")]))
    raise OnPurpose


async def raises_later(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"5")]))
    await asyncio.sleep(0.01)
    raise OnPurpose


async def raises_in_the_middle(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await send(body(b"begun", True))
    await asyncio.sleep(0.01)
    raise OnPurpose


async def raises_with_length(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"10")]))
    await send(body(b"begun", True))
    raise OnPurpose


async def raises_after_the_end(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"complete")
    raise OnPurpose


async def too_long(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"3")]))
    await send(body(b"longer"))


async def too_long_later(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"3")]))
    await send(body(b"lon", True))
    await asyncio.sleep(0.01)
    await send(body(b"ger"))


async def too_short(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"8")]))
    await asyncio.sleep(0.01)
    await send(body(b"short"))


async def bad_length(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"eight")]))
    await send(body(b"whatever"))


async def body_of_204(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(204))
    await asyncio.sleep(0.01)
    await send(body(b"not allowed"))


async def body_of_304(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(304, [(b"etag", b'"1"')]))
    await asyncio.sleep(0.01)
    await send(body(b"not allowed"))


async def starts_twice(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await asyncio.sleep(0.01)
    await send(start())


async def starts_twice_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await send(start())


async def body_first(scope: Scope, receive: Receive, send: Send) -> None:
    await send(body(b"too early"))


async def ends_twice(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"complete")
    await send(body(b"more"))


async def unknown_event(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.nonsense"})


async def unknown_event_later(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await send(body(b"begun", True))
    await asyncio.sleep(0.01)
    await send({"type": "http.response.pathsend", "path": "/etc/passwd"})


async def no_type(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"status": 200})


async def text_body(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await asyncio.sleep(0.01)
    await send(body("text"))


async def bad_status(scope: Scope, receive: Receive, send: Send) -> None:
    statuses = {"low": 99, "high": 600, "text": "200", "none": None}
    await send(start(statuses[key_of(scope)]))
    await send(body(b"whatever"))


async def bad_header(scope: Scope, receive: Receive, send: Send) -> None:
    headers: dict[str, Any] = {
        "text-name": ("x-text", b"1"),
        "text-value": (b"x-text", "1"),
        "newline": (b"x-evil", b"1\r\nset-cookie: stolen=1"),
        "newline-name": (b"x-evil\r\nset-cookie", b"1"),
        "null": (b"x-null", b"\x00"),
        "space": (b"x evil", b"1"),
        "none": None,
    }
    await send(start(headers=[(b"x-good", b"1"), headers[key_of(scope)]]))
    await send(body(b"whatever"))


def misbehaving() -> ASGIApp:
    memory = Memory()

    async def catches(scope: Scope, receive: Receive, send: Send) -> None:
        """Note what `send` raises, and go on."""
        notes = memory.notes[key_of(scope)]

        async def attempt(event: Any) -> None:
            try:
                await send(event)
            except Exception as err:
                notes.append(type(err).__name__)
            else:
                notes.append("sent")

        await attempt(body(b"too early"))
        await attempt({"type": "http.response.nonsense"})
        await attempt(start(headers=[(b"content-length", b"3")]))
        await asyncio.sleep(0.01)
        await attempt(start())
        await attempt(body(b"too long", True))
        await attempt(body(b"fit"))
        await attempt(body(b"too late"))

    apps: dict[str, ASGIApp] = {app.__name__: app for app in APPS}
    return ByPath(memory, "http", **apps, catches=catches)


APPS: list[Any] = [
    returns,
    returns_value,
    returns_after_start,
    returns_in_the_middle,
    raises,
    raises_exit,
    raises_after_start,
    raises_later,
    raises_in_the_middle,
    raises_with_length,
    raises_after_the_end,
    too_long,
    too_long_later,
    too_short,
    bad_length,
    body_of_204,
    body_of_304,
    starts_twice,
    starts_twice_at_once,
    body_first,
    ends_twice,
    unknown_event,
    unknown_event_later,
    no_type,
    text_body,
    bad_status,
    bad_header,
]
