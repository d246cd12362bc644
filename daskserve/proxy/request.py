"""What the parts of a proxy know of one request, and answers of the proxy's own."""

from __future__ import annotations

import itertools
import os
import re
import time
from typing import Any

from starlette.types import Scope, Send

TEXT = b"text/plain; charset=utf-8"

#: Where in the scope a proxy keeps the request's `RequestInfo`.
SCOPE_KEY = "daskserve"
#: Where in the scope it says that the server holds as much as it may.
FULL_KEY = "daskserve.full"
#: Where in the scope the connection is, for as long as it stands.
CONNECTION_KEY = "daskserve.connection"

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_HOST = re.compile(rb"[\w.:\[\]-]+")
_id_prefix = os.urandom(8).hex()
_id_counter = itertools.count(1)


class CutError(Exception):
    """The response began and cannot be completed: the connection is to be cut."""


class RequestInfo:
    """What is known of one request.

    Parameters
    ----------
    scope
        The server's ASGI scope.
    """

    __slots__ = (
        "answered",
        "authorized",
        "body_unread",
        "connection",
        "deployment",
        "forwarding",
        "headers",
        "prefix",
        "request_id",
        "started",
        "status",
    )

    def __init__(self, scope: Scope) -> None:
        #: The last one of each name.
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        #: The client's own if it is well formed, else a new one.
        self.request_id = _request_id(self.headers.get(b"x-request-id"))
        self.started = time.perf_counter()
        #: Of the response; 0 before it.
        self.status = 0
        #: The app has begun a response of its own.
        self.answered = False
        #: It has the token, if there is one.
        self.authorized = False
        #: A part of the request's body has not come yet.
        self.body_unread = False
        #: Has an attribute `on_lost`; None for a WebSocket.
        self.connection: Any = scope.get(CONNECTION_KEY)
        self.prefix = ""
        self.deployment = ""
        #: The `Forwarding` that the quick way has begun.
        self.forwarding: Any = None


def origin(scope: Scope, info: RequestInfo) -> str:
    """Return scheme, host and port as the client sees them."""
    host = info.headers.get(b"host", b"")
    if _HOST.fullmatch(host):
        return f"{scope['scheme']}://{host.decode('ascii', 'replace')}"
    name, port = scope["server"] or ("localhost", None)
    return f"{scope['scheme']}://{name}" + (f":{port}" if port else "")


async def respond(
    send: Send,
    status: int,
    body: str | bytes,
    *extra: tuple[bytes, bytes],
    content_type: bytes = TEXT,
) -> None:
    """Send a whole response of the proxy's own."""
    data = body.encode("utf-8", "replace") if isinstance(body, str) else body
    headers = [
        (b"content-type", content_type),  # first, as in uvicorn's own
        (b"content-length", b"%d" % len(data)),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def _request_id(given: bytes | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"{_id_prefix}{next(_id_counter):08x}"
