from __future__ import annotations

import asyncio
import functools
import json
import os
import pickle
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    Header,
    Query,
    Request,
    Response,
    WebSocket,
)
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from daskserve.exceptions import PicklingError
from daskserve.ingress import Ingress, find_ingress, ingress
from tests.utils import run_script

ROOT = Path(__file__).parents[1]

connection = sqlite3.connect(":memory:", check_same_thread=False)


@pytest.fixture(scope="module", autouse=True)
def close_connection():
    yield
    connection.close()


class Item(BaseModel):
    name: str
    price: float = 1.0


def call(app, method: str, url: str, **kwargs) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as c:
            return await c.request(method, url, **kwargs)

    return asyncio.run(request())


def get(app, url: str, **kwargs):
    response = call(app, "GET", url, **kwargs)
    assert response.status_code == 200, response.text
    return response.json()


def replica(cls, *args):
    found = find_ingress(cls)
    assert found is not None
    return found.build(cls(*args))


class Base:
    """What a replica's instance usually has: something of its own."""

    def __init__(self, value: object = 1) -> None:
        self.value = value


# -- the decorator --


def test_returns_the_class_itself_with_an_ingress():
    class A: ...

    assert ingress(FastAPI())(A) is A
    assert isinstance(find_ingress(A), Ingress)


def test_find_ingress():
    @ingress(FastAPI())
    class A: ...

    class Sub(A): ...

    class Plain: ...

    assert find_ingress(Sub) is find_ingress(A)
    assert find_ingress(Plain) is None
    assert find_ingress(A()) is None
    assert find_ingress(print) is None


@pytest.mark.parametrize("app", [None, 3, object(), {}, lambda environ, start: None])
def test_wrong_app_is_a_type_error(app):
    with pytest.raises(TypeError, match="FastAPI or Starlette app.*it was given"):
        ingress(app)


@pytest.mark.parametrize("text", ["", "module", "a/b:app", "a:b:c"])
def test_wrong_import_string_is_a_value_error(text):
    with pytest.raises(ValueError, match="module:attr"):
        ingress(text)


def test_not_a_class_is_a_type_error():
    with pytest.raises(TypeError, match="decorates classes"):
        ingress(FastAPI())(lambda request: None)


# -- kinds of apps --


def test_existing_app_as_it_is():
    app = FastAPI()

    @app.get("/")
    def f():
        return "root"

    @ingress(app)
    class Wrapper:
        pass

    assert get(replica(Wrapper), "/") == "root"


async def hello(request):
    return JSONResponse({"hello": request.path_params.get("name")})


async def raw_asgi(scope, receive, send):
    await JSONResponse({"path": scope["path"]})(scope, receive, send)


class RawASGI:
    async def __call__(self, scope, receive, send):
        await raw_asgi(scope, receive, send)


def test_starlette_app():
    @ingress(Starlette(routes=[Route("/{name}", hello)]))
    class A: ...

    app = replica(A)
    assert type(app) is Starlette
    assert get(app, "/you") == {"hello": "you"}


@pytest.mark.parametrize("app", [raw_asgi, RawASGI(), RawASGI().__call__])
def test_asgi_callable(app):
    @ingress(app)
    class A: ...

    assert get(replica(A), "/p") == {"path": "/p"}


def test_router_is_wrapped():
    router = APIRouter(prefix="/r")

    @ingress(router)
    class A(Base):
        @router.get("/x")
        def x(self):
            return self.value

    app = replica(A)
    assert isinstance(app, FastAPI)
    assert get(app, "/r/x") == 1


def make_app():
    app = FastAPI()
    app.state.unpicklable = connection
    app.add_api_route("/", lambda: "made")
    return app


def make_router():
    router = APIRouter()
    router.add_api_route("/", lambda: "made")
    return router


async def make_async():
    return FastAPI()


@pytest.mark.parametrize(
    "factory", [make_app, make_router, functools.partial(make_app)]
)
def test_factory(factory):
    @ingress(factory)
    class A: ...

    first, second = replica(A), replica(A)
    assert first is not second
    assert get(first, "/") == "made"


@pytest.mark.parametrize("factory", [lambda: 3, make_async])
def test_factory_of_something_else(factory):
    @ingress(factory)
    class A: ...

    with pytest.raises(TypeError, match="must give a FastAPI"):
        replica(A)


def test_factory_app_gets_class_routes_though_it_cannot_be_pickled():
    router = APIRouter()

    def make():
        app = FastAPI(title="Made")
        app.state.lock = threading.Condition()
        app.state.connection = connection
        app.include_router(router, prefix="/v1")
        return app

    @ingress(make)
    class A(Base):
        @router.get("/x")
        def x(self, request: Request):
            assert request.app.state.connection is connection
            return [self.value, request.app.title]

    class B:
        @router.get("/foreign")
        def y(self): ...

    first, second = replica(A, 1), replica(A, 2)
    assert get(first, "/v1/x") == [1, "Made"]
    assert get(second, "/v1/x") == [2, "Made"]
    paths = get(first, "/openapi.json")["paths"]
    assert "/v1/foreign" not in paths
    assert paths["/v1/x"]["get"].get("parameters") is None


