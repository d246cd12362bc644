"""The ASGI server inside a replica: one HTTP exchange, and an app's lifespan.

Runs on the replica's loop. Messages come from a channel and go back to it; what the app
sees are plain ASGI events.
"""

from __future__ import annotations

import asyncio
import re
import time
import traceback
from collections import deque
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daskserve.replica.admission import Caller
from daskserve.replica.sessions import Sessions
from daskserve.transport.channel import ReplyTo
from daskserve.transport.messages import (
    CHUNK,
    GRANT,
    MAX_CHUNK_BYTES,
    RESPONSE,
    START,
    Head,
    Headers,
)

# What uvicorn refuses in a header: the proxy's could tell nobody any more.
_NOT_IN_NAME = re.compile(rb'[\x00-\x1f\x7f()<>@,;:\[\]={} \t\\"]')
_NOT_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

_NOT_IN_204 = frozenset({b"content-length", b"transfer-encoding"})
_NOT_IN_304 = frozenset({b"transfer-encoding"})

#: How many names of headers are kept that were looked at: apps use few.
MAX_NAMES = 1000
_good_names: dict[bytes, bytes] = {}
#: Whole lines likewise, of headers that say the same in most responses.
_REPEATED = frozenset({b"content-type", b"cache-control", b"vary", b"server"})
_good_lines: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}

#: As uvicorn's, for the same events are sent.
ASGI_VERSIONS = {"version": "3.0", "spec_version": "2.3"}


#: Responses that have no body, whatever their head says (RFC 9110, 6.4.1).
NO_BODY = frozenset({204, 304})

#: What Starlette answers, before it lets out an exception that nobody handles.
DEFAULT_ERROR_PAGE = b"Internal Server Error"

#: How many events are dropped before others have a turn.
DROPPED_AT_ONCE = 100


class Starts:
    """Heads of responses that wait for their bodies, until the loop's turn ends.

    A body that comes in the same turn goes along with its head; a stream whose first
    chunk takes its time does not hold its head back.

    Parameters
    ----------
    loop
        The replica's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[HttpExchange] = []

    def add(self, exchange: HttpExchange) -> None:
        """Take note of a response that has begun."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(exchange)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for exchange in waiting:
            exchange.flush_start()


