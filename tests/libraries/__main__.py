"""Plain uvicorn for the apps named on the command line; prints their ports as JSON.

Each app has a server, and sees the prefix ``/prefix`` as its root path.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

from tests.libraries import load


def mounted(app: Any) -> Any:
    """Tell an app its root path, as ASGI wants it."""

    async def tell(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan" and scope["path"].startswith("/prefix/"):
            scope["root_path"] = "/prefix"
        await app(scope, receive, send)

    return tell


async def main(names: list[str]) -> None:
    servers = []
    for name in names:
        app = mounted(load(name).make_app())
        config = uvicorn.Config(app, interface="asgi3", port=0, access_log=False)
        servers.append(uvicorn.Server(config))
    serving = [asyncio.ensure_future(server.serve()) for server in servers]
    while not all(server.started for server in servers):
        for task in serving:
            assert not task.done(), task
        await asyncio.sleep(0.01)
    ports = [server.servers[0].sockets[0].getsockname()[1] for server in servers]
    print(json.dumps(dict(zip(names, ports, strict=True))), flush=True)
    await asyncio.gather(*serving)


asyncio.run(main(sys.argv[1:]))