def test_import_string(tmp_path, monkeypatch):
    (tmp_path / "app_by_name.py").write_text(
        "import sqlite3\n"
        "from fastapi import FastAPI\n"
        "class space:\n"
        "    app = FastAPI()\n"
        "    app.state.unpicklable = memoryview(b'')\n"
        "space.app.add_api_route('/', lambda: 'named')\n"
        "def make(): return space.app\n"
        "router = 5\n"
    )

    class A: ...

    ingress("app_by_name:space.app")(A)
    with pytest.raises(ImportError, match=r"'app_by_name:space.app'.*upload_file"):
        replica(A)
    monkeypatch.syspath_prepend(tmp_path)
    assert get(replica(A), "/") == "named"
    ingress("app_by_name:make")(A)
    assert get(replica(A), "/") == "named"
    ingress("app_by_name:router")(A)
    with pytest.raises(TypeError, match="'app_by_name:router' gave 5"):
        replica(A)
    ingress("app_by_name:missing")(A)
    with pytest.raises(ImportError, match="missing"):
        replica(A)


# -- freezing --


def test_what_an_app_gets_after_the_decorator_is_served():
    app = FastAPI(title="before")

    @ingress(app)
    class A: ...

    app.title = "after"
    app.add_api_route("/late", lambda: 1)
    router = APIRouter()
    router.add_api_route("/routed", lambda: 2)
    app.include_router(router, prefix="/r")
    served = replica(A)
    travelled = find_ingress(A).__reduce__()[1][0]
    app.add_api_route("/too-late", lambda: 3)
    for each in (served, travelled.build(A())):
        assert each.title == "after"
        assert get(each, "/late") == 1
        assert get(each, "/r/routed") == 2
    assert call(travelled.build(A()), "GET", "/too-late").status_code == 404


def test_the_users_app_is_left_alone():
    app = FastAPI()

    class Other:
        @app.get("/other")
        def m(self): ...

    @ingress(app)
    class A(Base):
        @app.get("/x")
        def x(self): ...

    routes = list(app.routes)
    endpoints = [getattr(route, "endpoint", None) for route in routes]
    get(replica(A), "/x")
    assert app.routes == routes
    assert [getattr(route, "endpoint", None) for route in routes] == endpoints


def test_every_build_has_an_app_of_its_own():
    app = FastAPI()

    @ingress(app)
    class A(Base):
        @app.get("/")
        def root(self, request: Request):
            request.app.state.count = getattr(request.app.state, "count", 0) + 1
            return [self.value, request.app.state.count]

    first, second = replica(A, "a"), replica(A, "b")
    assert get(first, "/") == ["a", 1]
    assert get(second, "/") == ["b", 1]
    assert get(first, "/") == ["a", 2]


def test_app_that_was_used_before():
    app = FastAPI()
    inner, outer = APIRouter(), APIRouter()

    @inner.get("/plain")
    def plain():
        return "plain"

    class A(Base):
        @inner.get("/own")
        def own(self, q: int = 0):
            return [self.value, q]

    class B(Base):
        @inner.get("/foreign")
        def foreign(self): ...

    outer.include_router(inner)
    app.include_router(outer)
    with TestClient(app) as client:
        assert client.get("/plain").json() == "plain"
        assert client.get("/openapi.json").status_code == 200

    served = replica(ingress(app)(A))
    assert get(served, "/own?q=2") == [1, 2]
    assert call(served, "GET", "/foreign").status_code == 404
    assert set(get(served, "/openapi.json")["paths"]) == {"/plain", "/own"}


def unpicklable_endpoint(app):
    app.add_api_route("/x", lambda: connection)


def unpicklable_closure(app):
    conn = connection
    app.add_api_route("/x", lambda: conn)


def unpicklable_state(app):
    app.state.db = connection


def unpicklable_middleware(app):
    app.add_middleware(CORSMiddleware, allow_origins=iter(connection.execute("")))


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (unpicklable_endpoint, r"routes\['/x'\].endpoint, global 'connection'"),
        (unpicklable_closure, r"routes\['/x'\].endpoint, closure variable 'conn'"),
        (unpicklable_state, r"FastAPI.state.db is a sqlite3.Connection"),
        (unpicklable_middleware, r"user_middleware\[0\].*sqlite3.Cursor"),
    ],
)
def test_app_that_cannot_travel(spoil, where):
    app = FastAPI()
    spoil(app)
    with pytest.raises(PicklingError, match=where) as info:

        @ingress(app)
        class A: ...

    assert "FastAPI app given to @serve.ingress for A" in str(info.value)
    assert "without arguments" in str(info.value)
    assert '"module:factory"' in str(info.value)
    assert info.value.__cause__ is not None


# -- class routes --


