"""FastAPI apps."""

import asyncio
import datetime
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    File,
    Form,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
    UploadFile,
    WebSocket,
    WebSocketException,
)
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    StreamingResponse,
)
from fastapi.security import HTTPBasic, HTTPBasicCredentials, OAuth2PasswordBearer
from pydantic import BaseModel, Field
from starlette.types import ASGIApp

import daskserve as serve
from tests.differential.asgi import Memory


class Item(BaseModel):
    name: str = Field(min_length=2)
    price: float
    tags: list[str] = []
    when: datetime.datetime | None = None


class Public(BaseModel):
    name: str
    id: uuid.UUID


def items() -> ASGIApp:
    app = FastAPI(title="Items", version="2")

    @app.get("/items/{number}")
    async def get(number: int, q: Annotated[str | None, Query(max_length=5)] = None):  # type: ignore[no-untyped-def]
        return {"number": number, "q": q}

    @app.post("/items", status_code=201, response_model=Public)
    def create(item: Item) -> Any:
        number = uuid.UUID(int=len(item.name))
        return {"name": item.name, "id": number, "secret": "not to be seen"}

    @app.put("/items/{number}")
    async def put(number: int, item: Item, note: Annotated[str, Body()]) -> Item:
        return item.model_copy(update={"name": f"{number} {note}"})

    @app.get("/broken", response_model=Item)
    def broken() -> Any:
        return {"name": "x"}

    @app.get("/parameters")
    def parameters(
        user_agent: Annotated[str | None, Header()] = None,
        x_many: Annotated[list[str] | None, Header()] = None,
        session: Annotated[str | None, Cookie()] = None,
        tags: Annotated[list[str] | None, Query()] = None,
    ) -> list[Any]:
        return [user_agent, x_many, session, tags]

    @app.get("/cookies")
    def cookies(response: Response) -> dict[str, int]:
        response.set_cookie("a", "1", httponly=True, max_age=60)
        response.set_cookie("b", "ü".encode().hex(), samesite="strict")
        response.headers["X-Own"] = "1"
        response.status_code = 203
        return {"cookies": 2}

    @app.get("/html", response_class=HTMLResponse)
    def html() -> str:
        return "<p>ü</p>"

    @app.get("/nothing", status_code=204)
    def nothing() -> None: ...

    @app.get("/elsewhere", response_class=RedirectResponse, status_code=302)
    def elsewhere() -> str:
        return "https://example.test/ä?b=c d"

    @app.get("/slash/")
    def slash() -> str:
        return "slash"

    # Not in the schema: an id there would be of any of the methods, they are a set.
    @app.api_route(
        "/any",
        methods=["GET", "PATCH", "DELETE", "OPTIONS", "HEAD"],
        include_in_schema=False,
    )
    async def any_method(request: Request) -> str:
        return str(request.method)

    return app


def dependencies() -> ASGIApp:
    memory = Memory()
    app = FastAPI()

    def key(request: Request) -> str:
        return request.url.path.rpartition("/")[2]

    def sync_resource(key: Annotated[str, Depends(key)]) -> Iterator[list[str]]:
        notes = memory.notes[key]
        notes.append("sync open")
        try:
            yield notes
        except LookupError:
            notes.append("sync saw the error")
            raise
        finally:
            notes.append("sync closed")

    async def resource(
        notes: Annotated[list[str], Depends(sync_resource)],
    ) -> AsyncIterator[list[str]]:
        notes.append("async open")
        yield notes
        notes.append("async closed")

    Resource = Annotated[list[str], Depends(resource)]

    @app.get("/use/{key}")
    def use(notes: Resource) -> str:
        notes.append("used")
        return "used"

    @app.get("/fail/{key}")
    async def fail(notes: Resource) -> str:
        raise LookupError("on purpose")

    @app.get("/refuse/{key}")
    async def refuse(notes: Resource) -> str:
        raise HTTPException(409, {"why": ["nested"]}, {"x-why": "1"})

    @app.get("/stream/{key}")
    async def stream(notes: Resource) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "one"
            notes.append("streamed")
            yield "two"

        return StreamingResponse(parts())

    app.mount("/", memory)
    return app


def routers() -> ASGIApp:
    """Has routers with prefixes, an app in the app, and docs of both."""
    app = FastAPI(
        title="Outer", docs_url="/the-docs", servers=[{"url": "https://example.test"}]
    )
    router = APIRouter(prefix="/router", tags=["r"])
    nested = APIRouter(prefix="/nested")
    inner = FastAPI(title="Inner")

    @router.get("/x", name="router_x")
    def x(request: Request) -> list[str]:
        return [str(request.url_for("router_x")), str(request.url_for("nested_y"))]

    @nested.get("/y", name="nested_y")
    def y(request: Request) -> str:
        return f"{request.scope['root_path']}|{request.url.path}"

    @inner.get("/z")
    def z(request: Request) -> list[str]:
        return [request.scope["root_path"], str(request.url_for("z"))]

    @inner.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(str(websocket.url_for("z")))
        await websocket.close()

    router.include_router(nested)
    app.include_router(router)
    app.mount("/inner", inner)
    return app


def docs() -> ASGIApp:
    """Has its docs where they are by default."""
    app = FastAPI()

    @app.get("/", summary="The root")
    def root(request: Request) -> str:
        return str(request.url_for("swagger_ui_html"))

    return app


