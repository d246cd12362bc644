"""The ASGI app of a proxy: request in, replica's answer out.

Runs under uvicorn on the transport loop. `Front` wraps everything: request id, token,
access log. Between it and `Forwarder`, which routes and forwards, are the instance's
middlewares.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daskserve.config import HTTPOptions
from daskserve.exceptions import (
    QueueFullError,
    ReplicaDiedError,
    RequestError,
    RequestTooLargeError,
)
from daskserve.proxy.client_watch import ClientGoneError, ClientWatch
from daskserve.proxy.routes import RouteTable
from daskserve.proxy.websocket import WebSocketRelay, refuse
from daskserve.transport.dispatcher import Call, Dispatcher, Group
from daskserve.transport.messages import (
    CHUNK,
    CREDIT,
    CUT,
    ERROR,
    REQUEST,
    RESPONSE,
    START,
    STOPPED,
)

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("daskserve.access")

TEXT = (b"content-type", b"text/plain; charset=utf-8")
#: Methods that a client may be sure can be sent twice (RFC 9110, 9.2.2).
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
#: A body up to this size is read before a replica's place is taken.
EAGER_BODY_BYTES = 64 * 1024
#: Credit is given back in steps of this many bytes.
CREDIT_STEP_BYTES = 128 * 1024

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_id_prefix = os.urandom(8).hex()
_id_counter = itertools.count(1)


class RequestInfo:
    """What is known of one request, for its log line."""

    __slots__ = ("deployment", "prefix", "request_id", "started", "status")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.started = time.perf_counter()
        self.status = 0
        self.prefix = ""
        self.deployment = ""


class CutError(Exception):
    """The response began and cannot be completed: the connection is to be cut."""


class Front:
    """The outermost app: request id, token and access log, also on errors.

    Parameters
    ----------
    app
        The middlewares and the forwarder in them.
    options
        The instance's HTTP options.
    """

    def __init__(self, app: ASGIApp, options: HTTPOptions) -> None:
        self._app = app
        self._token: bytes | None = None
        if options.token is not None:
            self._token = b"Bearer " + options.token.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        info = scope["daskserve"] = RequestInfo(_request_id(scope))
        if scope["type"] == "websocket":
            return await self._websocket(scope, receive, send, info)
        header = (b"x-request-id", info.request_id.encode())

        async def send_with_id(event: Message) -> None:
            if event["type"] == "http.response.start":
                info.status = event["status"]
                event["headers"] = [*event.get("headers", ()), header]
            await send(event)

        try:
            if not self._authorized(scope):
                challenge = (b"www-authenticate", b"Bearer")
                await respond(send_with_id, 401, "Unauthorized", challenge)
            else:
                await self._app(scope, receive, send_with_id)
        except CutError as err:
            # uvicorn closes the connection of an app that returns in mid-response.
            logger.warning("Request %s was cut: %s", info.request_id, err)
        except ClientGoneError:
            info.status = 499
        except Exception:
            # Only a middleware of the user's can get here.
            logger.exception("Request %s failed in the proxy", info.request_id)
            if info.status:
                return
            await respond(send_with_id, 500, "Internal Server Error")
        finally:
            if access_logger.isEnabledFor(logging.INFO):
                _log_access(scope["method"], info)

    async def _websocket(
        self, scope: Scope, receive: Receive, send: Send, info: RequestInfo
    ) -> None:
        header = (b"x-request-id", info.request_id.encode())

        async def send_with_id(event: Message) -> None:
            if not info.status:  # accept, response or close: the handshake's end
                accepted = event["type"] == "websocket.accept"
                info.status = 101 if accepted else event.get("status", 403)
                event["headers"] = [*event.get("headers", ()), header]
            await send(event)

        try:
            if not self._authorized(scope):
                await refuse(send_with_id, 401, "Unauthorized")
            else:
                await self._app(scope, receive, send_with_id)
        except RequestError as err:
            logger.info("WebSocket %s: %s", info.request_id, err)
            text = str(err) or type(err).__name__
            await refuse(send_with_id, err.status_code, text)
        finally:
            if access_logger.isEnabledFor(logging.INFO):
                _log_access("WEBSOCKET", info)

    def _authorized(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] == "/-/healthz":
            return True
        given = _header(scope, b"authorization") or b""
        return hmac.compare_digest(given, self._token)


class Forwarder:
    """Match the route, pick a replica, forward, answer.

    Parameters
    ----------
    dispatcher
        The process's way to the replicas.
    options
        The instance's HTTP options.
    """

    def __init__(self, dispatcher: Dispatcher, options: HTTPOptions) -> None:
        self.draining = False
        self._dispatcher = dispatcher
        self._options = options
        self._root_path = options.root_path
        self._table = RouteTable({})

    def set_routes(self, routes: dict[str, str]) -> None:
        """Take a new routing table."""
        self._table = RouteTable(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path: str = scope["path"]
        websocket = scope["type"] == "websocket"
        if path.startswith("/-/") and not websocket:
            return await self._serve_own(path, scope, send)
        info: RequestInfo = scope["daskserve"]
        match = self._table.match(path)
        root_path = self._root_path
        if match is None and root_path and path.startswith(root_path + "/"):
            # The proxy in front of this one has not stripped its prefix.
            path = path[len(root_path) :]
            match = self._table.match(path)
        if match is None and websocket:
            await receive()
            return await send({"type": "websocket.close"})  # before accept: a 403
        if match is None:
            text = f"Path '{path}' not found. Please ping {_origin(scope)}/-/routes"
            return await respond(send, 404, f"{text} for route table.")
        info.prefix, info.deployment = match
        if websocket:
            group = self._dispatcher.groups.get(info.deployment)
            limit = self._timeout_s(scope, group)
            relay = WebSocketRelay(self._dispatcher, info.deployment, limit)
            head = _head(scope, root_path, path, info)
            return await relay.run(head, scope, receive, send)
        try:
            await self._forward(scope, receive, send, info, root_path, path)
        except ClientGoneError:
            raise
        except RequestError as err:
            await self._respond_error(send, info, err)

    async def _serve_own(self, path: str, scope: Scope, send: Send) -> None:
        """Answer the paths that are the proxy's own."""
        if scope["method"] not in ("GET", "HEAD"):
            return await respond(send, 405, "Method Not Allowed", (b"allow", b"GET"))
        if path == "/-/routes":
            body = orjson.dumps(self._table.routes)
            return await respond(send, 200, body, kind=b"application/json")
        if path == "/-/healthz":
            if self.draining:
                return await respond(send, 503, "This proxy is draining.")
            if self._dispatcher.version < 0:
                return await respond(send, 503, "The route table is not here yet.")
            return await respond(send, 200, "success")
        text = f"Path '{path}' not found. Please ping {_origin(scope)}/-/routes"
        await respond(send, 404, f"{text} for route table.")

    async def _forward(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        info: RequestInfo,
        root_path: str,
        path: str,
    ) -> None:
        dispatcher = self._dispatcher
        group = dispatcher.groups.get(info.deployment)
        call = Call(dispatcher, info.deployment)
        watch = ClientWatch(
            call,
            receive,
            timeout_s=self._timeout_s(scope, group),
            max_body_bytes=self._options.max_request_body_bytes,
            deployment=info.deployment,
        )
        try:
            watch.check_length(_header(scope, b"content-length"))
            body, more_body = await watch.read_eagerly(EAGER_BODY_BYTES)
            head = _head(scope, root_path, path, info)

            def make(exchange_id: int, replica_id: int) -> tuple[Any, ...]:
                return REQUEST, exchange_id, replica_id, head, body, more_body

            watch.start(more_body)
            retry = not more_body and scope["method"] in IDEMPOTENT
            message = await call.first(make, retry_lost=retry)
            watch.response_began()
            await self._answer(call, message, send, info, watch)
        except BaseException:
            call.cancel()
            raise
        finally:
            watch.stop()
            call.finish()

    async def _answer(
        self,
        call: Call,
        message: tuple[Any, ...],
        send: Send,
        info: RequestInfo,
        watch: ClientWatch,
    ) -> None:
        op = message[0]
        if op == RESPONSE:
            await _send_start(send, message[2], message[3], watch)
            await send({"type": "http.response.body", "body": message[4]})
        elif op == START:
            await _send_start(send, message[2], message[3], watch)
            await self._stream(call, send)
        elif op == ERROR and message[2] == STOPPED:
            raise ReplicaDiedError(message[4])
        elif op == ERROR:
            text = message[5] if self._options.debug else "Internal Server Error"
            await respond(send, 500, text)
        else:  # pragma: no cover
            raise AssertionError(f"unexpected message {op} from a replica")

    async def _stream(self, call: Call, send: Send) -> None:
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
            await send(
                {"type": "http.response.body", "body": data, "more_body": more_body}
            )
            owed += len(data)
            if owed >= CREDIT_STEP_BYTES and more_body:
                call.send(CREDIT, owed)
                owed = 0

    def _timeout_s(self, scope: Scope, group: Group | None) -> float | None:
        limit = self._options.request_timeout_s
        if group is not None and group.timeout_s is not None:
            limit = group.timeout_s
        asked = _header(scope, b"x-request-timeout-seconds")
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
        logger.info("Request %s: %s", info.request_id, error)
        extra: list[tuple[bytes, bytes]] = []
        if error.status_code == 503:
            extra.append((b"retry-after", b"1"))
        if isinstance(error, RequestTooLargeError):
            extra.append((b"connection", b"close"))  # the rest is not read
        text = str(error)
        if isinstance(error, QueueFullError | ReplicaDiedError):
            text = text or type(error).__name__
        await respond(send, error.status_code, text, *extra)