def test_all_verbs_with_paths_validation_and_models():
    app = FastAPI()

    @ingress(app)
    class A(Base):
        @app.get("/items/{number}")
        def read(self, number: int, q: str = "none", x_tag: str = Header("no")):
            return [self.value, number, q, x_tag]

        @app.post("/items/{number}", status_code=201)
        async def create(self, number: int, item: Item) -> Item:
            return Item(name=f"{item.name}{number}", price=item.price)

        @app.put("/items", response_model=Item, response_model_exclude={"price"})
        def put(self, item: Item, other: Item):
            return {"name": item.name + other.name, "secret": 1}

        @app.patch("/items")
        def patch(self):
            return "patch"

        @app.delete("/items")
        def delete(self):
            return "delete"

        @app.options("/items")
        def options(self):
            return "options"

        @app.head("/items")
        def head(self):
            return Response(headers={"x-value": str(self.value)})

        @app.trace("/items")
        def trace(self):
            return "trace"

        @app.api_route("/many", methods=["GET", "POST"], response_class=Response)
        def many(self, request: Request):
            return Response(request.method)

    served = replica(A)
    headers = {"x-tag": "t"}
    assert get(served, "/items/3?q=z", headers=headers) == [1, 3, "z", "t"]
    assert call(served, "GET", "/items/three").status_code == 422
    created = call(served, "POST", "/items/3", json={"name": "a"})
    assert (created.status_code, created.json()) == (201, {"name": "a3", "price": 1.0})
    both = {"item": {"name": "a"}, "other": {"name": "b"}}
    assert call(served, "PUT", "/items", json=both).json() == {"name": "ab"}
    for verb in ("PATCH", "DELETE", "OPTIONS", "TRACE"):
        assert call(served, verb, "/items").json() == verb.lower()
    assert call(served, "HEAD", "/items").headers["x-value"] == "1"
    assert call(served, "POST", "/many").text == "POST"
    assert call(served, "GET", "/items").status_code == 405


def test_self_is_not_in_the_schema_and_the_rest_is_as_without_class():
    app, plain = FastAPI(), FastAPI()

    def register(app, function):
        options = {"tags": ["t"], "summary": "s", "operation_id": f"{id(app)}"}
        app.post("/{a}", **options)(function)

    @ingress(app)
    class A:
        def f(self, a: int, b: Item, c: list[str] | None = None) -> list[Item]:
            """Describe."""

        register(app, f)

    def f(a: int, b: Item, c: list[str] | None = None) -> list[Item]:
        """Describe."""

    register(plain, f)
    assert "self" not in json.dumps(get(replica(A), "/openapi.json"))
    expected = json.dumps(plain.openapi()).replace(str(id(plain)), str(id(app)))
    assert get(replica(A), "/openapi.json") == json.loads(expected)


def test_several_methods_of_one_name():
    app = FastAPI()

    @ingress(app)
    class A(Base):
        @app.get("/")
        def root(self):
            return f"get {self.value}"

        @app.post("/{subpath}")
        def root(self, subpath: str):  # noqa: F811
            return f"{subpath} {self.value}"

    served = replica(A)
    assert get(served, "/") == "get 1"
    assert call(served, "POST", "/x").json() == "x 1"


def test_two_classes_on_one_app():
    app = FastAPI()

    @app.get("/")
    def f():
        return "Hello from the root!"

    @ingress(app)
    class First:
        @app.get("/subpath")
        def method(self):
            return "Hello 1!"

    @ingress(app)
    class Second:
        @app.get("/subpath")
        def method(self):
            return "Hello 2!"

        @app.get("/second")
        def second(self): ...

    for cls, text in [(First, "Hello 1!"), (Second, "Hello 2!")]:
        assert get(replica(cls), "/") == "Hello from the root!"
        assert get(replica(cls), "/subpath") == text
    assert call(replica(First), "GET", "/second").status_code == 404


def test_two_classes_decorated_after_both_were_defined():
    app = FastAPI()

    class First:
        @app.get("/x")
        def x(self):
            return 1

        @app.get("/{path}")
        @staticmethod
        def static(path):
            return path

    class Second:
        @app.get("/x")
        def x(self: Second):
            return 2

    ingress(app)(First)
    ingress(app)(Second)
    assert get(replica(First), "/x") == 1
    assert get(replica(Second), "/x") == 2
    assert get(replica(First), "/y") == "y"
    assert call(replica(Second), "GET", "/y").status_code == 404


def test_static_method_of_a_class_that_is_not_served_is_a_plain_route():
    app = FastAPI()

    class Namespace:
        @staticmethod
        @app.get("/{x}")
        def f(x):
            return x

    @ingress(app)
    class A: ...

    assert get(replica(A), "/1") == "1"


def test_bound_methods_and_other_callables_are_plain_routes():
    app = FastAPI()
    other = Counter()
    app.add_api_route("/bound", other.next)
    app.add_api_route("/callable", other)
    app.add_api_route("/partial", functools.partial(other.add, 2))

    @ingress(app)
    class A: ...

    served = replica(A)
    assert get(served, "/bound") == 0
    assert get(served, "/callable?by=5") == 6
    assert get(served, "/partial?by=5") == 7


class Counter:
    def __init__(self) -> None:
        self.number = -1

    def next(self):
        self.number += 1
        return self.number

    def add(self, one: int, by: int):
        return one + by

    def __call__(self, by: int):
        return self.next() + by


def test_order_of_routes():
    app = FastAPI()

    @app.get("/first/{x}")
    def plain_first(x):
        return "plain"

    @ingress(app)
    class A:
        @app.get("/first/{x}")
        def own_second(self, x):
            return "own"

        @app.get("/second/{x}")
        def own_first(self, x):
            return "own"

        app.add_api_route("/second/{x}", plain_first)

    assert get(replica(A), "/first/1") == "plain"
    assert get(replica(A), "/second/1") == "own"


