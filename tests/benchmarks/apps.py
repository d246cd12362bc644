"""The apps that are served both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

#: Of large bodies.
BLOCK = bytes(256 * 1024)
#: Of streams: a byte that HTTP around it never has, so that clients can count it.
BYTE = b"\xff"
CHUNKS, CHUNK = 200, BYTE * 64


async def _noop(request: Request) -> JSONResponse:
    return JSONResponse({"ok": True})


async def function(request: Request) -> dict[str, bool]:
    return {"ok": True}


starlette = Starlette(routes=[Route("/", _noop)])
fastapi_async = FastAPI()
fastapi_sync = FastAPI()


@fastapi_async.get("/")
async def get_async() -> dict[str, bool]:
    return {"ok": True}


@fastapi_sync.get("/")
def get_sync() -> dict[str, bool]:
    return {"ok": True}


async def _up(request: Request) -> Response:
    size = 0
    async for block in request.stream():
        size += len(block)
    return PlainTextResponse(str(size))


async def _down(request: Request) -> Response:
    async def blocks(size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, len(BLOCK)):
            yield BLOCK[: size - start]

    return StreamingResponse(blocks(request.path_params["size"]))


async def _whole(request: Request) -> Response:
    return Response(bytes(request.path_params["size"]))


async def _stream(request: Request) -> Response:
    async def chunks(pause_ms: int) -> AsyncIterator[bytes]:
        for _ in range(CHUNKS):
            yield CHUNK
            if pause_ms:
                await asyncio.sleep(pause_ms / 1000)

    return StreamingResponse(chunks(request.path_params["pause_ms"]))


async def _echo(socket: WebSocket) -> None:
    await socket.accept()
    try:
        while True:
            await socket.send_text(await socket.receive_text())
    except WebSocketDisconnect:
        pass


#: Of bodies, streams and WebSockets.
large = Starlette(
    routes=[
        Route("/", _noop),
        Route("/up", _up, methods=["PUT"]),
        Route("/down/{size:int}", _down),
        Route("/whole/{size:int}", _whole),
        Route("/stream/{pause_ms:int}", _stream),
        WebSocketRoute("/echo", _echo),
    ]
)

#: Apps of small requests that plain uvicorn serves, by the name of the row.
PLAIN = {
    "starlette": "starlette",
    "fastapi-async": "fastapi_async",
    "fastapi-sync": "fastapi_sync",
    "function": "starlette",
}
