"""The innermost part of a proxy: match the route, pick a replica, forward, answer."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote

import orjson
from starlette.types import Receive, Scope, Send

from daskserve.config import READY_PATH, HTTPOptions, is_own_path
from daskserve.exceptions import (
    DeploymentUnavailableError,
    ReplicaDiedError,
    RequestError,
)
from daskserve.proxy.client_watch import ClientGoneError, ClientWatch
from daskserve.proxy.forwarded import FORWARDED_PREFIX
from daskserve.proxy.request import (
    FULL_KEY,
    SCOPE_KEY,
    CutError,
    RequestInfo,
    origin,
    respond,
)
from daskserve.proxy.routes import RouteTable
from daskserve.proxy.turns import may_write, turn
from daskserve.proxy.websocket import WebSocketRelay
from daskserve.proxy.windows import Windows
from daskserve.transport.call import Call
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.group import Group
from daskserve.transport.messages import (
    CHUNK,
    CREDIT,
    CUT,
    ERROR,
    REQUEST,
    RESPONSE,
    RETRY_AFTER,
    START,
    STOPPED,
    Headers,
    error_response,
    model_id_of,
)

logger = logging.getLogger(__name__)

#: Methods that a client may be sure can be sent twice (RFC 9110, 9.2.2).
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
#: A body up to this size is read before a replica's place is taken.
EAGER_BODY_BYTES = 64 * 1024
#: A piece of a body from this size on waits for its turn: to hand it to the system
#: takes as long as many small requests.
LARGE_BYTES = 32 * 1024
#: Credit is given back in steps of at most this many bytes.
CREDIT_STEP_BYTES = 128 * 1024


class Forwarding:
    """One request on its way to a deployment, whichever way it goes.

    Parameters
    ----------
    call
        To the deployment.
    head
        The fields of `messages.Head`.
    timeout_s
        Time until the response has to begin; None for no limit.
    deadline
        The end of it, on the loop's clock.
    """

    __slots__ = ("body", "call", "deadline", "head", "more_body", "timeout_s")

    def __init__(
        self,
        call: Call,
        head: tuple[Any, ...],
        timeout_s: float | None,
        deadline: float | None,
    ) -> None:
        self.call = call
        self.head = head
        self.timeout_s = timeout_s
        self.deadline = deadline
        #: What of the request's body goes along with the head.
        self.body = b""
        self.more_body = False

    @property
    def window_bytes(self) -> int:
        """How much of the response this proxy will hold."""
        return self.head[-1]  # type: ignore[no-any-return]

    @property
    def retry_lost(self) -> bool:
        """Whether another replica may be tried when one is lost with the request."""
        return not self.more_body and self.head[0] in IDEMPOTENT

    def make(self, exchange_id: int, replica_id: int) -> tuple[Any, ...]:
        """Return the message to a replica."""
        return (REQUEST, exchange_id, replica_id, self.head, self.body, self.more_body)


class Forwarder:
    """Match the route, pick a replica, forward, answer.

    Parameters
    ----------
    dispatcher
        The process's way to the replicas.
    options
        The instance's HTTP options.
    windows
        What this proxy may hold of responses.
    """

    def __init__(
        self, dispatcher: Dispatcher, options: HTTPOptions, windows: Windows
    ) -> None:
        self.draining = False
        #: Why nothing can be forwarded, if so: all requests get a 503 then.
        self.unavailable = ""
        self._dispatcher = dispatcher
        self._options = options
        self._windows = windows
        self._table = RouteTable({})

    def set_routes(self, routes: dict[str, str]) -> None:
        """Take a new routing table."""
        self._table = RouteTable(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        info: RequestInfo = scope[SCOPE_KEY]
        if info.forwarding is not None:  # it comes from the quick way
            return await self._run(info.forwarding, info, scope, receive, send)
        websocket = scope["type"] == "websocket"
        if self.unavailable:
            error = DeploymentUnavailableError(self.unavailable)
            if websocket:
                raise error
            return await self._respond_error(send, info, error)
        root_path = scope.get(FORWARDED_PREFIX, self._options.root_path)
        path, match = self._locate(scope["path"], root_path)
        if is_own_path(path) and not websocket:
            return await self._serve_own(path, scope, send)
        if scope.get(FULL_KEY):
            text = "This server has as many connections as it may (max_connections)."
            return await respond(send, 503, text, RETRY_AFTER)
        if match is None and websocket:
            await receive()
            return await send({"type": "websocket.close"})  # before accept: a 403
        if match is None:
            return await self._not_found(path, scope, send)
        forwarding = self._new(scope, info, root_path, path, match)
        await self._run(forwarding, info, scope, receive, send)

    def prepare(self, scope: Scope, info: RequestInfo) -> Forwarding | None:
        """Return what is to be forwarded; None if it is not for a deployment.

        `finish` it, or leave it in `info` to `__call__`.
        """
        root_path = scope.get(FORWARDED_PREFIX, self._options.root_path)
        path = scope["path"]
        if root_path:
            path, match = self._locate(path, root_path)
        else:
            match = self._table.match(path)
        if match is None or is_own_path(path) or self.unavailable:
            return None
        return self._new(scope, info, root_path, path, match)

    def too_large(self, body_bytes: int) -> bool:
        """Whether a request's body is larger than it may be."""
        limit = self._options.max_request_body_bytes
        return limit is not None and body_bytes > limit

    def finish(self, forwarding: Forwarding) -> None:
        """End the call and give back what was taken for it."""
        forwarding.call.finish()
        self._windows.give_back(forwarding.window_bytes)

    def _new(
        self,
        scope: Scope,
        info: RequestInfo,
        root_path: str,
        path: str,
        match: tuple[str, str],
    ) -> Forwarding:
        info.prefix, info.deployment = match
        window = self._windows.take()
        head = (*_head(scope, root_path, path, info), self._options.debug, window)
        group = self._dispatcher.groups.get(info.deployment)
        session = None
        if group is not None and (affinity := group.affinity) is not None:
            session = affinity.session(scope["headers"], scope["query_string"])
        call = Call(
            self._dispatcher,
            info.deployment,
            model_id_of(info.headers),
            session,
            websocket=scope["type"] == "websocket",
        )
        timeout_s = self._timeout_s(info, group)
        deadline = None
        if timeout_s is not None:
            deadline = self._dispatcher.loop.time() + timeout_s
        return Forwarding(call, head, timeout_s, deadline)

    async def _run(
        self,
        forwarding: Forwarding,
        info: RequestInfo,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        websocket = scope["type"] == "websocket"
        try:
            if websocket:
                relay = WebSocketRelay(forwarding.call, forwarding.timeout_s)
                return await relay.run(forwarding.head, scope, receive, send)
            await self._forward(forwarding, info, receive, send)
        except ClientGoneError:
            raise
        except RequestError as err:
            if websocket:
                raise
            await self._respond_error(send, info, err)
        finally:
            self.finish(forwarding)

    def _locate(self, path: str, root_path: str) -> tuple[str, tuple[str, str] | None]:
        """Return the path without root path, and ``(prefix, deployment)`` of it."""
        match = self._table.match(path)
        if root_path and f"{path}/".startswith(f"{root_path}/"):
            # Perhaps the proxy in front has not stripped it.
            if match is None or match[0] == "/":
                path = path[len(root_path) :]
                match = self._table.match(path)
        return path, match

    async def _not_found(self, path: str, scope: Scope, send: Send) -> None:
        routes = f"{origin(scope, scope[SCOPE_KEY])}/-/routes"
        text = f"Path '{path}' not found. Please ping {routes} for route table."
        await respond(send, 404, text)

    async def _serve_own(self, path: str, scope: Scope, send: Send) -> None:
        """Answer the paths that are the proxy's own."""
        if scope["method"] not in ("GET", "HEAD"):
            return await respond(send, 405, "Method Not Allowed", (b"allow", b"GET"))
        if path == "/-/routes":
            body = orjson.dumps(self._table.routes)
            return await respond(send, 200, body, content_type=b"application/json")
        if self.draining:
            return await respond(send, 503, "This proxy is draining.", RETRY_AFTER)
        if self._dispatcher.version < 0:
            text = "The route table is not here yet."
            return await respond(send, 503, text, RETRY_AFTER)
        if path.startswith(READY_PATH):
            return await self._serve_ready(path.removeprefix(READY_PATH), send)
        await respond(send, 200, "success")

    async def _serve_ready(self, name: str, send: Send) -> None:
        """Answer whether a deployment can take requests."""
        group = self._dispatcher.groups.get(name)
        if group is None:
            return await respond(send, 404, f"There is no deployment {name!r}.")
        if group.router.slots or group.asleep:
            return await respond(send, 200, "success")
        # Who has no token need not know what the constructor says.
        reason = group.reason if self._options.token is None else ""
        text = f"Deployment {name!r} is not ready{reason and ': '}{reason}"
        await respond(send, 503, text, RETRY_AFTER)

    async def _forward(
        self, forwarding: Forwarding, info: RequestInfo, receive: Receive, send: Send
    ) -> None:
        call = forwarding.call
        watch = ClientWatch(
            call,
            receive,
            timeout_s=forwarding.timeout_s,
            deadline=forwarding.deadline,
            options=self._options,
            info=info,
        )
        try:
            if not call.begun:
                watch.check_length(info.headers.get(b"content-length"))
                forwarding.body, forwarding.more_body = await watch.read_eagerly(
                    EAGER_BODY_BYTES
                )
            watch.start(forwarding.more_body)
            message = await call.first(
                forwarding.make, retry_lost=forwarding.retry_lost
            )
            info.answered = message[0] != ERROR
            watch.response_began()
            await self._answer(call, message, send, forwarding.window_bytes)
        except BaseException:
            call.cancel()
            raise
        finally:
            watch.stop()

    async def _answer(
        self,
        call: Call,
        message: tuple[Any, ...],
        send: Send,
        window_bytes: int,
    ) -> None:
        op = message[0]
        if op == RESPONSE:
            await _send_start(send, message)
            await send({"type": "http.response.body", "body": message[4]})
        elif op == START:
            call.streams()
            await _send_start(send, message)
            await self._stream(call, send, min(CREDIT_STEP_BYTES, window_bytes // 2))
        elif op == ERROR and message[2] == STOPPED:
            raise ReplicaDiedError(message[4])
        elif op == ERROR:
            text = message[5] if self._options.debug else "Internal Server Error"
            await respond(send, 500, text)
        else:  # pragma: no cover
            raise AssertionError(f"unexpected message {op} from a replica")

    async def _stream(self, call: Call, send: Send, step_bytes: int) -> None:
        owed = 0
        more_body = True
        while more_body:
            try:
                message = await call.next()
            except ClientGoneError:
                raise
            except RequestError as err:
                raise CutError(str(err)) from err
            if message[0] != CHUNK:
                assert message[0] == ERROR and message[2] in (CUT, STOPPED)
                raise CutError(message[4])
            _, _, data, more_body = message
            size, loop = len(data), self._dispatcher.loop
            if size >= LARGE_BYTES and not may_write(loop, size):
                await turn(loop)
            await send(
                {"type": "http.response.body", "body": data, "more_body": more_body}
            )
            owed += len(data)
            if owed >= step_bytes and more_body:
                call.send(CREDIT, owed)
                owed = 0

    def _timeout_s(self, info: RequestInfo, group: Group | None) -> float | None:
        limit = self._options.request_timeout_s
        if group is not None and group.timeout_s is not None:
            limit = group.timeout_s
        asked = info.headers.get(b"x-request-timeout-seconds")
        if asked is not None:
            try:
                seconds = float(asked)
            except ValueError:
                return limit
            if seconds > 0 and (limit is None or seconds < limit):
                return seconds
        return limit

    async def _respond_error(
        self, send: Send, info: RequestInfo, error: RequestError
    ) -> None:
        status, headers, body = refuse(info, error)
        await _send_start(send, (START, 0, status, headers))
        await send({"type": "http.response.body", "body": body})


def refuse(info: RequestInfo, error: RequestError) -> tuple[int, Headers, bytes]:
    """Log that a request failed; return what to answer."""
    logger.info("Request %s: %s", info.request_id, error)
    return error_response(error)


async def _send_start(send: Send, message: tuple[Any, ...]) -> None:
    _, _, status, headers, *_ = message
    await send({"type": "http.response.start", "status": status, "headers": headers})


def _head(
    scope: Scope, root_path: str, path: str, info: RequestInfo
) -> tuple[Any, ...]:
    """Return `messages.Head` but the last two; `path` is without root path."""
    raw_path: bytes = scope.get("raw_path") or path.encode()
    if root_path:
        if path == scope["path"]:  # the root path was stripped on the way
            raw_path = quote(root_path, safe="/!$&'()*+,;=:@").encode() + raw_path
        path = root_path + path
    return (
        scope.get("method", "GET"),
        path,
        raw_path,
        scope["query_string"],
        scope["headers"],
        scope["http_version"],
        scope["scheme"],
        scope["client"],
        scope["server"],
        root_path + ("" if info.prefix == "/" else info.prefix),
        info.request_id,
    )