def test_inherited_routes():
    app = FastAPI()

    class Common(Base):
        @app.get("/who")
        def who(self):
            return [type(self).__name__, self.value]

        @app.get("/twice")
        def twice(self):
            return "get"

        @app.post("/twice")
        def twice(self):  # noqa: F811
            return "post"

    @ingress(app)
    class One(Common):
        @app.get("/own")
        def own(self):
            return 1

    @ingress(app)
    class Two(Common):
        @app.get("/own")
        def own(self):
            return 2

    for cls, own in [(One, 1), (Two, 2)]:
        served = replica(cls, own)
        assert get(served, "/who") == [cls.__name__, own]
        assert get(served, "/own") == own
        assert get(served, "/twice") == "get"
        assert call(served, "POST", "/twice").json() == "post"


def test_overridden_routes():
    app = FastAPI()

    class Common:
        @app.get("/same")
        def same(self):
            return "base"

        @app.get("/moved")
        def moved(self):
            return "base"

    class Unrelated(Common):
        @app.get("/same")
        def same(self):
            return "unrelated"

    @ingress(app)
    class A(Common):
        @app.get("/same")
        def same(self):
            return f"A over {super().same()}"

        @app.get("/elsewhere")
        def moved(self):
            return "A"

    served = replica(A)
    assert get(served, "/same") == "A over base"
    assert get(served, "/moved") == "base"
    assert get(served, "/elsewhere") == "A"
    assert get(replica(ingress(app)(Unrelated)), "/same") == "unrelated"


def test_a_method_as_dependency_is_refused():
    app = FastAPI()

    class A:
        def database(self): ...

        @staticmethod
        def settings(size: int = 3):
            return size

        @app.get("/fine")
        def fine(self, size=Depends(settings)):
            return size

        def nested(db=Depends(database)): ...

    assert get(replica(ingress(app)(A)), "/fine?size=4") == 4
    app.add_api_route("/x", A.fine, dependencies=[Depends(A.nested)])
    with pytest.raises(TypeError, match=r"A.nested cannot be a dependency.*'self'"):
        ingress(app)(A)


def test_subclass_of_a_decorated_class():
    app = FastAPI()

    @ingress(app)
    class A(Base):
        @app.get("/")
        def root(self):
            return self.text()

        def text(self):
            return "A"

    class B(A):
        def text(self):
            return f"B{super().text()}"

    assert get(replica(B), "/") == "BA"


def test_a_class_that_is_defined_again():
    app = FastAPI()

    def cell(text):
        @ingress(app)
        class A:
            @app.get("/")
            def root(self):
                return text

            @app.post("/")
            def root(self):  # noqa: F811
                return text

        return A

    first, second = cell("first"), cell("second")
    for cls, text in [(first, "first"), (second, "second")]:
        assert get(replica(cls), "/") == text
        assert call(replica(cls), "POST", "/").json() == text
    del first
    assert get(replica(cell("third")), "/") == "third"


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return ["logged", function(*args, **kwargs)]

    return wrapper


def bare(function):
    def wrapper(self, x: int):
        return ["bare", function(self, x)]

    return wrapper


def test_decorated_methods():
    app = FastAPI()

    @ingress(app)
    class A(Base):
        @app.get("/inside/{x}")
        @logged
        def inside(self, x: int):
            return x + self.value

        @logged
        @app.get("/outside/{x}")
        def outside(self, x: int):
            return x + self.value

        @bare
        @app.get("/outside-bare/{x}")
        def outside_bare(self, x: int):
            return x + self.value

        @app.get("/inside-bare/{x}")
        @bare
        def inside_bare(self, x):
            return x + self.value

    served = replica(A)
    assert get(served, "/inside/1") == ["logged", 2]
    assert get(served, "/outside/1") == 2
    assert get(served, "/outside-bare/1") == 2
    assert get(served, "/inside-bare/1") == ["bare", 2]


def test_static_and_class_methods():
    app = FastAPI()

    @ingress(app)
    class A(Base):
        @staticmethod
        @app.get("/static/{x}")
        def outer_static(x: int):
            return x

        @app.get("/static-inside/{x}")
        @staticmethod
        def inner_static(x: int):
            return x

        @classmethod
        @app.get("/class/{x}")
        def outer_class(cls, x: int):
            return [cls.__name__, x]

        @staticmethod
        @app.get("/twice/{x}")
        def twice(x: int):
            return x

        @classmethod
        @app.post("/twice/{x}")
        def twice(cls, x: int):  # noqa: F811
            return cls.__name__

        def twice(self):  # noqa: F811
            ...

    served = replica(A)
    for path in ("/static/1", "/static-inside/1", "/twice/1"):
        assert get(served, path) == 1
    assert get(served, "/class/1") == ["A", 1]
    assert call(served, "POST", "/twice/1").json() == "A"


def test_alias_of_a_plain_endpoint_stays_plain():
    app = FastAPI()

    @ingress(app)
    class A:
        root = app.get("/")(make_one)

    assert get(replica(A), "/") == 1


def make_one():
    return 1


# -- included routers, mounts, websockets --