def rooted() -> ASGIApp:
    """Says itself what a proxy in front of it strips."""
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and in use
        app = FastAPI(root_path="/outside")
    inner = FastAPI()

    @app.get("/")
    def root(request: Request) -> list[str]:
        scope = request.scope
        return [scope["root_path"], scope["path"], str(request.url_for("root"))]

    @inner.get("/x")
    def x(request: Request) -> list[str]:
        return [request.scope["root_path"], str(request.url_for("x"))]

    app.mount("/inner", inner)
    return app


def security() -> ASGIApp:
    app = FastAPI()
    bearer = OAuth2PasswordBearer(tokenUrl="token")
    basic = HTTPBasic(realm="here")

    @app.get("/bearer")
    async def with_bearer(token: Annotated[str, Depends(bearer)]) -> str:
        return token

    @app.get("/basic")
    def with_basic(who: Annotated[HTTPBasicCredentials, Depends(basic)]) -> list[str]:
        return [who.username, who.password]

    @app.post("/token")
    def token(
        username: Annotated[str, Form()], password: Annotated[str, Form()]
    ) -> Any:
        return {"access_token": username, "token_type": "bearer"}

    return app


def tasks() -> ASGIApp:
    memory = Memory()
    app = FastAPI()

    async def later(key: str) -> None:
        await memory.wait(key)
        memory.notes[key].append("async task")

    def later_sync(key: str) -> None:
        memory.notes[key].append("sync task")

    def dependency(key: str, tasks: BackgroundTasks) -> None:
        tasks.add_task(memory.notes[key].append, "the dependency's task")

    @app.get("/after/{key}", dependencies=[Depends(dependency)])
    async def after(key: str, tasks: BackgroundTasks) -> str:
        tasks.add_task(later, key)
        tasks.add_task(later_sync, key)
        return "answered"

    @app.get("/events/{key}")
    async def events(key: str) -> StreamingResponse:
        async def stream() -> AsyncIterator[str]:
            yield "event: hello\ndata: 1\n\n"
            await memory.wait(key, "second")
            yield "data: 2\n\n"
            await memory.wait(key, "last")
            yield ": bye\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.get("/sync")
    def sync() -> str:
        return "sync"

    app.mount("/", memory)
    return app


def uploads() -> ASGIApp:
    app = FastAPI()

    @app.post("/bytes")
    def as_bytes(file: Annotated[bytes, File()]) -> int:
        return len(file)

    @app.post("/files")
    async def as_files(
        files: list[UploadFile], words: Annotated[str, Form()] = "none"
    ) -> list[Any]:
        found = [[f.filename, f.content_type, len(await f.read())] for f in files]
        return [words, *found]

    return app


class UnicornError(Exception):
    def __init__(self, name: str) -> None:
        self.name = name


def handlers() -> ASGIApp:
    """Has its own error pages, a middleware and a lifespan."""

    @asynccontextmanager
    async def span(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        app.state.models = ["loaded"]
        yield {"from": "lifespan"}

    app = FastAPI(lifespan=span)

    @app.exception_handler(UnicornError)
    async def unicorn(request: Request, error: UnicornError) -> JSONResponse:
        return JSONResponse({"unicorn": error.name}, 418)

    @app.exception_handler(404)
    async def missing(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(f"no {request.url.path}", 404)

    @app.middleware("http")
    async def timing(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        await asyncio.sleep(0)
        response = await call_next(request)
        response.headers["x-middleware"] = request.method
        return response

    @app.get("/unicorn/{name}")
    async def raise_unicorn(name: str) -> None:
        raise UnicornError(name)

    @app.get("/fail")
    async def fail() -> None:
        raise LookupError("on purpose")

    @app.get("/models")
    async def models(request: Request) -> list[Any]:
        return [request.app.state.models, getattr(request.state, "from")]

    return app


def websocket_api() -> ASGIApp:
    app = FastAPI()

    async def token(websocket: WebSocket, token: str | None = None) -> str:
        if token is None:
            raise WebSocketException(4003, "no token")
        return token

    @app.websocket("/chat/{room}")
    async def chat(
        websocket: WebSocket, room: int, token: Annotated[str, Depends(token)]
    ) -> None:
        await websocket.accept()
        while True:
            message = await websocket.receive_json()
            if message == "stop":
                raise WebSocketException(4004, "stopped")
            await websocket.send_json([room, token, message])

    return app


# A class whose methods are routes, and the same as functions.


def plain_functions() -> ASGIApp:
    """Do what `ByClass` does, without a class."""
    app = FastAPI(title="By class")
    numbers = [1, 2, 3]

    @app.get("/numbers/{index}")
    def number(index: int, factor: int = 1) -> int:
        """Return a number."""
        return numbers[index] * factor

    @app.get("/all")
    async def everything(request: Request) -> list[Any]:
        return [numbers, str(request.url_for("everything"))]

    @app.post("/items")
    async def item(item: Item) -> Item:
        return item

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(numbers)
        await websocket.close(4000)

    return app


class_app = FastAPI(title="By class")


@serve.ingress(class_app)
class ByClass:
    def __init__(self) -> None:
        self.numbers = [1, 2, 3]

    @class_app.get("/numbers/{index}")
    def number(self, index: int, factor: int = 1) -> int:
        """Return a number."""
        return self.numbers[index] * factor

    @class_app.get("/all")
    async def everything(self, request: Request) -> list[Any]:
        return [self.numbers, str(request.url_for("everything"))]

    @class_app.post("/items")
    async def item(self, item: Item) -> Item:
        return item

    @class_app.websocket("/socket")
    async def socket(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(self.numbers)
        await websocket.close(4000)
