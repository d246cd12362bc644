"""Plain uvicorn, in a process of its own: one server for each app.

Prints the ports as JSON. An app sees a prefix ``/near/{name}`` or ``/far/{name}`` as
its root path, and else serves ``/``.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.differential.apps import APPS

_PREFIX = re.compile(r"/(near|far)/[^/]+")


def mounted(app: ASGIApp) -> ASGIApp:
    """Tell an app its root path, as ASGI wants it."""

    async def tell(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            prefix = _PREFIX.match(scope["path"])
            scope["root_path"] = prefix.group() if prefix else ""
        await app(scope, receive, send)

    return tell


def server_of(app: ASGIApp) -> uvicorn.Server:
    """Return a server that is set as a proxy's is."""
    config = uvicorn.Config(
        mounted(app),
        interface="asgi3",
        loop="none",
        http="httptools",
        timeout_keep_alive=90,
        server_header=False,
        access_log=False,
        log_level="critical",
    )
    return uvicorn.Server(config)


async def main() -> None:
    """Serve until the process is ended."""
    ports, serving = {}, []
    for name, app in APPS.items():
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(100)
        ports[name] = sock.getsockname()[1]
        server = server_of(app.make())
        serving.append(asyncio.ensure_future(server.serve(sockets=[sock])))
        while not server.started:
            assert not serving[-1].done(), f"{name} does not start"
            await asyncio.sleep(0.001)
    print(json.dumps(ports), flush=True)
    await asyncio.gather(*serving)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