def test_included_routers_keep_prefix_dependencies_and_tags():
    app = FastAPI()
    inner = APIRouter(prefix="/inner", tags=["inner"])
    outer = APIRouter(prefix="/outer")

    def note(response: Response):
        response.headers["x-note"] = "noted"

    @ingress(app)
    class A(Base):
        @inner.get("/{x}", tags=["route"])
        def own(self, x: int):
            return [self.value, x]

        @inner.websocket("/ws")
        async def ws(self, websocket: WebSocket, q: int = 0):
            await websocket.accept()
            await websocket.send_json([self.value, q])

        outer.include_router(inner, prefix="/mid", dependencies=[Depends(note)])
        app.include_router(outer, prefix="/a", tags=["app"])
        app.include_router(outer, prefix="/b")

    @ingress(app)
    class B: ...

    served = replica(A)
    response = call(served, "GET", "/a/outer/mid/inner/3")
    assert response.json() == [1, 3]
    assert response.headers["x-note"] == "noted"
    assert get(served, "/b/outer/mid/inner/3") == [1, 3]
    operation = get(served, "/openapi.json")["paths"]["/a/outer/mid/inner/{x}"]["get"]
    assert operation["tags"] == ["app", "inner", "route"]
    assert [p["name"] for p in operation["parameters"]] == ["x"]
    with TestClient(served).websocket_connect("/a/outer/mid/inner/ws?q=4") as ws:
        assert ws.receive_json() == [1, 4]
    assert call(replica(B), "GET", "/a/outer/mid/inner/3").status_code == 404


def test_mounted_apps_are_left_alone(tmp_path):
    (tmp_path / "file.txt").write_text("static")
    from starlette.staticfiles import StaticFiles

    sub = FastAPI()
    sub.add_api_route("/x", lambda: "sub")
    app = FastAPI()
    app.mount("/sub", sub)
    app.mount("/files", StaticFiles(directory=tmp_path))
    app.router.routes.append(Mount("/raw", app=raw_asgi))

    @ingress(app)
    class A(Base):
        @app.get("/x")
        def x(self):
            return self.value

    served = replica(A)
    assert get(served, "/x") == 1
    assert get(served, "/sub/x") == "sub"
    assert call(served, "GET", "/files/file.txt").text == "static"
    assert get(served, "/raw/y")["path"].endswith("/y")


def test_websockets_with_dependencies_and_overrides():
    app = FastAPI()

    def who():
        return "original"

    def overridden():
        return "overridden"

    app.dependency_overrides[who] = overridden

    @ingress(app)
    class A(Base):
        @app.websocket("/ws/{x}")
        async def ws(self, websocket: WebSocket, x: int, w: str = Depends(who)):
            await websocket.accept()
            await websocket.send_json([self.value, x, w])

    @app.websocket("/late")
    async def late(websocket: WebSocket): ...

    with TestClient(replica(A)).websocket_connect("/ws/3") as ws:
        assert ws.receive_json() == [1, 3, "overridden"]


def test_methods_as_starlette_routes():
    class A(Base):
        async def x(self, request):
            return JSONResponse([self.value, request.path_params["n"]])

        async def ws(self, websocket):
            await websocket.accept()
            await websocket.send_json(self.value)

    app = FastAPI()
    app.router.add_route("/x/{n}", A.x, methods=["POST"])
    app.router.add_websocket_route("/ws", A.ws)
    served = replica(ingress(app)(A))
    assert call(served, "POST", "/x/2").json() == [1, "2"]
    assert call(served, "GET", "/x/2").status_code == 405
    with TestClient(served).websocket_connect("/ws") as ws:
        assert ws.receive_json() == 1


# -- what FastAPI can do --


def test_class_as_dependency():
    app = FastAPI()

    class Page:
        def __init__(self, size: int = 10) -> None:
            self.size = size

    @ingress(app)
    class A:
        @app.get("/page")
        def page(self, page=Depends(Page)):
            return page.size

    assert get(replica(A), "/page?size=3") == 3


def sync_resource(request: Request) -> Iterator[str]:
    yield "sync"
    request.app.state.events.append("sync closed")


async def async_resource(
    request: Request, s: Annotated[str, Depends(sync_resource)]
) -> AsyncIterator[str]:
    yield f"{s} async"
    request.app.state.events.append("async closed")


def guard(x_key: Annotated[str, Header()]) -> None:
    assert x_key == "k"


def make_full_app():
    @asynccontextmanager
    async def lifespan(app):
        app.state.events = ["started"]
        yield
        app.state.events.append("stopped")

    app = FastAPI(lifespan=lifespan)
    app.root_path = "/root"
    app.root_path_in_servers = False
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.state.given = {"a": 1}

    @app.middleware("http")
    async def tag(request, call_next):
        response = await call_next(request)
        response.headers["x-tag"] = "tagged"
        return response

    @app.exception_handler(ZeroDivisionError)
    async def handle(request, exc):
        return PlainTextResponse(f"handled {exc}", status_code=418)

    def openapi():
        return {"custom": True}

    app.openapi = openapi
    return app