class HttpExchange:
    """One request in a replica: the app's ``receive`` and ``send``.

    Parameters
    ----------
    reply_to
        Where the answer goes.
    message
        The ``REQUEST`` message.
    window_bytes
        How much of the request's body may be on its way here, and of the response if
        the caller holds that much.
    starts, sessions
        The replica's.
    """

    __slots__ = ("_bodiless", "_body", "_changed", "_charged", "_dropped", "_held",
                 "_left", "_max_chunk", "_more_body", "_on_the_way", "_sessions",
                 "_start", "_starts", "_window", "began", "disconnected", "entered",
                 "exchange_id", "head", "reply_to", "response_complete",
                 "response_started", "slot", "task")  # fmt: skip

    def __init__(
        self,
        reply_to: ReplyTo,
        message: tuple[Any, ...],
        window_bytes: int,
        starts: Starts,
        sessions: Sessions | None = None,
    ) -> None:
        self.reply_to = reply_to
        self._starts = starts
        self._sessions = sessions
        self.exchange_id: int = message[1]
        self.head = Head._make(message[3])
        self.task: asyncio.Task[None] | None = None
        #: Whose slot of the replica it has, and since when.
        self.slot: Caller | None = None
        self.began = time.perf_counter()
        #: Its task has begun to run.
        self.entered = False
        self.response_started = False
        self.response_complete = False
        self.disconnected = False
        #: What has come of the body; most requests come whole.
        self._body: list[bytes] | deque[bytes] = [message[4]]
        self._more_body: bool = message[5]
        # What came along with the request was not charged to the window.
        self._charged = False
        self._start: tuple[int, Headers] | None = None
        #: How much of the body that the head announced is still to come.
        self._left: int | None = None
        #: No body follows the head, whatever the app gives.
        self._bodiless = False
        self._held: tuple[int, Headers, bytes] | None = None
        held = self.head.window_bytes
        self._window = window = held if held < window_bytes else window_bytes
        #: Largest piece, so that many exchanges share a channel.
        self._max_chunk = window if window < MAX_CHUNK_BYTES else MAX_CHUNK_BYTES
        self._on_the_way = 0
        self._dropped = 0
        self._changed: asyncio.Event | None = None
        if self._more_body:  # taken: the caller may send the rest
            reply_to.send((GRANT, self.exchange_id, window_bytes))

    def scope(self, state: dict[str, Any] | None) -> Scope:
        """Return the ASGI connection scope, with a copy of the lifespan's `state`."""
        scope = self.head.scope("http", ASGI_VERSIONS, state)
        scope["method"] = self.head.method
        return scope

    # What comes from the caller.

    def body_arrived(self, data: bytes, more_body: bool) -> None:
        """Add a part of the request's body."""
        if type(self._body) is list:
            self._body = deque(self._body)
        self._body.append(data)
        self._more_body = more_body
        self._notify()

    def credit(self, sent_bytes: int) -> None:
        """Note that so much of the response has been passed on to the client."""
        self._on_the_way -= sent_bytes
        self._notify()

    def disconnect(self) -> None:
        """Note that nobody waits for the answer any more."""
        self.disconnected = True
        self._notify()

    # What the app calls.

    async def receive(self) -> Message:
        """ASGI ``receive``."""
        while not (self._body or self.disconnected or self.response_complete):
            await self._change()
        if self.disconnected or self.response_complete:  # also if there is a body
            return {"type": "http.disconnect"}
        body = self._body
        data = body.popleft() if isinstance(body, deque) else body.pop()
        more_body = self._more_body or bool(self._body)
        if data and self._charged:
            self.reply_to.send((GRANT, self.exchange_id, len(data)))
        self._charged = True
        return {"type": "http.request", "body": data, "more_body": more_body}

    async def send(self, event: Message) -> None:
        """ASGI ``send``."""
        kind = event["type"]
        if self.disconnected:
            return await self._drop()
        if self.response_complete:
            raise RuntimeError(f"Unexpected {kind!r} after the response was complete.")
        if kind == "http.response.start":
            if self._start is not None:
                raise RuntimeError("Unexpected second 'http.response.start'.")
            status, headers, self._left = read_start(event, self.head.method)
            self._bodiless = status in NO_BODY or self.head.method == "HEAD"
            if self._sessions is not None:
                self._sessions.answered(self.reply_to, self.head, headers)
            self._start = (status, headers)
            self._starts.add(self)
        elif kind == "http.response.body":
            if self._start is None:
                raise RuntimeError("Expected 'http.response.start' before the body.")
            body, more_body = event.get("body", b""), event.get("more_body", False)
            if self._bodiless:
                # It would be read as the next response on the client's connection.
                if more_body:
                    return await self._drop()
                body = b""
            if (
                more_body
                or self.response_started
                or len(body) > self._max_chunk
                or (self._left is not None and self._left != len(body))
            ):
                await self._send_body(body, bool(more_body))
            else:
                self._respond_whole(body)
        else:
            raise RuntimeError(f"Unexpected ASGI message {kind!r}.")

    def respond(self, status: int, headers: Any, body: bytes) -> None:
        """Send a whole response that is known to be small."""
        self.response_started = self.response_complete = True
        self.reply_to.send((RESPONSE, self.exchange_id, status, headers, body))

    def drop_held(self) -> bool:
        """Drop an error page that was held back; return whether there was one."""
        held, self._held = self._held, None
        return held is not None

    def send_held(self) -> None:
        """Send an error page that was held back, if there is one."""
        held, self._held = self._held, None
        if held is not None:
            self.respond(*held)

    def _respond_whole(self, body: bytes) -> None:
        assert self._start is not None
        status, headers = self._start
        if type(body) is not bytes:
            body = bytes(body)
        if status >= 500 and (self.head.debug or body == DEFAULT_ERROR_PAGE):
            self._held = (status, headers, body)  # perhaps the error comes out yet
            self.response_complete = True
        else:
            self.respond(status, headers, body)
        if self._changed is not None:
            self._changed.set()

    async def _drop(self) -> None:
        """Let others have a turn now and then.

        An app that waits for something is cancelled there, where it cleans up; one
        that only sends, and without end, is cancelled here.
        """
        self._dropped += 1
        if self._dropped % DROPPED_AT_ONCE == 0:
            await asyncio.sleep(0)

    async def _send_body(self, body: bytes, more_body: bool) -> None:
        if self._count(len(body)) and not more_body:
            if self.response_started:
                await self._pass_on(body, True)
            raise RuntimeError("Response content shorter than Content-Length")
        await self._pass_on(body, more_body)

    def _count(self, size: int) -> int:
        """Return how much of what was announced is still to come after `size` bytes."""
        if self._left is None:
            return 0
        if size > self._left:
            raise RuntimeError("Response content longer than Content-Length")
        self._left -= size
        return self._left

    async def _pass_on(self, body: bytes, more_body: bool) -> None:
        self.flush_start()
        view = memoryview(body)
        for i in range(0, len(view), self._max_chunk):
            while self._on_the_way >= self._window:
                if self.disconnected:
                    return
                await self._change()
            chunk = bytes(view[i : i + self._max_chunk])
            last = not more_body and i + len(chunk) == len(view)
            self._on_the_way += len(chunk)
            self.reply_to.send((CHUNK, self.exchange_id, chunk, not last))
        if not more_body:
            if not view:
                self.reply_to.send((CHUNK, self.exchange_id, b"", False))
            self.response_complete = True
            self._notify()

    def flush_start(self) -> None:
        """Send the response's head, unless that was done or goes with its body."""
        if not self.response_started and self._held is None:
            assert self._start is not None
            self.response_started = True
            self.reply_to.send((START, self.exchange_id, *self._start))

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = asyncio.Event()
        self._changed.clear()
        await self._changed.wait()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()


