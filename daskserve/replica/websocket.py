"""One WebSocket in a replica: the app's ``receive`` and ``send``; on its loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Scope

from daskserve.replica.asgi import NO_BODY, read_start
from daskserve.replica.sessions import Sessions
from daskserve.transport.channel import ReplyTo
from daskserve.transport.messages import GRANT, PUSH, Head

#: As uvicorn's.
ASGI_VERSIONS = {"version": "3.0", "spec_version": "2.4"}

#: What an app may send next, by what it sent last.
_NEXT = {
    "": (
        "websocket.accept",
        "websocket.close",
        "websocket.http.response.start",
    ),
    "websocket.accept": ("websocket.send", "websocket.close"),
    "websocket.send": ("websocket.send", "websocket.close"),
    "websocket.http.response.start": ("websocket.http.response.body",),
    "websocket.http.response.body": ("websocket.http.response.body",),
    "websocket.close": (),
}


class ClientDisconnectedError(OSError):
    """The app sends to a client that has gone."""


class WebSocketExchange:
    """One WebSocket in a replica.

    Parameters
    ----------
    reply_to
        Where the app's events go.
    message
        The ``CONNECT`` message.
    window_bytes
        How much may be on its way in each direction.
    sessions
        The replica's.
    """

    def __init__(
        self,
        reply_to: ReplyTo,
        message: tuple[Any, ...],
        window_bytes: int,
        sessions: Sessions | None = None,
    ) -> None:
        self.reply_to = reply_to
        self._sessions = sessions
        self.exchange_id: int = message[1]
        *fields, self._subprotocols = message[3]
        self.head = Head._make(fields)
        self.task: asyncio.Task[None] | None = None
        self.disconnected = False
        self._events: deque[Message] = deque([{"type": "websocket.connect"}])
        self._sent = ""
        #: The refusal's body is dropped, as its status has none.
        self._bodiless = False
        self._window = min(window_bytes, self.head.window_bytes)
        self._on_the_way = 0
        self._changed = asyncio.Event()
        reply_to.send((GRANT, self.exchange_id, window_bytes))

    def scope(self, state: dict[str, Any] | None) -> Scope:
        """Return the ASGI connection scope, with a copy of the lifespan's `state`."""
        scope = self.head.scope("websocket", ASGI_VERSIONS, state)
        scope["subprotocols"] = list(self._subprotocols)
        scope["extensions"] = {"websocket.http.response": {}}
        return scope

    # What comes from the caller.

    def event_arrived(self, event: Message) -> None:
        """Add what the client sent."""
        if event["type"] == "websocket.disconnect":
            self.disconnect(event.get("code", 1005), event.get("reason", ""))
        else:
            self._events.append(event)
            self._changed.set()

    def credit(self, sent_bytes: int) -> None:
        """Note that so much has been passed on to the client."""
        self._on_the_way -= sent_bytes
        self._changed.set()

    def disconnect(self, code: int = 1006, reason: str = "") -> None:
        """Note that the client, or the way to it, is gone."""
        if not self.disconnected:
            self.disconnected = True
            self._events.append(_disconnect(code, reason))
            self._changed.set()

    def go_away(self) -> None:
        """Close with 1001: the replica is about to end."""
        if self._sent in ("websocket.accept", "websocket.send"):
            close = {"type": "websocket.close", "code": 1001, "reason": "going away"}
            self.reply_to.send((PUSH, self.exchange_id, close))
        self.disconnect(1001, "going away")

    # What the app calls.

    async def receive(self) -> Message:
        """ASGI ``receive``."""
        while not self._events:
            self._changed.clear()
            await self._changed.wait()
        event = self._events.popleft()
        if event["type"] == "websocket.disconnect":
            self._events.append(event)  # it stays so
        else:
            size = event_bytes(event)
            if size:
                self.reply_to.send((GRANT, self.exchange_id, size))
        return event

    async def send(self, event: Message) -> None:
        """ASGI ``send``."""
        kind = event["type"]
        closed = self._sent == "websocket.close"  # by the app: it is at fault, then
        if self.disconnected and not closed:
            raise ClientDisconnectedError("the WebSocket is closed")
        if kind not in _NEXT[self._sent]:
            raise RuntimeError(
                f"Unexpected ASGI message {kind!r} after {self._sent!r}; "
                f"expected one of {list(_NEXT[self._sent])}."
            )
        while self._on_the_way >= self._window and not self.disconnected:
            self._changed.clear()
            await self._changed.wait()
        refused = kind == "websocket.close" and not self._sent
        plain = {"type": kind} if refused else self._plain(event)
        if kind == "websocket.accept" and self._sessions is not None:
            headers = [(n.lower(), value) for n, value in plain.get("headers", ())]
            self._sessions.answered(self.reply_to, self.head, headers)
            plain["headers"] = headers
        self._sent = kind
        self._on_the_way += event_bytes(plain)
        self.reply_to.send((PUSH, self.exchange_id, plain))
        if refused:  # there is no close frame for code and reason, whatever they are
            self.disconnect()
        elif kind == "websocket.close":
            self.disconnect(event.get("code", 1000), event.get("reason") or "")

    def _plain(self, event: Message) -> Message:
        plain = _plain(event)
        if plain["type"] == "websocket.http.response.start":
            status, plain["headers"], _ = read_start(event, "GET")
            self._bodiless = status in NO_BODY
        elif self._bodiless and "body" in plain:
            plain["body"] = b""
        return plain


def event_bytes(event: Message) -> int:
    """Return the size of an event's payload; of text, its characters."""
    payload = event.get("bytes") or event.get("text") or event.get("body") or b""
    return len(payload)


def _disconnect(code: int, reason: str) -> Message:
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


def _plain(event: Message) -> Message:
    """Return an event as msgpack can carry it."""
    plain = {"type": event["type"]}
    for name, make in _FIELDS.items():
        value = event.get(name)
        if value is not None:
            plain[name] = make(value)
    return plain


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{value!r} in a WebSocket's event is not a str")


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"{value!r} in a WebSocket's event is not bytes")


def _headers(value: Any) -> list[tuple[bytes, bytes]]:
    return [(_bytes(name), _bytes(content)) for name, content in value]


#: What the events of an app may have, and what makes it fit to travel.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "bytes": _bytes,
    "body": _bytes,
    "subprotocol": _text,
    "reason": _text,
    "headers": _headers,
    "code": int,
    "status": int,
    "more_body": bool,
}