def test_full_app():
    app = make_full_app()

    @ingress(app)
    class A(Base):
        @app.get("/resource", dependencies=[Depends(guard)])
        async def resource(self, resource: Annotated[str, Depends(async_resource)]):
            return [self.value, resource]

        @app.get("/thread")
        def thread(self):
            return threading.get_ident()

        @app.get("/fails")
        def fails(self):
            return 1 / 0

        @app.post("/later")
        def later(self, tasks: BackgroundTasks, request: Request):
            tasks.add_task(request.app.state.events.append, "in background")
            return [request.app.state.given, request.scope["root_path"]]

    served = replica(A)
    with TestClient(served) as client:
        response = client.get(
            "/resource", headers={"x-key": "k", "origin": "http://elsewhere"}
        )
        assert response.json() == [1, "sync async"]
        assert response.headers["x-tag"] == "tagged"
        assert response.headers["access-control-allow-origin"] == "*"
        assert client.get("/resource").status_code == 422
        assert client.get("/thread").json() != threading.get_ident()
        assert client.get("/fails").text == "handled division by zero"
        assert client.get("/fails").status_code == 418
        assert client.post("/later").json() == [{"a": 1}, "/root"]
        assert client.get("/openapi.json").json() == {"custom": True}
    events = served.state.events
    assert (events[0], events[-1]) == ("started", "stopped")
    assert set(events[1:-1]) == {"async closed", "in background", "sync closed"}
    assert not hasattr(app.state, "events")


def test_dependency_overrides():
    app = FastAPI()

    def settings():
        return "real"

    @ingress(app)
    class NotOverridden:
        @app.get("/a")
        def a(self, s=Depends(settings)):
            return s

    not_overridden = replica(NotOverridden)
    app.dependency_overrides[settings] = lambda: "fake"

    @ingress(app)
    class Overridden:
        @app.get("/a")
        def a(self, s=Depends(settings)):
            return s

    assert get(not_overridden, "/a") == "real"
    assert get(replica(Overridden), "/a") == "fake"


class Shout(JSONResponse):
    def render(self, content):
        return super().render(str(content).upper())


class TimedRoute(APIRoute):
    def get_route_handler(self):
        handler = super().get_route_handler()

        async def timed(request: Request):
            response = await handler(request)
            response.headers["x-timed"] = self.path
            return response

        return timed


def test_response_and_route_classes():
    app = FastAPI(default_response_class=Shout)
    router = APIRouter(route_class=TimedRoute)

    @ingress(app)
    class A(Base):
        @router.get("/own")
        def own(self):
            return f"own {self.value}"

        @app.get("/text", response_class=PlainTextResponse)
        def text(self):
            return "text"

        app.include_router(router)

    response = call(replica(A), "GET", "/own")
    assert response.json() == "OWN 1"
    assert response.headers["x-timed"] == "/own"
    assert call(replica(A), "GET", "/text").text == "text"


def test_cached_schema_is_made_anew():
    app = FastAPI()

    class A:
        @app.get("/x")
        def x(self): ...

    assert "self" in json.dumps(app.openapi())
    assert "self" not in json.dumps(get(replica(ingress(app)(A)), "/openapi.json"))


def test_options_that_were_not_given_stay_so():
    app = FastAPI()

    @app.get("/plain/{n}")
    def plain(n: int, q: str = Query()): ...

    class A:
        @app.get("/own/{n}")
        def own(self, n: int, q: str = Query()): ...

    schema = get(replica(ingress(app)(A)), "/openapi.json")
    for path in ("/plain/{n}", "/own/{n}"):
        for parameter in schema["paths"][path]["get"]["parameters"]:
            assert "example" not in parameter


def test_routes_can_be_reversed():
    app = FastAPI()

    @ingress(app)
    class A:
        @app.get("/items/{x}", name="item")
        def item(self, x: int, request: Request):
            return str(request.url_for("item", x=x + 1))

    assert get(replica(A), "/items/1") == "http://t/items/2"


# -- in another process --

DRIVE = """
import asyncio, json, sys
import httpx
from daskserve.ingress import find_ingress
from daskserve.pickling import loads

def call(app, method, url, **kwargs):
    async def request():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as c:
            response = await c.request(method, url, **kwargs)
            return response.json() if response.status_code == 200 else (
                response.status_code, response.text)
    return asyncio.run(request())

def load():
    return [loads(bytes.fromhex(line)) for line in open(sys.argv[1])]
"""
FUTURE = "from __future__ import annotations"
SEND = """
def send(*classes):
    import sys
    from daskserve.pickling import dumps
    with open(sys.argv[1], "w") as file:
        for cls in classes:
            print(dumps(cls, what="class").hex(), file=file)
"""


