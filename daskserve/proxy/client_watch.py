"""The client's side of one request: its body, its patience, and whether it is there.

Runs on the transport loop beside the task that waits for the replica. Most requests are
answered before there is anything to watch, so the watching task starts late.
"""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from daskserve.config import HTTPOptions
from daskserve.exceptions import RequestError, RequestTooLargeError
from daskserve.proxy.request import RequestInfo
from daskserve.transport.call import Call
from daskserve.transport.messages import BODY, MAX_CHUNK_BYTES

#: A request that is answered sooner is not watched at all.
WATCH_AFTER_S = 0.02


class ClientGoneError(RequestError):
    """The client closed the connection; nobody gets an answer (logged as 499)."""

    status_code = 499


class ClientStalledError(RequestError):
    """The client does not send the body that it announced."""

    status_code = 408


class ClientWatch:
    """Read the request's body, and abort the call when the client goes or time is up.

    Parameters
    ----------
    call
        What is aborted.
    receive
        The server's ASGI ``receive``.
    timeout_s
        Time until the response has to begin; None for no limit.
    deadline
        The end of it, on the loop's clock.
    options
        The instance's, for limits of the body.
    info
        The request's; its `body_unread` is kept up to date.
    """

    def __init__(
        self,
        call: Call,
        receive: Receive,
        *,
        timeout_s: float | None,
        deadline: float | None,
        options: HTTPOptions,
        info: RequestInfo,
    ) -> None:
        self._call = call
        self._receive = receive
        self._timeout_s = timeout_s
        self._max_body_bytes = options.max_request_body_bytes
        self._stall_timeout_s = options.stall_timeout_s
        self._info = info
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._body_bytes = 0
        self._granted = 0
        self._room: asyncio.Event | None = None

    def check_length(self, content_length: bytes | None) -> None:
        """Refuse a body that is announced as too large, before any of it is read."""
        if content_length is not None and self._max_body_bytes is not None:
            if content_length.isdigit() and int(content_length) > self._max_body_bytes:
                self._info.body_unread = True
                raise self._too_large()

    async def read_eagerly(self, enough_bytes: int) -> tuple[bytes, bool]:
        """Return the body's beginning and whether there is more.

        Small bodies are read whole before a replica is asked, so that a slow sender
        holds no place in it.
        """
        headers = self._info.headers
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            body, more = await self._next_part()  # comes at once: no timer is needed
            self._info.body_unread = more
            return body, more
        self._info.body_unread = True
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout_at(self._deadline):
                while more and size < enough_bytes:
                    part, more = await self._next_part_in_time()
                    parts.append(part)
                    size += len(part)
        except TimeoutError:
            assert self._timeout_s is not None
            raise self._call.timeout_error(self._timeout_s) from None
        self._info.body_unread = more
        return b"".join(parts), more

    def start(self, more_body: bool) -> None:
        """Begin to watch: at once if there is a body to forward, else after a while."""
        if self._info.connection is not None:
            self._info.connection.on_lost = self._lost
        if more_body:
            self._room = asyncio.Event()
            self._call.on_grant = self._grant
            self._watch()
        else:
            delay = WATCH_AFTER_S
            if self._deadline is not None:
                delay = min(delay, max(0.0, self._deadline - self._loop.time()))
            self._timer = self._loop.call_later(delay, self._watch)

    def response_began(self) -> None:
        """Stop the clock; go on looking for the client."""
        if self._task is not None and self._timer is not None:
            self._timer.cancel()
        self._deadline = None

    def stop(self) -> None:
        """Stop watching."""
        if self._info.connection is not None:
            self._info.connection.on_lost = None
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _watch(self) -> None:
        if self._deadline is not None:
            self._timer = self._loop.call_at(self._deadline, self._time_up)
        self._task = self._loop.create_task(self._run())

    def _lost(self) -> None:
        # The task may be waiting for room, not for the client.
        self._call.abort(ClientGoneError())

    def _time_up(self) -> None:
        assert self._timeout_s is not None
        self._call.time_up(self._timeout_s)

    async def _run(self) -> None:
        try:
            while self._info.body_unread:
                part, more = await self._next_part_in_time()
                for i in range(0, len(part) or 1, MAX_CHUNK_BYTES):
                    chunk = part[i : i + MAX_CHUNK_BYTES]
                    await self._wait_for_room()
                    self._granted -= len(chunk)
                    last = i + MAX_CHUNK_BYTES >= len(part)
                    self._call.send(BODY, chunk, more or not last)
                self._info.body_unread = more
            while (await self._receive())["type"] != "http.disconnect":
                pass
            raise ClientGoneError
        except RequestError as err:
            self._call.abort(err)

    async def _next_part_in_time(self) -> tuple[bytes, bool]:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                return await self._next_part()
        except TimeoutError:
            raise ClientStalledError(
                f"No more of the request's body came for {self._stall_timeout_s:g} s "
                f"(stall_timeout_s)."
            ) from None

    async def _next_part(self) -> tuple[bytes, bool]:
        event = await self._receive()
        if event["type"] == "http.disconnect":
            raise ClientGoneError
        body: bytes = event.get("body", b"")
        self._count(body)
        return body, event.get("more_body", False)

    async def _wait_for_room(self) -> None:
        assert self._room is not None
        while self._granted <= 0:
            self._room.clear()
            await self._room.wait()

    def _grant(self, more_bytes: int) -> None:
        assert self._room is not None
        self._granted += more_bytes
        self._room.set()

    def _count(self, body: bytes) -> None:
        self._body_bytes += len(body)
        limit = self._max_body_bytes
        if limit is not None and self._body_bytes > limit:
            raise self._too_large()

    def _too_large(self) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"The request's body is larger than {self._max_body_bytes} bytes "
            f"(max_request_body_bytes)."
        )
