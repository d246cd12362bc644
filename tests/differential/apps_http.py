"""Raw ASGI apps that behave: what they see, what they send, how they read."""

from __future__ import annotations

import asyncio
import contextvars
import http
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tests.differential.asgi import (
    ByPath,
    Memory,
    answer,
    below,
    body,
    key_of,
    read,
    start,
)


def describe(value: Any) -> Any:
    """Return a form for JSON in which types differ too."""
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(describe, value)]
    return value if isinstance(value, str | int | None) else repr(value)


def describe_scope(scope: Scope) -> dict[str, Any]:
    """Describe all of a scope but for the ports, which are not the same."""
    client, server = scope["client"], scope["server"]
    hosts = {
        "client": (client[0], type(client[1]).__name__),
        "server": (server[0], type(server[1]).__name__),
    }
    kinds = [type(client).__name__, type(server).__name__]
    found: dict[str, Any] = describe({**scope, **hosts, "kinds": kinds})
    return found


def echo() -> ASGIApp:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        data = await read(receive)
        await answer(send, {"scope": describe_scope(scope), "body": len(data)})

    return echo


# Responses.


async def empty(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await send({"type": "http.response.body"})


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"no headers at all"})


async def chunks(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-type", b"text/plain")]))
    for n in range(50):
        await send(body(b"%d," % n * n, True))  # the first one is empty
        if n % 7 == 0:
            await asyncio.sleep(0)
    await send(body(b"end"))


async def chunks_with_length(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"content-length", b"10")]))
    for part in (b"abc", b"", b"defg", b"hij"):
        await send(body(part, True))
    await send(body())


async def said_chunked(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(headers=[(b"Transfer-Encoding", b"chunked")]))
    await send(body(b"as it was said"))


async def many_headers(scope: Scope, receive: Receive, send: Send) -> None:
    names = [b"X-Upper", b"x-lower", b"x-lower", b"Set-Cookie", b"set-cookie"]
    headers: list[Any] = [[name, b"%d" % n] for n, name in enumerate(names)]
    headers += [(b"x-empty", b""), (b"x-latin", b"\xe4\xff"), (b"x-tab", b"a\tb")]
    headers += [(b"x/slash", b"odd name"), (b"x-" + b"l" * 500, b"v" * 5000)]
    headers += [(b"x-request-id", b"the app's own")]
    await send(start(headers=iter(headers)))
    await send(body(b"body"))


async def with_status(scope: Scope, receive: Receive, send: Send) -> None:
    status = int(key_of(scope))
    headers = [] if status in (204, 304) else [(b"content-length", b"0")]
    await send(start(http.HTTPStatus(status), headers))
    await send(body())


async def odd_status(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"odd", int(key_of(scope)))


async def page(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"page", headers=[(b"x-method", scope["method"].encode())])


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    size = int(key_of(scope))
    await send(start())
    await send(body(b"x" * size, True))
    await send(body(bytearray(b"y" * size), True))
    await send(body(memoryview(b"z" * size)))


async def large_with_length(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, bytes(range(256)) * 10_000)


async def closing(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"bye", headers=[(b"connection", b"close")])


async def strange_event_keys(scope: Scope, receive: Receive, send: Send) -> None:
    await send({**start(), "trailers": False, "more": 1})
    await send({**body(b"fine"), "other": object()})


def responses() -> ASGIApp:
    return ByPath(
        empty=empty,
        bare=bare,
        chunks=chunks,
        chunks_with_length=chunks_with_length,
        said_chunked=said_chunked,
        many_headers=many_headers,
        status=with_status,
        odd_status=odd_status,
        page=page,
        large=large,
        large_with_length=large_with_length,
        closing=closing,
        strange_event_keys=strange_event_keys,
    )


# Requests' bodies.


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    data = await read(receive)
    await answer(send, {"bytes": len(data), "sum": sum(data)})


async def read_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"not read", 403)


async def read_a_part(scope: Scope, receive: Receive, send: Send) -> None:
    event = await receive()
    await answer(send, [event["type"], len(event["body"]) > 0])


async def read_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    await send(body(b"first,", True))
    data = await read(receive)
    await send(body(b"then %d" % len(data)))


async def read_again(scope: Scope, receive: Receive, send: Send) -> None:
    """Read on after the body, while the response is on its way."""
    await read(receive)
    reading = asyncio.ensure_future(receive())
    await asyncio.sleep(0.01)
    early = reading.done()
    await send(start())
    await send(body(b"early" if early else b"waits"))
    assert (await reading)["type"] == "http.disconnect"
    assert (await receive())["type"] == "http.disconnect"


async def lockstep(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer every part of the body before the next one comes."""
    await send(start())
    while (event := await receive())["more_body"]:
        await send(body(b"<%b>" % event["body"], True))
    await send(body(b"end"))


def bodies() -> ASGIApp:
    return ByPath(
        all=read_all,
        nothing=read_nothing,
        part=read_a_part,
        late=read_late,
        again=read_again,
        lockstep=lockstep,
    )


# Time.


def streams() -> ASGIApp:
    memory = Memory()

    async def gated(scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing before the client has seen all that was sent before."""
        key = key_of(scope)
        await memory.wait(key, "head")
        await send(start())
        for name in ("first", "second"):
            await memory.wait(key, name)
            await send(body(name.encode(), True))
        await memory.wait(key, "last")
        await send(body())

    async def work_after(scope: Scope, receive: Receive, send: Send) -> None:
        """Go on when the response is complete."""
        await answer(send, b"complete")
        await memory.wait(key_of(scope))
        event = await receive()
        memory.notes[key_of(scope)].append(["after the response", event["type"]])

    async def until_gone(scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the client goes, and tell how that was noticed."""
        notes = memory.notes[key_of(scope)]
        await send(start())
        await send(body(b"begun", True))
        try:
            while (event := await receive())["type"] == "http.request":
                pass
            notes.append(event["type"])
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise

    async def gone_before(scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the client to go before there is a response."""
        notes = memory.notes[key_of(scope)]
        notes.append("called")
        try:
            while (event := await receive())["type"] == "http.request":
                pass
            notes.append(event["type"])
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise

    return ByPath(
        memory,
        gated=gated,
        work_after=work_after,
        until_gone=until_gone,
        gone_before=gone_before,
    )


# State.


def stateful() -> ASGIApp:
    """Has a lifespan, whose state each request gets a copy of."""
    made: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            made.append("startup")
            scope["state"].update(number=1, shared=["kept"])
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return await send({"type": "lifespan.shutdown.complete"})
        before = dict(scope["state"])
        scope["state"]["number"] += 1
        scope["state"]["mine"] = below(scope)
        scope["extra"] = "not for others"
        await answer(send, {"made": made, "before": before})

    return app


def no_lifespan() -> ASGIApp:
    """Raises when asked for a lifespan, and has an empty state in requests."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await answer(send, {"state": scope["state"]})

    return app


def contexts() -> ASGIApp:
    """Sets a context variable that no other request may see."""
    variable = contextvars.ContextVar("variable", default="unset")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        before = variable.get()
        variable.set(below(scope))
        await asyncio.sleep(0.01)
        if scope["type"] == "http":
            await answer(send, {"before": before, "after": variable.get()})

    return app