def run(directory: Path, name: str, source: str) -> None:
    (directory / name).write_text(textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, name, "classes"],
        cwd=directory,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_main_script_to_another_process(tmp_path):
    # Written in the order in which scripts are: what methods use may come later.
    script = """
from contextlib import asynccontextmanager
from typing import Annotated
from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel
from daskserve.ingress import ingress

@asynccontextmanager
async def lifespan(app):
    app.state.model = "model"
    yield

app = FastAPI(lifespan=lifespan)
router = APIRouter()

class Item(BaseModel):
    name: str

def settings(request: Request):
    return "real"

app.dependency_overrides[settings] = lambda: "fake"

@router.get("/plain")
def plain(request: Request, item: Annotated[str, Depends(settings)]) -> list[str]:
    return [item, str(app is request.app)]

app.include_router(router)

class Parent:
    def __init__(self, value=1):
        self.value = value

@ingress(app)
class A(Parent):
    def __init__(self, value):
        super().__init__(value)

    @app.get("/")
    def root(self, request: Request, s: Annotated[str, Depends(settings)]):
        same = [request.app is app, type(self) is __class__, A == "rebound"]
        return [self.value, s, helper(), *same]

    @app.post("/{sub}")
    def root(self, sub: str, items: list[Item]) -> list[Item]:
        return [Item(name=item.name + sub) for item in items]

@ingress(app)
class B(Parent):
    @app.get("/")
    def root(self):
        return "B"

def helper():
    return app.title

both = A, B
A = "rebound"
send(*both)
"""
    run(tmp_path, "script.py", FUTURE + SEND + script)
    replica = """
A, B = load()
first, second = find_ingress(A).build(A(1)), find_ingress(A).build(A(2))
assert call(first, "GET", "/plain")[0] == "fake"
assert call(first, "GET", "/")[:3] == [1, "fake", "FastAPI"], call(first, "GET", "/")
assert call(second, "GET", "/") == [2, "fake", "FastAPI", True, True, True]
assert call(second, "GET", "/plain") == ["fake", "True"]
assert call(second, "POST", "/x", json=[{"name": "n"}]) == [{"name": "nx"}]
assert call(second, "POST", "/x", json=[{"nam": "n"}])[0] == 422
schema = call(second, "GET", "/openapi.json")
assert set(schema["paths"]) == {"/plain", "/", "/{sub}"}
assert "self" not in json.dumps(schema)
b = find_ingress(B).build(B())
assert call(b, "GET", "/") == "B"
assert call(b, "POST", "/x")[0] in (404, 405)
"""
    run(tmp_path, "replica.py", DRIVE + replica)


def test_module_classes_to_another_process(tmp_path):
    module = """
from __future__ import annotations
from fastapi import FastAPI, Request
from daskserve.ingress import ingress

app = FastAPI()

class Wrapped:
    def __init__(self, cls):
        self.cls = cls

@app.get("/plain")
def plain(request: Request):
    return helper()

class Common:
    @app.get("/common")
    def common(self, request: Request):
        return [type(self).__name__, helper()]

@ingress(app)
class ByReference(Common):
    @app.get("/")
    def root(self, request: Request):
        return helper()

@Wrapped
@ingress(app)
class ByValue(Common):
    @app.get("/")
    def root(self, request: Request):
        return [helper(), type(ByValue).__name__]

    @app.post("/")
    def root(self):
        return "post"

def helper():
    return "helper"
"""
    (tmp_path / "module.py").write_text(module)
    script = """
import module
assert "Wrapped" in repr(module.ByValue)
send(module.ByReference, module.ByValue.cls)
"""
    run(tmp_path, "script.py", SEND + script)
    replica = """
reference, value = load()
assert reference is sys.modules["module"].ByReference
app = find_ingress(reference).build(reference())
assert call(app, "GET", "/") == "helper"
assert call(app, "GET", "/plain") == "helper"
assert call(app, "GET", "/common") == ["ByReference", "helper"]
assert call(app, "POST", "/")[0] == 405
app = find_ingress(value).build(value())
assert call(app, "GET", "/") == ["helper", "Wrapped"]
assert call(app, "POST", "/") == "post"
assert call(app, "GET", "/plain") == "helper"
assert call(app, "GET", "/common") == ["ByValue", "helper"]
"""
    run(tmp_path, "replica.py", DRIVE + replica)


def test_factory_and_import_string_to_another_process(tmp_path):
    (tmp_path / "module.py").write_text(
        "from fastapi import FastAPI\n"
        "app = FastAPI()\n"
        "app.add_api_route('/', lambda: 'module')\n"
    )
    script = """
import threading
from fastapi import APIRouter, FastAPI
from daskserve.ingress import ingress

router = APIRouter()

def make():
    app = FastAPI()
    app.state.thread = threading.current_thread()
    app.include_router(router)
    return app

@ingress(make)
class Made:
    @router.get("/")
    def root(self):
        return "made"

@ingress("module:app")
class Named:
    pass

send(Made, Named)
"""
    run(tmp_path, "script.py", SEND + script)
    replica = """
Made, Named = load()
assert "module" not in sys.modules
assert call(find_ingress(Made).build(Made()), "GET", "/") == "made"
assert call(find_ingress(Named).build(Named()), "GET", "/") == "module"
"""
    run(tmp_path, "replica.py", DRIVE + replica)


def test_ingress_travels_with_plain_pickle_when_the_class_does():
    app = FastAPI()
    app.add_api_route("/", make_one)
    ingress(app)(Importable)
    found = pickle.loads(pickle.dumps(find_ingress(Importable)))
    assert get(found.build(Importable()), "/") == 1
    assert len(pickle.dumps(found)) < 100_000


class Importable: ...


# -- methods that would get no self --


def override_without_a_route(app):
    class A:
        @app.get("/a")
        def hello(self): ...

    class B(A):
        def hello(self): ...

    return B, r"B.hello overrides .*A.hello, the endpoint of '/a', and is no endpoint"


def no_self(app):
    class A:
        @app.get("/a")
        def hello(): ...

    return A, r"A.hello, the endpoint of '/a', takes no 'self'"


def parameter_in_place_of_self(app):
    class A:
        @app.get("/items/{item_id}")
        def item(item_id): ...

    return A, r"A.item, the endpoint of '/items/{item_id}', takes no 'self'"