def build_app(
    forwarder: Forwarder, options: HTTPOptions
) -> Callable[[Scope, Receive, Send], Any]:
    """Return the whole app: front, middlewares, forwarder."""
    app: ASGIApp = forwarder
    for middleware in reversed(options.middlewares):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return Front(app, options)


async def respond(
    send: Send,
    status: int,
    body: str | bytes,
    *extra: tuple[bytes, bytes],
    kind: bytes = TEXT[1],
) -> None:
    """Send a whole response of the proxy's own."""
    data = body.encode("utf-8", "replace") if isinstance(body, str) else body
    headers = [
        (b"content-length", b"%d" % len(data)),
        (b"content-type", kind),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def _send_start(
    send: Send, status: int, headers: Any, watch: ClientWatch
) -> None:
    headers = list(headers)
    if watch.body_unread:  # uvicorn would wait for the rest of it
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})


def _head(
    scope: Scope, root_path: str, path: str, info: RequestInfo
) -> tuple[Any, ...]:
    """Return `messages.HEAD_FIELDS` of a request; ``path`` is without root path."""
    prefix = "" if info.prefix == "/" else info.prefix
    raw_path: bytes = scope.get("raw_path") or path.encode()
    if root_path:
        if not scope["path"].startswith(root_path + "/"):
            raw_path = root_path.encode() + raw_path
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
        root_path + prefix,
        info.request_id,
    )


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"{_id_prefix}{next(_id_counter):08x}"


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def _origin(scope: Scope) -> str:
    host = _header(scope, b"host")
    if host is None or not re.fullmatch(rb"[\w.:\[\]-]+", host):
        server = scope["server"] or ("localhost", 80)
        return f"{scope['scheme']}://{server[0]}:{server[1]}"
    return f"{scope['scheme']}://{host.decode('ascii', 'replace')}"


def _log_access(method: str, info: RequestInfo) -> None:
    access_logger.info(
        "%s %s %d %.1fms request_id=%s deployment=%s",
        method,
        info.prefix or "-",
        info.status,
        (time.perf_counter() - info.started) * 1e3,
        info.request_id,
        info.deployment or "-",
    )
