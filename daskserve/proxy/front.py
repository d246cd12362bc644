"""The outermost part of a proxy: request ids, the token, the access log."""

from __future__ import annotations

import hmac
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daskserve.config import READY_PATH, HTTPOptions
from daskserve.exceptions import RequestError
from daskserve.proxy.client_watch import ClientGoneError
from daskserve.proxy.forwarded import FORWARDED_PREFIX
from daskserve.proxy.request import SCOPE_KEY, CutError, RequestInfo, respond
from daskserve.proxy.websocket import refuse

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("daskserve.access")

_BEARER = b"Bearer "


def wrap(app: ASGIApp, options: HTTPOptions) -> Front:
    """Put the instance's middlewares, and around them a `Front`, around `app`."""
    if options.token is not None:
        app = _Gate(app)
    for middleware in reversed(options.middlewares):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return Front(app, options)


class _Gate:
    """Lets nobody in who has no token; the middlewares are around it.

    So a browser's preflight, which never has the token, is answered by the CORS
    middleware, and a page can read a 401.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        info: RequestInfo = scope[SCOPE_KEY]
        if info.authorized:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await refuse(send, 401, "Unauthorized")
        else:
            await respond(send, 401, "Unauthorized", (b"www-authenticate", b"Bearer"))


class Front:
    """Wraps everything, errors and the middlewares' own responses included.

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
            self._token = _BEARER + options.token.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        info = scope.get(SCOPE_KEY)  # if it comes from the quick way
        if info is None:
            info = scope[SCOPE_KEY] = RequestInfo(scope)
        serve = self._http if scope["type"] == "http" else self._websocket
        try:
            await serve(scope, receive, send, info)
        finally:
            if access_logger.isEnabledFor(logging.INFO):
                log_access(scope.get("method", "WEBSOCKET"), info)

    async def _http(
        self, scope: Scope, receive: Receive, send: Send, info: RequestInfo
    ) -> None:
        header = (b"x-request-id", info.request_id.encode())

        async def send_with_id(event: Message) -> None:
            if event["type"] != "http.response.start":
                return await send(event)
            headers = [*event.get("headers", ()), header]
            if info.body_unread and not _may_finish(info):
                headers.append((b"connection", b"close"))
            await send({**event, "headers": headers})
            info.status = event["status"]  # now that the server has taken it

        try:
            info.authorized = self.authorized(scope, info)
            if not info.authorized:
                receive = _unread()
            await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            info.status = 499
        except CutError as err:
            # uvicorn closes the connection of an app that returns in mid-response.
            logger.warning("Request %s was cut: %s", info.request_id, err)
        except Exception:
            # A middleware of the user's, or a response that the server refuses.
            logger.exception("Request %s failed in the proxy", info.request_id)
            if not info.status:
                await respond(send_with_id, 500, "Internal Server Error")

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
            info.authorized = self.authorized(scope, info)
            await self._app(scope, receive, send_with_id)
        except RequestError as err:
            logger.info("WebSocket %s: %s", info.request_id, err)
            text = str(err) or type(err).__name__
            await refuse(send_with_id, err.status_code, text)

    def authorized(self, scope: Scope, info: RequestInfo) -> bool:
        """Whether a request has the token, if there is one."""
        if self._token is None:
            return True
        path = scope["path"]
        is_probe = path == "/-/healthz" or path.startswith(READY_PATH)
        if is_probe and scope["type"] == "http":
            # Open, as what the proxy answers itself; a forwarded prefix could make
            # another path of it.
            return FORWARDED_PREFIX not in scope
        given = info.headers.get(b"authorization", b"")
        if given[:7] != _BEARER and given[:7].lower() == b"bearer ":
            given = _BEARER + given[7:]  # its case does not matter (RFC 9110, 11.1)
        return hmac.compare_digest(given, self._token)


def _unread() -> Receive:
    """Return a ``receive`` for middlewares that gives nothing of a body."""
    events: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"", "more_body": False},
    ]

    async def receive() -> Message:
        return events.pop() if len(events) > 1 else events[0]

    return receive


def _may_finish(info: RequestInfo) -> bool:
    """Whether the server may read, and drop, the rest of a body that nobody wants.

    Without it the connection is reset, and a client that writes its body before it
    reads loses the app's answer. A body that is refused, or has no end, is not read.
    """
    return info.answered and b"content-length" in info.headers


def log_access(method: str, info: RequestInfo) -> None:
    """Write a request's line."""
    access_logger.info(
        "%s %s %d %.1fms request_id=%s deployment=%s",
        method,
        info.prefix or "-",
        info.status,
        (time.perf_counter() - info.started) * 1e3,
        info.request_id,
        info.deployment or "-",
    )