def annotated_in_place_of_self(app):
    class A:
        @app.get("/a")
        def item(number: int): ...

    return A, r"A.item, the endpoint of '/a', takes no 'self'"


def as_middleware(app):
    class A:
        @app.middleware("http")
        async def time(self, request, call_next): ...

    return A, r"A.time cannot be a middleware: .*without 'self'"


def as_exception_handler(app):
    class A:
        @app.exception_handler(ValueError)
        async def handle(self, request, err): ...

    return A, r"A.handle cannot be an exception handler"


def as_startup_hook(app):
    if not hasattr(app.router, "on_startup"):
        pytest.skip("this version of Starlette has no such hooks")

    class A:
        def begin(self): ...

        app.router.on_startup.append(begin)

    return A, r"A.begin cannot be a startup hook"


@pytest.mark.parametrize(
    "make",
    [
        override_without_a_route,
        no_self,
        parameter_in_place_of_self,
        annotated_in_place_of_self,
        as_middleware,
        as_exception_handler,
        as_startup_hook,
    ],
)
def test_methods_that_would_get_no_self_are_refused(make):
    app = FastAPI()
    cls, text = make(app)
    with pytest.raises(TypeError, match=text):
        ingress(app)(cls)


def test_methods_that_need_no_self_are_not():
    app = FastAPI()

    class A(Base):
        @app.get("/a")
        def hello(self):
            return "A"

        @app.exception_handler(ValueError)
        @staticmethod
        async def handle(request, err):
            return JSONResponse("handled")

    class B(A):
        def other(self): ...

        @app.get("/a")
        def hello(self):
            return f"B, not {super().hello()}"

    @ingress(app)
    class C(B): ...

    assert get(replica(C), "/a") == "B, not A"


CONSTRUCTORS = """
import json
import httpx
from dask.distributed import Client, LocalCluster
from fastapi import APIRouter, Depends, FastAPI, Request
import daskserve as serve

app = FastAPI()
late = APIRouter()

def database():
    return "default"

@late.get("/late")
def routed():
    return "late"

class Mark:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def mark(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-mark", b"seen")]
            await send(message)
        await self.app(scope, receive, mark)

@serve.deployment(user_config={"limit": 1}, version="1", num_replicas=2)
@serve.ingress(app)
class Model:
    def __init__(self, name):
        app.state.name = name
        app.dependency_overrides[database] = lambda: f"of {name}"
        app.add_middleware(Mark)
        part = FastAPI()
        part.get("/hi")(lambda: "hi from the part")
        app.mount("/part", part)
        app.add_api_route("/added", lambda: "added")
        more = APIRouter()
        more.get("/more")(lambda: "more")
        app.include_router(more, prefix="/p")

    def reconfigure(self, config):
        app.state.limit = config["limit"]

    @app.get("/")
    def ask(self, request: Request, found: str = Depends(database)):
        states = request.app.state, app.state
        return [[state.name, state.limit] for state in states] + [found]

app.include_router(late)

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1) as cluster, Client(cluster):
        serve.start(http_options={"port": 0})
        Model.deploy("a")
        url = Model.url
        paths = ["/part/hi", "/added", "/p/more", "/late"]
        found = [httpx.get(url + path).json() for path in paths]
        answers = [httpx.get(url + "/") for _ in range(9)]
        Model.options(user_config={"limit": 2}).deploy("a")
        answers += [httpx.get(url + "/") for _ in range(9)]
        said = sorted({answer.text for answer in answers})
        marks = {answer.headers.get("x-mark") for answer in answers}
        print(json.dumps([found, said, sorted(marks)]))
"""


@pytest.mark.slow
def test_what_a_constructor_does_to_its_app_takes_effect():
    lines = run_script(CONSTRUCTORS).stdout.splitlines()
    found, said, marks = json.loads(next(line for line in lines if line[:2] == "[["))
    assert found == ["hi from the part", "added", "more", "late"]
    expected = [[["a", limit], ["a", limit], "of a"] for limit in (1, 2)]
    assert [json.loads(each) for each in said] == expected
    assert marks == ["seen"]


TWO_IN_ONE = """
import json
import httpx
from dask.distributed import Client, LocalCluster
from fastapi import FastAPI, Request
import daskserve as serve

app = FastAPI()

@serve.deployment(num_replicas=2)
@serve.ingress(app)
class Model:
    def __init__(self):
        self.tag = serve.get_replica_context().replica_tag
        app.state.tag = self.tag

    def tag_of_app(self):
        return app.state.tag

    @app.get("/")
    def ask(self, request: Request):
        tags = [app.state.tag, self.tag_of_app(), request.app.state.tag]
        return [self.tag, [tag == self.tag for tag in tags]]

if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=2) as cluster, Client(cluster):
        serve.start(http_options={"port": 0})
        Model.deploy()
        print(json.dumps([httpx.get(Model.url + "/").json() for _ in range(20)]))
"""


@pytest.mark.slow
def test_replicas_of_one_process_have_apps_and_classes_of_their_own():
    lines = run_script(TWO_IN_ONE).stdout.splitlines()
    answers = json.loads(next(line for line in lines if line[:2] == "[["))
    assert len({tag for tag, _ in answers}) == 2
    assert all(same == [True] * 3 for _, same in answers), answers
