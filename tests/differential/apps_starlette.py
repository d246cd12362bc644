"""Starlette apps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from tests.differential.asgi import Memory

FILES = Path(__file__).parent / "files"


def text(words: str) -> Any:
    """Return an endpoint that answers with the path's parameters besides."""

    def endpoint(request: Request) -> Response:
        return PlainTextResponse(f"{words} {request.path_params}")

    return endpoint


# Routing.


class Verbs(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return PlainTextResponse("got")

    def post(self, request: Request) -> Response:
        return PlainTextResponse("posted", 201)


def urls(request: Request) -> Response:
    """Tell how the app's routes look from outside."""
    return JSONResponse(
        {
            "url": str(request.url),
            "base_url": str(request.base_url),
            "user": str(request.url_for("user", name="a b")),
            "deep": str(request.url_for("outer:inner:leaf", n=5)),
            "static": str(request.url_for("files", path="/a.txt")),
            "path": str(request.app.url_path_for("user", name="x")),
            "root_path": request.scope["root_path"],
            "client": request.client is not None,
            "cookies": request.cookies,
            "query": request.query_params.multi_items(),
        }
    )


def routing() -> ASGIApp:
    inner = [
        Route("/urls", urls),
        Route("/leaf/{n:int}/", text("leaf"), name="leaf"),
    ]
    return Starlette(
        routes=[
            Route("/", text("root")),
            Route("/urls", urls),
            Route("/users/{name}", text("user"), name="user"),
            Route("/float/{x:float}", text("float")),
            Route("/rest/{path:path}", text("rest")),
            Route("/slash/", text("with slash")),
            Route("/no-slash", text("without slash")),
            Route("/post", text("posted"), methods=["POST", "PATCH"]),
            Route("/redirect", lambda request: RedirectResponse("users/me", 303)),
            Route(
                "/redirect-to",
                lambda request: RedirectResponse(
                    request.url_for("user", name="ü"), 307
                ),
            ),
            Route("/verbs", Verbs),
            Mount(
                "/outer",
                name="outer",
                routes=[Mount("/inner", name="inner", routes=inner)],
            ),
            Mount("/files", StaticFiles(directory=FILES), name="files"),
            Host("api.{domain}", Router([Route("/host", text("by host"))])),
        ]
    )


# Files.


async def one_file(request: Request) -> Response:
    return FileResponse(FILES / "a.txt", filename="ä b.txt", headers={"x-own": "1"})


async def missing_file(request: Request) -> Response:
    return FileResponse(FILES / "nothing.txt")


def files() -> ASGIApp:
    return Starlette(
        routes=[
            Route("/one", one_file),
            Route("/missing", missing_file),
            Mount("/static", StaticFiles(directory=FILES, html=True)),
        ]
    )


# Streams and background tasks.


def streaming() -> ASGIApp:
    memory = Memory()

    def words() -> Iterator[str]:
        yield from ("sync ", "", "ä ", "end")

    async def async_words() -> AsyncIterator[bytes]:
        for word in (b"async ", b"words ", b"end"):
            yield word
            await asyncio.sleep(0)

    async def fails() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.sleep(0.01)
        raise LookupError("on purpose")

    async def note(key: str, what: str) -> None:
        await memory.wait(key)
        memory.notes[key].append(what)

    def note_sync(key: str, what: str) -> None:
        memory.notes[key].append(what)

    def after(request: Request) -> Response:
        """Answer, then run tasks: the first waits for a gate."""
        key = request.path_params["key"]
        tasks = BackgroundTasks()
        tasks.add_task(note, key, "async")
        tasks.add_task(note_sync, key, "sync")
        return PlainTextResponse("answered", background=tasks)

    def after_stream(request: Request) -> Response:
        task = BackgroundTask(note, request.path_params["key"], "after the stream")
        return StreamingResponse(async_words(), 202, background=task)

    async def fail_after() -> None:
        raise LookupError("on purpose, in the background")

    def failing_after(request: Request) -> Response:
        return PlainTextResponse("answered", background=BackgroundTask(fail_after))

    async def gone(request: Request) -> Response:
        """Look for the client until it has gone."""
        notes = memory.notes[request.path_params["key"]]
        notes.append("called")
        try:
            while not await request.is_disconnected():
                await asyncio.sleep(0.005)
            notes.append("disconnected")
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise
        return Response()

    async def closes(request: Request) -> Response:
        """Stream until the client goes; its generator is closed then."""
        notes = memory.notes[request.path_params["key"]]

        async def forever() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick"
                    await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                notes.append("cancelled")
                raise
            finally:
                notes.append("closed")

        return StreamingResponse(forever())

    return Starlette(
        routes=[
            Route("/sync", lambda request: StreamingResponse(words())),
            Route(
                "/async",
                lambda request: StreamingResponse(async_words(), media_type="text/x"),
            ),
            Route("/fails", lambda request: StreamingResponse(fails())),
            Route("/after/{key}", after),
            Route("/after-stream/{key}", after_stream),
            Route("/failing-after", failing_after),
            Route("/gone/{key}", gone),
            Route("/closes/{key}", closes),
            Mount("/", memory),
        ]
    )


# Errors.


class TeapotError(Exception):
    pass


async def raise_it(request: Request) -> Response:
    kind = request.path_params["kind"]
    if kind == "teapot":
        raise TeapotError("short and stout")
    if kind == "http":
        raise HTTPException(402, detail="pay", headers={"x-price": "5"})
    if kind == "empty":
        raise HTTPException(204)
    if kind == "unavailable":
        raise HTTPException(503)
    raise LookupError(kind)


async def brew(request: Request, error: Exception) -> Response:
    return HTMLResponse(f"<b>{error}</b>", 418)


async def not_found(request: Request, error: Exception) -> Response:
    return JSONResponse({"path": request.url.path}, 404)


async def last_resort(request: Request, error: Exception) -> Response:
    return JSONResponse({"sorry": type(error).__name__}, 500, {"x-sorry": "1"})


def errors() -> ASGIApp:
    handlers: Any = {TeapotError: brew, 404: not_found}
    routes = [Route("/{kind}", raise_it)]
    return Starlette(routes=routes, exception_handlers=handlers)


def last_errors() -> ASGIApp:
    handlers: Any = {Exception: last_resort}
    routes = [Route("/{kind}", raise_it)]
    return Starlette(routes=routes, exception_handlers=handlers)


# Middleware.


class Stamp(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        if "refuse" in request.query_params:
            return PlainTextResponse("refused", 401)
        request.state.stamp = "stamped"
        response: Response = await call_next(request)
        response.headers["x-stamp"] = "1"
        return response


async def stamped(request: Request) -> Response:
    data = await request.body()
    return JSONResponse([request.state.stamp, len(data)])


async def stream(request: Request) -> Response:
    async def parts() -> AsyncIterator[str]:
        for n in range(300):
            yield f"line {n}\n"

    return StreamingResponse(parts(), media_type="text/plain")


def middleware() -> ASGIApp:
    return Starlette(
        routes=[
            Route("/stamped", stamped, methods=["GET", "POST"]),
            Route("/stream", stream),
            Route("/raise/{kind}", raise_it),
            Route("/long", lambda request: PlainTextResponse("long " * 1000)),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=["https://friend.test"],
                allow_methods=["GET", "PUT"],
                allow_headers=["x-mine"],
                allow_credentials=True,
                expose_headers=["x-stamp"],
            ),
            Middleware(GZipMiddleware, minimum_size=500),
            Middleware(Stamp),
        ],
    )


def trusted_hosts() -> ASGIApp:
    hosts = ["example.test", "*.good.test"]
    return Starlette(
        routes=[Route("/", text("trusted"))],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=True)
        ],
    )


