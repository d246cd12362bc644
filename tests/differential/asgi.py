"""Small parts that the raw ASGI apps are made of."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send


def start(status: Any = 200, headers: Any = ()) -> dict[str, Any]:
    """Return the event that begins a response."""
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: Any = b"", more: bool = False) -> dict[str, Any]:
    """Return the event of a part of the body."""
    return {"type": "http.response.body", "body": data, "more_body": more}


async def answer(
    send: Send, data: Any, status: int = 200, headers: Sequence[Any] = ()
) -> None:
    """Send a whole response; what is not bytes goes as JSON."""
    if not isinstance(data, bytes):
        data = json.dumps(data).encode()
    length = (b"content-length", b"%d" % len(data))
    await send(start(status, [*headers, length]))
    await send(body(data))


async def read(receive: Receive) -> bytes:
    """Read a request's whole body."""
    parts = b""
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return parts
        parts += event.get("body", b"")
        more = event.get("more_body", False)
    return parts


def below(scope: Scope) -> str:
    """Return the path below the app's own root."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def key_of(scope: Scope) -> str:
    """Return a path's last segment: the key of the talk that asks."""
    return below(scope).rpartition("/")[2]


class Memory:
    """What apps note of a talk, and where they wait for it, by its key."""

    def __init__(self) -> None:
        self.notes: dict[str, list[Any]] = defaultdict(list)
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def wait(self, key: str, name: str = "gate") -> None:
        """Wait until the talk opens a gate."""
        await self._gates[f"{key}-{name}"].wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer ``/open/{key}-{name}`` and ``/notes/{key}``."""
        name = below(scope).split("/")[1]
        if name == "open":
            self._gates[key_of(scope)].set()
            await answer(send, b"open")
        elif name == "notes":
            await answer(send, self.notes[key_of(scope)])
        else:
            await answer(send, b"no such app", 404)


class ByPath:
    """Several apps, by the first segment of the path; `Memory` has the rest.

    Parameters
    ----------
    memory
        What the apps share.
    kind
        What the apps serve, ``"http"`` or ``"websocket"``.
    """

    def __init__(
        self, memory: Memory | None = None, kind: str = "http", **apps: ASGIApp
    ) -> None:
        self.memory = memory or Memory()
        self._kind = kind
        self._apps = {name.replace("_", "-"): app for name, app in apps.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            return  # not supported
        name = (below(scope).split("/") + [""])[1]
        apps = self._apps if scope["type"] == self._kind else {}
        await apps.get(name, self.memory)(scope, receive, send)