def read_start(event: Message, method: str) -> tuple[int, Headers, int | None]:
    """Read an ``http.response.start``.

    Returns
    -------
    tuple
        Status, headers with small names, and how long the body has to be; None if that
        is left open. A 204 has no length.

    Raises
    ------
    RuntimeError
        Status or headers are malformed. A server would find that out too late to tell
        the client anything.
    """
    status = event["status"]
    if not isinstance(status, int) or not 200 <= status <= 599:
        raise RuntimeError(
            f"Invalid HTTP status {status!r} in the response; expected 200 to 599, as "
            f"others do not end an exchange."
        )
    headers = []
    length: bytes | None = None
    chunked: bool | None = None
    for line in event.get("headers", ()):
        try:
            known = _good_lines.get(line)
        except TypeError:  # it is a list
            known = None
        if known is not None:
            headers.append(known)
            continue
        name, value = line
        if type(name) is not bytes or type(value) is not bytes:
            if not isinstance(name, bytes) or not isinstance(value, bytes):
                raise RuntimeError(f"Header {name!r}: {value!r} is not of bytes.")
        low = _good_names.get(name) or _good_name(name)
        if low is None or _NOT_IN_VALUE.search(value):
            raise RuntimeError(f"Invalid HTTP header {name!r}: {value!r}.")
        if low == b"content-length":  # the first of each counts
            length = value if length is None else length
        elif low == b"transfer-encoding" and chunked is None:
            chunked = value.lower() == b"chunked"
        elif low in _REPEATED and type(line) is tuple and type(value) is bytes:
            if len(_good_lines) < MAX_NAMES:
                _good_lines[line] = low, value
        headers.append((low, value))
    if length is not None and not length.strip().isdigit():
        raise RuntimeError(f"Invalid content-length {length!r} in the response.")
    if status in NO_BODY:  # a 304 may say how long the body is that the client has
        hidden = _NOT_IN_204 if status == 204 else _NOT_IN_304
        return status, [line for line in headers if line[0] not in hidden], None
    if method == "HEAD" or chunked or length is None:
        return status, headers, None  # no body follows, or one that says its length
    return status, headers, int(length)


def _good_name(name: bytes) -> bytes | None:
    """Return the name of a header in small letters; None if there can be none such."""
    if not name or _NOT_IN_NAME.search(name):
        return None
    low = name.lower()
    if len(_good_names) < MAX_NAMES:
        _good_names[name] = low
    return low


class LifespanError(RuntimeError):
    """An app's startup or shutdown hook failed."""


class Lifespan:
    """The lifespan protocol of one app: once for each replica, on its loop.

    Parameters
    ----------
    app
        Any ASGI app; one that does not know the protocol is left alone.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        """Run the startup hooks.

        Raises
        ------
        LifespanError
            One of them failed; the text has what the app said of it.
        """
        self._task = asyncio.ensure_future(self._run())
        await self._exchange("lifespan.startup")

    async def shutdown(self) -> None:
        """Run the shutdown hooks.

        Raises
        ------
        LifespanError
            One of them failed.
        """
        if self._task is not None and not self._task.done():
            await self._exchange("lifespan.shutdown")
            await asyncio.wait([self._task], timeout=5)

    async def _exchange(self, kind: str) -> None:
        self._to_app.put_nowait({"type": kind})
        answer = await self._from_app.get()
        if answer["type"] == f"{kind}.failed":
            raise LifespanError(answer.get("message") or f"{kind} failed")

    async def _run(self) -> None:
        scope: Scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        receive: Receive = self._to_app.get
        started = False

        async def put(event: Message) -> None:
            nonlocal started
            started = started or event["type"].startswith("lifespan.startup.")
            self._from_app.put_nowait(event)

        send: Send = put
        try:
            await self._app(scope, receive, send)
        except (Exception, SystemExit) as err:
            if started:
                text = "".join(traceback.format_exception(err))
                self._from_app.put_nowait(
                    {"type": "lifespan.shutdown.failed", "message": text}
                )
        # An app that ends or raises before it said anything has no lifespan.
        self._from_app.put_nowait({"type": "lifespan.none"})