async def count(request: Request) -> Response:
    request.session["count"] = request.session.get("count", 0) + 1
    return JSONResponse(request.session)


def forget(request: Request) -> Response:
    request.session.clear()
    return Response()


def sessions() -> ASGIApp:
    return Starlette(
        routes=[Route("/count", count), Route("/forget", forget)],
        middleware=[Middleware(SessionMiddleware, secret_key="not a secret")],
    )


# Bodies.


async def form(request: Request) -> Response:
    async with request.form() as data:
        found: list[list[Any]] = []
        for name, value in data.multi_items():
            if isinstance(value, str):
                found.append([name, value])
            else:
                content = await value.read()
                found.append([name, value.filename, value.content_type, len(content)])
    return JSONResponse(found)


async def stream_of_body(request: Request) -> Response:
    total = 0
    async for part in request.stream():
        total += len(part)
    return JSONResponse({"total": total, "gone": await request.is_disconnected()})


async def json_body(request: Request) -> Response:
    return JSONResponse({"json": await request.json(), "again": await request.json()})


def forms() -> ASGIApp:
    return Starlette(
        routes=[
            Route("/form", form, methods=["POST", "PUT"]),
            Route("/stream", stream_of_body, methods=["POST"]),
            Route("/json", json_body, methods=["POST"]),
        ]
    )


# Lifespan.


def lifespan() -> ASGIApp:
    events: list[str] = []

    @asynccontextmanager
    async def span(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        events.append("up")
        app.state.answer = 42
        yield {"numbers": [1], "name": "state"}

    async def state(request: Request) -> Response:
        found = {"name": request.state.name, "numbers": request.state.numbers}
        request.state.name = "changed"
        return JSONResponse([events, request.app.state.answer, found])

    return Starlette(routes=[Route("/state", state)], lifespan=span)


# WebSockets.


class Counting(WebSocketEndpoint):
    encoding = "json"

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept(headers=[(b"x-counting", b"1")])

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await websocket.send_json({"got": data, "url": str(websocket.url)})


async def by_path(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(str(websocket.path_params))
    async for message in websocket.iter_text():
        await websocket.send_bytes(message.encode())


async def denied(websocket: WebSocket) -> None:
    await websocket.send_denial_response(
        JSONResponse({"why": "no"}, 401, {"x-why": "no"})
    )


def websockets() -> ASGIApp:
    return Starlette(
        routes=[
            WebSocketRoute("/counting", Counting),
            WebSocketRoute("/by/{name}", by_path),
            WebSocketRoute("/denied", denied),
            Route("/http", text("http")),
        ]
    )
