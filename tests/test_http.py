"""What a client of a proxy gets, row by row; real processes and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import http.client
import itertools
import json
import os
import re
import socket
import ssl
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fastapi
import httpx
import numpy as np
import pandas as pd
import pydantic
import pytest
from distributed import Security
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route

import daskserve as serve
from daskserve.exceptions import DeploymentFailedError
from tests.utils import ProcessCluster, poll, scheduler_workers

_numbers = itertools.count(1)


@dataclasses.dataclass
class Site:
    """A cluster with an instance, and what was deployed on it."""

    cluster: ProcessCluster
    client: Any
    instance: serve.ServeInstance
    deployed: list[serve.Deployment] = dataclasses.field(default_factory=list)

    @property
    def url(self) -> str:
        return self.instance.http_urls[0]

    @property
    def near(self) -> str:
        """The address of the worker whose proxy `url` is."""
        proxies = self.instance.status().proxies
        return next(proxy.worker for proxy in proxies if proxy.url == self.url)

    @property
    def far(self) -> str:
        """The address of another worker."""
        return sorted(set(scheduler_workers(self.client)) - {self.near})[0]

    def place(self, where: str) -> dict[str, Any]:
        """Return the option that puts replicas ``"near"`` or ``"far"``."""
        return {"workers": [getattr(self, where)]}

    def deploy(
        self, target: Any, *args: Any, where: str | None = None, **options: Any
    ) -> serve.Deployment:
        """Deploy under a name of its own."""
        deployment = self.make(target, where=where, **options)
        deployment.deploy(*args)
        return deployment

    def make(
        self, target: Any, where: str | None = None, **options: Any
    ) -> serve.Deployment:
        """Make a deployment that `clean` deletes."""
        options.setdefault("name", f"{target.__name__}{next(_numbers)}")
        options.setdefault("graceful_shutdown_timeout_s", 0.2)
        options.setdefault("graceful_shutdown_wait_loop_s", 0.05)
        options.setdefault("deploy_timeout_s", 30)
        if where is not None:
            options.update(self.place(where))
        deployment = serve.deployment(**options)(target)
        self.deployed.append(deployment)
        return deployment

    def at(self, deployment: serve.Deployment, path: str = "") -> str:
        """Return the URL of a path in a deployment."""
        prefix = deployment.route_prefix or f"/{deployment.name}"
        return self.url + prefix + path

    def clean(self, keep: int = 0) -> None:
        """Delete what was deployed, but for the first `keep`."""
        while len(self.deployed) > keep:
            try:
                self.deployed.pop().delete()
            except KeyError:
                pass


@contextmanager
def open_site(
    n_workers: int = 2, *, cluster: ProcessCluster | None = None, **http: Any
) -> Iterator[Site]:
    """Start an instance, on a cluster of its own if none is given."""
    http.setdefault("location", LOCATION)
    with (
        ProcessCluster(n_workers, nanny=False, protocol=PROTOCOL, env=LOGGED)
        if cluster is None
        else _nothing(cluster) as cluster
    ):
        with cluster.client() as client:
            instance = serve.start(http_options={"port": 0, **http})
            site = Site(cluster, client, instance)
            try:
                yield site
            finally:
                instance.shutdown()


@contextmanager
def _nothing(cluster: ProcessCluster) -> Iterator[ProcessCluster]:
    yield cluster


#: Where the proxies are, and how the cluster speaks: every test that opens a site can
#: be run with the others as well, for example with DASKSERVE_SITE=EveryNode,tls
LOCATION, PROTOCOL = os.environ.get("DASKSERVE_SITE", "HeadOnly,tcp").split(",")
#: Makes `ProcessCluster.logs` show what daskserve logs.
LOGGED = {"DASK_LOGGING__DASKSERVE": "info"}


@pytest.fixture(scope="module")
def _site() -> Iterator[Site]:
    with open_site() as site:
        yield site


@pytest.fixture
def site(_site: Site) -> Iterator[Site]:
    keep = len(_site.deployed)
    yield _site
    _site.clean(keep)


@pytest.fixture(scope="module")
def spare() -> Iterator[ProcessCluster]:
    """Give a cluster for instances with other options."""
    with ProcessCluster(2, nanny=False, protocol=PROTOCOL, env=LOGGED) as cluster:
        yield cluster


@pytest.fixture
def start(spare: ProcessCluster) -> Iterator[Callable[..., Site]]:
    """Give a function that starts an instance with other options."""
    stack = []

    def start(**http: Any) -> Site:
        stack.append(open_site(cluster=spare, **http))
        return stack[-1].__enter__()

    yield start
    for context in stack:
        context.__exit__(None, None, None)


near_and_far = pytest.mark.parametrize("where", ["near", "far"])


class Notes:
    """Lines in a file that code in other processes writes; travels by value."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def add(self, text: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{text}\n")

    def read(self) -> list[str]:
        try:
            return Path(self.path).read_text().splitlines()
        except FileNotFoundError:
            return []

    def wait(self, text: str, timeout: float = 10) -> None:
        poll(lambda: text in self.read(), timeout)


class Gate:
    """Opened here, waited for in other processes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def open(self) -> None:
        Path(self.path).touch()

    def is_open(self) -> bool:
        return os.path.exists(self.path)

    async def wait(self) -> None:
        while not self.is_open():
            await asyncio.sleep(0.01)

    def wait_sync(self) -> None:
        while not self.is_open():
            time.sleep(0.01)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # nothing is to hang on after the test


def connect(url: str, timeout: float = 10) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=timeout)


def send_request(
    url: str, method: str = "GET", headers: str = "", body: bytes = b""
) -> socket.socket:
    """Send a request on a connection of its own; return the connection."""
    sock = connect(url)
    target = urlsplit(url)._replace(scheme="", netloc="").geturl()
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"
    sock.sendall(head.encode() + body)
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Read until the other side closes."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_head(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        assert part, f"closed after {data!r}"
        data += part
    return data


def log_lines(site: Site, *parts: str, timeout: float = 10) -> list[str]:
    """Wait for lines of the log that contain all `parts`."""

    def find() -> list[str]:
        lines = site.cluster.logs().splitlines()
        return [line for line in lines if all(part in line for part in parts)]

    return poll(find, timeout)


# Match.


def test_match(site: Site) -> None:
    def inner() -> str:
        return "inner"

    def outer() -> str:
        return "outer"

    def rest() -> str:
        return "rest"

    site.deploy(outer, route_prefix="/match")
    site.deploy(inner, route_prefix="/match/a/b")
    with httpx.Client(base_url=site.url) as client:

        def get(path: str) -> str:
            response = client.get(path)
            return response.text if response.status_code == 200 else "404"

        assert get("/match") == get("/match/") == get("/match/x/y") == "outer"
        assert get("/matchx") == get("/Match") == get("/") == get("/x/match") == "404"
        assert get("/match/a") == get("/match/a/bc") == get("/match/a/") == "outer"
        assert get("/match/a/b") == get("/match/a/b/") == get("/match/a/b/c") == "inner"
        assert get("/match?/a/b") == "outer"
        site.deploy(rest, route_prefix="/")
        assert get("/") == get("/matchx") == get("/x/match") == get("//") == "rest"
        assert get("/match/x") == "outer"
        assert get("/match/a/b/c") == "inner"
        assert client.get("/-/routes").json()["/"] == "rest" + str(
            site.deployed[-1].name[4:]
        )
        assert get("/-/healthz") == "success"


@pytest.mark.parametrize("prefix", ["x", "", "/x/", "/{x}", "/x/{y}", "//", 5])
def test_prefix_that_is_not_allowed(prefix: Any) -> None:
    with pytest.raises(ValueError, match="prefix|string"):

        @serve.deployment(route_prefix=prefix)
        def f() -> None: ...


def test_prefix_that_is_taken(site: Site) -> None:
    def first() -> str:
        return "first"

    def second() -> str:
        return "second"

    holder = site.deploy(first, route_prefix="/taken")
    late = site.make(second, route_prefix="/taken")
    with pytest.raises(ValueError, match=holder.name):
        late.deploy()
    assert httpx.get(site.url + "/taken").text == "first"
    assert late.name not in serve.list_deployments()
    holder.delete()
    late.deploy()
    assert httpx.get(site.url + "/taken").text == "second"


# The proxy's own paths.


def test_routes_are_exact_at_once(site: Site) -> None:
    def f() -> str:
        return "f"

    def routes() -> dict[str, str]:
        response = httpx.get(site.url + "/-/routes")
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        found: dict[str, str] = response.json()
        return found

    assert routes() == {}
    hidden = site.deploy(f, route_prefix=None)
    for _ in range(10):
        deployment = site.deploy(f)
        assert routes() == {f"/{deployment.name}": deployment.name}
        assert httpx.get(site.at(deployment)).text == "f"
        deployment.delete()
        assert routes() == {}
        assert httpx.get(site.at(deployment)).status_code == 404
    hidden.delete()


def test_own_paths(site: Site) -> None:
    with httpx.Client(base_url=site.url) as client:
        response = client.get("/-/healthz")
        assert (response.status_code, response.text) == (200, "success")
        assert client.head("/-/healthz").status_code == 200
        assert client.post("/-/routes").status_code == 405
        assert client.get("/-/nothing").status_code == 404


@pytest.mark.parametrize("token", [None, "open-sesame"])
def test_ready(start: Callable[..., Site], token: str | None) -> None:
    site = start(token=token)

    class Slow:
        def __init__(self, path: str) -> None:
            while not Path(path).exists():
                time.sleep(0.02)
            raise OSError("no weights")

    with httpx.Client(base_url=site.url) as client:
        deployment = site.deploy(lambda: "f", name="Quick")
        assert client.get("/-/ready/Quick").text == "success"
        assert client.head("/-/ready/Quick").status_code == 200
        assert client.post("/-/ready/Quick").status_code == 405
        for name in ("quick", "", "Quick/x", "%00"):
            assert client.get(f"/-/ready/{name}").status_code == 404

        go = Path(site.cluster.directory) / "go"
        slow = serve.deployment(
            Slow, name="Slow", autoscaling_config={"min_replicas": 1}
        )
        with ThreadPoolExecutor() as pool:
            deploying = pool.submit(slow.deploy, str(go))
            try:
                poll(lambda: client.get("/-/ready/Slow").status_code == 503)
                poll(lambda: "constructor" in str(serve.status()))
                # The status knows before the servers do.
                if token is None:
                    poll(lambda: "constructor" in client.get("/-/ready/Slow").text)
                response = client.get("/-/ready/Slow")
                assert response.status_code == 503
                assert response.headers["retry-after"] == "1"
                assert ("constructor" in response.text) == (token is None)
            finally:
                go.touch()
            assert isinstance(deploying.exception(20), DeploymentFailedError)
        response = client.get("/-/ready/Slow")
        assert response.status_code == 503
        assert ("no weights" in response.text) == (token is None)
        go.unlink()
        slow.delete()
        deployment.delete()
        poll(lambda: client.get("/-/ready/Quick").status_code == 404)
    for prefix in ("/-/ready", "/-/ready/", "/-/ready/Quick"):
        with pytest.raises(ValueError, match="answered by the server itself"):
            serve.deployment(Slow, route_prefix=prefix)


def answering_below_own_paths() -> FastAPI:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def answer(request: Request, path: str) -> str:
        return f"app {path}"

    return app


@pytest.mark.parametrize(
    "middlewares", [[], [Middleware(CORSMiddleware, allow_origins=["*"])]]
)
def test_what_is_not_ours_below_own_paths_is_the_apps(
    start: Callable[..., Site], middlewares: list[Middleware]
) -> None:
    """The quick way and, with middlewares, the ordinary one."""
    site = start(middlewares=middlewares)

    @serve.ingress(answering_below_own_paths)
    class App: ...

    site.deploy(App, route_prefix="/")
    with httpx.Client(base_url=site.url) as client:
        assert client.get("/-/static/app.css").json() == "app -/static/app.css"
        assert client.post("/-/mine").json() == "app -/mine"
        assert client.get("/-/healthz/x").json() == "app -/healthz/x"
        assert client.get("/-/healthz").text == "success"
        assert client.post("/-/healthz").status_code == 405
        assert list(client.get("/-/routes").json()) == ["/"]
        below = site.deploy(App, route_prefix="/-/below")
        assert client.get("/-/below/x").json() == "app x"
        assert "/-/below" in client.get("/-/routes").json()
        below.delete()
        assert client.get("/-/below/x").json() == "app -/below/x"


def test_no_route(site: Site) -> None:
    response = httpx.get(site.url + "/nowhere/x?secret=1")
    assert response.status_code == 404
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text == (
        f"Path '/nowhere/x' not found. Please ping {site.url}/-/routes for route table."
    )


# Scope.


async def echo_scope(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what an ASGI app sees."""
    if scope["type"] != "http":
        return
    plain = {k: v for k, v in scope.items() if k in SCOPE_FIELDS}
    plain["headers"] = [(k.decode(), v.decode()) for k, v in scope["headers"]]
    plain["raw_path"] = scope["raw_path"].decode()
    plain["query_string"] = scope["query_string"].decode()
    response = JSONResponse(plain)
    await response(scope, receive, send)


SCOPE_FIELDS = (
    "type asgi http_version method scheme path raw_path query_string root_path "
    "headers client server"
).split()


@near_and_far
def test_scope(site: Site, where: str) -> None:
    @serve.ingress(echo_scope)
    class Echo: ...

    deployment = site.deploy(Echo, where=where, route_prefix="/echo/it")
    headers = {"X-Thing": "a", "x-request-id": "id-1"}
    url = site.at(deployment, "/s%C3%BC%2Fx/?q=a%20b&q=c")
    with httpx.Client(headers=headers) as client:
        scope = client.request("PATCH", url).json()
        port = urlsplit(site.url).port
        assert scope["type"] == "http"
        assert scope["asgi"]["version"] == "3.0"
        assert scope["http_version"] == "1.1"
        assert (scope["method"], scope["scheme"]) == ("PATCH", "http")
        assert scope["path"] == "/echo/it/sü/x/"
        assert scope["raw_path"] == "/echo/it/s%C3%BC%2Fx/"
        assert scope["query_string"] == "q=a%20b&q=c"
        assert scope["root_path"] == "/echo/it"
        assert scope["client"][0] == "127.0.0.1"
        assert scope["server"] == ["127.0.0.1", port]
        assert ["x-thing", "a"] in scope["headers"]
        assert ["host", f"127.0.0.1:{port}"] in scope["headers"]
        assert client.get(site.at(deployment)).json()["path"] == "/echo/it"


def test_scope_of_the_catch_all(site: Site) -> None:
    @serve.ingress(echo_scope)
    class Echo: ...

    site.deploy(Echo, route_prefix="/")
    scope = httpx.get(site.url + "/a/b").json()
    assert (scope["path"], scope["root_path"]) == ("/a/b", "")


def make_pages() -> Starlette:
    """Make an app whose pages tell where they are."""

    async def page(request: Request) -> Response:
        urls = {
            "self": str(request.url),
            "base": str(request.base_url),
            "page": str(request.url_for("page", name="n")),
            "deep": str(request.url_for("deep:page", name="n")),
            "name": request.path_params["name"],
        }
        return JSONResponse(urls)

    async def move(request: Request) -> Response:
        return RedirectResponse(request.url_for("page", name="moved"))

    async def root(request: Request) -> Response:
        return PlainTextResponse("root")

    return Starlette(
        routes=[
            Route("/", root),
            Route("/page/{name}", page, name="page"),
            Route("/slash/", root),
            Route("/move", move),
            Mount("/deep", routes=[Route("/{name}", page, name="page")], name="deep"),
        ]
    )


@near_and_far
def test_relative_routing(site: Site, where: str) -> None:
    @serve.ingress(make_pages)
    class Pages: ...

    deployment = site.deploy(Pages, where=where, route_prefix="/pages")
    check_pages(site.url, "/pages")
    assert httpx.get(site.at(deployment, "/page")).status_code == 404


def test_relative_routing_of_the_catch_all(site: Site) -> None:
    @serve.ingress(make_pages)
    class Pages: ...

    site.deploy(Pages, route_prefix="/")
    check_pages(site.url, "")


def check_pages(
    url: str,
    root: str,
    asked: str | None = None,
    headers: dict[str, str] | None = None,
    verify: Any = True,
) -> None:
    """Check an app of `make_pages`; `root` is the path where clients think it is.

    `asked` is that path as the proxy gets it, if another.
    """
    asked = root if asked is None else asked
    with httpx.Client(headers=headers, verify=verify) as client:
        for path in ("/page/p", "/deep/p"):
            found = client.get(f"{url}{asked}{path}?q=1")
            assert found.status_code == 200, found.text
            assert found.json() == {
                "self": f"{url}{root}{path}?q=1",
                "base": f"{url}{root}/",
                "page": f"{url}{root}/page/n",
                "deep": f"{url}{root}/deep/n",
                "name": "p",
            }
        assert client.get(f"{url}{asked}/").text == "root"
        slash = client.get(f"{url}{asked}/slash")
        assert slash.status_code == 307
        assert slash.headers["location"] == f"{url}{root}/slash/"
        moved = client.get(f"{url}{asked}/move")
        assert moved.headers["location"] == f"{url}{root}/page/moved"
        if asked:
            slash = client.get(f"{url}{asked}")
            assert slash.status_code == 307
            assert slash.headers["location"] == f"{url}{root}/"


def make_api() -> FastAPI:
    app = FastAPI(title="Api")

    @app.get("/item/{number}")
    def item(number: int) -> int:
        return number

    return app


def check_docs(
    url: str,
    root: str,
    asked: str | None = None,
    headers: dict[str, str] | None = None,
    verify: Any = True,
) -> None:
    """Check that the documentation pages find each other and the routes."""
    asked = root if asked is None else asked
    with httpx.Client(headers=headers, verify=verify) as client:
        docs = client.get(f"{url}{asked}/docs")
        assert docs.status_code == 200
        assert f"'{root}/openapi.json'" in docs.text
        api = client.get(f"{url}{asked}/openapi.json").json()
        assert list(api["paths"]) == ["/item/{number}"]
        server = api.get("servers", [{"url": ""}])[0]["url"]
        assert server == root
        assert client.get(f"{url}{asked}/item/5").json() == 5


@near_and_far
def test_docs_under_a_prefix(site: Site, where: str) -> None:
    @serve.ingress(make_api)
    class Api: ...

    deployment = site.deploy(Api, where=where)
    check_docs(site.url, f"/{deployment.name}")


def test_root_path(start: Callable[..., Site]) -> None:
    site = start(root_path="/outer")

    @serve.ingress(make_pages)
    class Pages: ...

    @serve.ingress(make_api)
    class Api: ...

    @serve.ingress(echo_scope)
    class Echo: ...

    site.deploy(Pages, route_prefix="/pages")
    site.deploy(Api, route_prefix="/api", where="near")
    site.deploy(Echo, route_prefix="/echo", where="far")
    for asked in ("", "/outer"):  # stripped by the one in front, and not
        check_pages(site.url, "/outer/pages", f"{asked}/pages")
        check_docs(site.url, "/outer/api", f"{asked}/api")
        scope = httpx.get(f"{site.url}{asked}/echo/x%20y").json()
        assert scope["path"] == "/outer/echo/x y"
        assert scope["raw_path"] == "/outer/echo/x%20y"
        assert scope["root_path"] == "/outer/echo"
        assert httpx.get(f"{site.url}{asked}/none").status_code == 404
    assert httpx.get(f"{site.url}/outerecho").status_code == 404


def test_forwarded_prefix(site: Site) -> None:
    # jupyter-server-proxy strips its prefix and sends it in this header.
    @serve.ingress(make_pages)
    class Pages: ...

    @serve.ingress(make_api)
    class Api: ...

    site.deploy(Pages, route_prefix="/pages")
    site.deploy(Api, route_prefix="/api")
    front = "/user/me/proxy/8000"
    # The address of the browser does not hide that of the proxy.
    headers = {"X-Forwarded-Prefix": front, "X-Forwarded-For": "192.0.2.7"}
    check_pages(site.url, f"{front}/pages", "/pages", headers)
    check_docs(site.url, f"{front}/api", "/api", headers)


# Plain callables.


def _plain_callables() -> dict[str, Any]:
    def takes_request(request: Request) -> str:
        return request.url.path.rpartition("/")[2]

    def takes_nothing() -> str:
        return "x"

    async def async_takes_request(request: Request) -> str:
        await asyncio.sleep(0)
        return request.query_params.get("q", "x")

    async def async_takes_nothing() -> str:
        await asyncio.sleep(0)
        return "x"

    def takes_by_any_name(anything: Request, also: int = 1) -> str:
        return anything.url.path[-1]

    class Class:
        def __call__(self, request: Request) -> str:
            return request.url.path[-1]

    class ClassNothing:
        def __call__(self) -> str:
            return "x"

    class Async:
        async def __init__(self) -> None:  # type: ignore[misc]
            await asyncio.sleep(0)
            self.answer = "x"

        async def __call__(self, request: Request) -> str:
            await request.body()
            return self.answer

    class AsyncNothing:
        async def __call__(self) -> str:
            return "x"

    class Inherits(Class): ...

    found = locals().values()
    return {target.__name__: target for target in found}


@pytest.mark.parametrize("name", _plain_callables())
def test_plain_callable(site: Site, name: str) -> None:
    deployment = site.deploy(_plain_callables()[name])
    response = httpx.get(site.at(deployment, "/x"))
    assert (response.status_code, response.text) == (200, "x")


@near_and_far
def test_request_of_a_plain_callable(site: Site, where: str) -> None:
    async def tell(request: Request) -> dict[str, Any]:
        assert type(request) is Request
        body = await request.json()
        return {
            "method": request.method,
            "path": request.url.path,
            "query": request.query_params["q"],
            "header": request.headers["x-thing"],
            "cookie": request.cookies["c"],
            "body": body,
        }

    deployment = site.deploy(tell, where=where)
    response = httpx.put(
        site.at(deployment, "/y?q=1"),
        json={"a": [1]},
        headers={"x-thing": "t", "cookie": "c=d"},
    )
    assert response.json() == {
        "method": "PUT",
        "path": f"/{deployment.name}/y",
        "query": "1",
        "header": "t",
        "cookie": "d",
        "body": {"a": [1]},
    }


@near_and_far
def test_form_and_files(site: Site, where: str) -> None:
    async def upload(request: Request) -> list[Any]:
        async with request.form() as form:
            file = form["file"]
            return [form["field"], file.filename, len(await file.read())]

    deployment = site.deploy(upload, where=where)
    response = httpx.post(
        site.at(deployment),
        data={"field": "f"},
        files={"file": ("name.bin", b"x" * 300_000)},
    )
    assert response.json() == ["f", "name.bin", 300_000]


# Results.

TEXT, JSON = "text/plain; charset=utf-8", "application/json"
BYTES = "application/octet-stream"
WHEN = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
ID = uuid.UUID("12345678123456781234567812345678")


def make_results() -> dict[str, tuple[Callable[[], Any], str, Any]]:
    """Return what to answer, the content type, and the text or the JSON, by name."""

    @dataclasses.dataclass
    class Point:
        x: int
        when: datetime.datetime

    class Model(pydantic.BaseModel):
        x: int
        when: datetime.datetime
        points: list[int] = []

    return {
        "str": (lambda: "ü", TEXT, "ü"),
        "empty-str": (lambda: "", TEXT, ""),
        "bytes": (lambda: b"\x00\xff", BYTES, b"\x00\xff"),
        "bytearray": (lambda: bytearray(b"x"), BYTES, b"x"),
        "dict": (lambda: {"a": [1, None, True, 1.5, "ü"]}, JSON,
                 {"a": [1, None, True, 1.5, "ü"]}),
        "list": (lambda: [], JSON, []),
        "tuple": (lambda: (1, 2), JSON, [1, 2]),
        "int": (lambda: 5, JSON, 5),
        "bool": (lambda: False, JSON, False),
        "float": (lambda: 0.5, JSON, 0.5),
        "int-keys": (lambda: {1: 2}, JSON, {"1": 2}),
        "array": (lambda: np.arange(6).reshape(2, 3), JSON, [[0, 1, 2], [3, 4, 5]]),
        "array-t": (lambda: np.arange(4).reshape(2, 2).T, JSON, [[0, 2], [1, 3]]),
        "array-str": (lambda: np.array(["a", "b"]), JSON, ["a", "b"]),
        "array-bool": (lambda: np.array([True, False]), JSON, [True, False]),
        "array-0d": (lambda: np.array(5), JSON, 5),
        "in-dict": (lambda: {"p": np.float32(0.5), "n": np.int64(3)}, JSON,
                    {"p": 0.5, "n": 3}),
        "float64": (lambda: np.float64(0.5), JSON, 0.5),
        "int64": (lambda: np.int64(5), JSON, 5),
        "bool_": (lambda: np.bool_(True), JSON, True),
        "frame": (lambda: pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), JSON,
                  [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
        "series": (lambda: pd.Series([1.5], index=["a"]), JSON, {"a": 1.5}),
        "timestamp": (lambda: {"t": pd.Timestamp(WHEN)}, JSON,
                      {"t": "2024-01-02T03:04:05+00:00"}),
        "dataclass": (lambda: Point(1, WHEN), JSON,
                      {"x": 1, "when": "2024-01-02T03:04:05+00:00"}),
        "model": (lambda: Model(x=1, when=WHEN), JSON,
                  {"x": 1, "when": "2024-01-02T03:04:05Z", "points": []}),
        "models": (lambda: [Model(x=1, when=WHEN, points=[2])], JSON,
                   [{"x": 1, "when": "2024-01-02T03:04:05Z", "points": [2]}]),
        "datetime": (lambda: WHEN, JSON, "2024-01-02T03:04:05+00:00"),
        "date": (lambda: {"d": WHEN.date()}, JSON, {"d": "2024-01-02"}),
        "uuid": (lambda: ID, JSON, str(ID)),
        "set": (lambda: {5}, JSON, [5]),
        "huge": (lambda: {"n": 2**70}, JSON, {"n": 2**70}),
    }  # fmt: skip


@pytest.fixture(scope="module", params=["near", "far"])
def results_url(_site: Site, request: pytest.FixtureRequest) -> Iterator[str]:
    keep = len(_site.deployed)

    class Results:
        def __init__(self) -> None:
            self.results = make_results()

        def __call__(self, request: Request) -> Any:
            name = request.url.path.rpartition("/")[2]
            if name == "none":
                return None
            if name == "response":
                headers = {"x-own": "1"}
                return Response("made", 201, headers, media_type="text/html")
            return self.results[name][0]()

    yield _site.at(_site.deploy(Results, where=request.param))
    _site.clean(keep)


@pytest.mark.parametrize("name", make_results())
def test_result(results_url: str, name: str) -> None:
    _, content_type, expected = make_results()[name]
    response = httpx.get(f"{results_url}/{name}")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == content_type
    assert int(response.headers["content-length"]) == len(response.content)
    if content_type == JSON:
        assert response.json() == expected
    elif content_type == TEXT:
        assert response.text == expected
    else:
        assert response.content == expected


def test_result_none_and_response(results_url: str) -> None:
    response = httpx.get(f"{results_url}/none")
    assert (response.status_code, response.content) == (200, b"")
    response = httpx.get(f"{results_url}/response")
    assert (response.status_code, response.text) == (201, "made")
    assert response.headers["x-own"] == "1"
    assert response.headers["content-type"] == "text/html; charset=utf-8"


@near_and_far
def test_result_that_cannot_be_encoded(site: Site, where: str) -> None:
    class Strange: ...

    def strange(request: Request) -> Any:
        return {"deep": [Strange()]} if "deep" in request.url.path else Strange()

    deployment = site.deploy(strange, where=where)
    for path in ("/plain", "/deep"):
        headers = {"x-request-id": f"strange-{where}{path[1:]}"}
        response = httpx.get(site.at(deployment, path), headers=headers)
        assert response.status_code == 500
        assert response.text == "Internal Server Error"
    log_lines(site, f"strange-{where}plain", deployment.name)
    log_lines(site, "Strange", "JSON")


@near_and_far
@pytest.mark.parametrize("kind", ["whole", "stream"])
def test_background_tasks_run_after_the_response(
    site: Site, where: str, kind: str, gate: Gate, notes: Notes
) -> None:
    async def later() -> None:
        await gate.wait()
        notes.add("async")

    def later_sync() -> None:
        gate.wait_sync()
        notes.add("sync")

    def answer(request: Request) -> Response:
        tasks = BackgroundTasks([BackgroundTask(later), BackgroundTask(later_sync)])
        if kind == "stream":
            return StreamingResponse(iter("ab"), background=tasks)
        return PlainTextResponse("ab", background=tasks)

    deployment = site.deploy(answer, where=where)
    with httpx.Client() as client:  # the gate is closed: nobody waits for the tasks
        for _ in range(2):
            assert client.get(site.at(deployment)).text == "ab"
    assert notes.read() == []
    gate.open()
    poll(lambda: sorted(notes.read()) == ["async"] * 2 + ["sync"] * 2)


def _generators() -> dict[str, Any]:
    def sync_generator(gate: Gate) -> Iterator[Any]:
        yield "a"
        gate.wait_sync()
        yield b"b"

    async def async_generator(gate: Gate) -> Any:
        yield "a"
        await gate.wait()
        yield b"b"

    def sync_iterator(gate: Gate) -> Iterator[Any]:
        return iter(sync_generator(gate))

    async def response(gate: Gate) -> Response:
        return StreamingResponse(async_generator(gate), 202)

    found = locals().values()
    return {target.__name__: target for target in found}


@near_and_far
@pytest.mark.parametrize("name", _generators())
def test_generators_stream(site: Site, where: str, name: str, gate: Gate) -> None:
    function = _generators()[name]

    class Stream:
        def __call__(self, request: Request) -> Any:
            return function(gate)

    deployment = site.deploy(Stream, where=where)
    with httpx.stream("GET", site.at(deployment)) as response:
        assert response.status_code == (202 if name == "response" else 200)
        chunks = response.iter_bytes()
        assert next(chunks) == b"a"
        gate.open()
        assert b"".join(chunks) == b"b"


@near_and_far
def test_generator_methods_stream(site: Site, where: str, gate: Gate) -> None:
    class Sync:
        def __call__(self, request: Request) -> Iterator[str]:
            yield request.url.path[-1]
            gate.wait_sync()
            yield "end"

    class Async:
        async def __call__(self) -> Any:
            yield "x"
            await gate.wait()
            yield "end"

    for target in (Sync, Async):
        url = site.at(site.deploy(target, where=where), "/x")
        with httpx.stream("GET", url) as response:
            chunks = response.iter_bytes()
            assert next(chunks) == b"x"
            gate.open()
            assert b"".join(chunks) == b"end"
        os.unlink(gate.path)


# Errors of user code.


@near_and_far
@pytest.mark.parametrize("kind", ["sync", "async", "ingress"])
def test_user_code_raises(site: Site, where: str, kind: str) -> None:
    app = FastAPI()

    class Sync:
        def __call__(self) -> None:
            raise LookupError("a secret")

    class Async:
        async def __call__(self) -> None:
            raise LookupError("a secret")

    @serve.ingress(app)
    class Ingress:
        @app.get("/")
        def get(self) -> None:
            raise LookupError("a secret")

    target = {"sync": Sync, "async": Async, "ingress": Ingress}[kind]
    deployment = site.deploy(target, where=where)
    request_id = f"raises-{where}-{kind}"
    url = site.at(deployment, "/")
    response = httpx.get(url, headers={"x-request-id": request_id})
    assert response.status_code == 500
    assert response.text == "Internal Server Error"
    assert response.headers["content-type"].startswith("text/plain")
    assert response.headers["x-request-id"] == request_id
    log_lines(site, request_id, deployment.name)
    log_lines(site, "LookupError: a secret")


@pytest.mark.parametrize("kind", ["plain", "ingress"])
def test_user_code_raises_with_debug(start: Callable[..., Site], kind: str) -> None:
    site = start(debug=True)
    app = FastAPI()

    class Plain:
        def __call__(self) -> None:
            raise LookupError("<b>why</b>")

    @serve.ingress(app)
    class Ingress:
        @app.get("/")
        def get(self) -> None:
            raise LookupError("<b>why</b>")

    deployment = site.deploy({"plain": Plain, "ingress": Ingress}[kind])
    response = httpx.get(site.at(deployment, "/"))
    assert response.status_code == 500
    assert response.headers["content-type"].startswith("text/plain")
    assert "Traceback" in response.text
    assert "LookupError: <b>why</b>" in response.text


@near_and_far
def test_http_exception_keeps_its_status(site: Site, where: str) -> None:
    def plain(request: Request) -> None:
        name = request.url.path.rpartition("/")[2]
        if name == "starlette":
            raise HTTPException(418, "short and stout", headers={"x-tea": "pot"})
        if name == "fastapi":
            raise fastapi.HTTPException(422, {"field": "bad"})
        raise HTTPException(204)

    app = FastAPI()

    @serve.ingress(app)
    class Ingress:
        @app.get("/starlette")
        def get(self) -> None:
            raise fastapi.HTTPException(418, "short and stout", headers={"x-tea": "p"})

    deployment = site.deploy(plain, where=where)
    response = httpx.get(site.at(deployment, "/starlette"))
    assert (response.status_code, response.text) == (418, "short and stout")
    assert response.headers["x-tea"] == "pot"
    response = httpx.get(site.at(deployment, "/fastapi"))
    assert (response.status_code, response.json()) == (422, {"field": "bad"})
    assert httpx.get(site.at(deployment, "/none")).status_code == 204
    deployment = site.deploy(Ingress, where=where)
    response = httpx.get(site.at(deployment, "/starlette"))
    assert response.status_code == 418
    assert response.json() == {"detail": "short and stout"}


@near_and_far
@pytest.mark.parametrize("length", [True, False], ids=["length", "chunked"])
def test_error_after_the_response_began(site: Site, where: str, length: bool) -> None:
    @serve.ingress(lambda: app)
    class Cut: ...

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = [(b"content-length", b"1000")] if length else []
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise LookupError("in the middle")

    deployment = site.deploy(Cut, where=where)
    got = b""
    with pytest.raises(httpx.RemoteProtocolError):
        with httpx.stream("GET", site.at(deployment)) as response:
            assert response.status_code == 200
            for chunk in response.iter_raw():
                got += chunk
    assert got == b"x"
    assert httpx.get(site.url + "/-/healthz").status_code == 200
    log_lines(site, "LookupError: in the middle")


def test_generator_that_raises_cuts_the_connection(site: Site) -> None:
    async def numbers() -> Any:
        yield "1"
        raise LookupError

    deployment = site.deploy(numbers)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(site.at(deployment))


# Timeouts.


@near_and_far
def test_timeout_of_the_deployment(site: Site, where: str, notes: Notes) -> None:
    class Slow:
        async def __call__(self) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                notes.add("cancelled")
                raise

    deployment = site.deploy(Slow, where=where, request_timeout_s=0.3)
    began = time.monotonic()
    response = httpx.get(site.at(deployment))
    assert response.status_code == 504
    assert deployment.name in response.text
    assert 0.3 <= time.monotonic() - began < 10
    notes.wait("cancelled")


def test_timeout_of_the_instance(start: Callable[..., Site], notes: Notes) -> None:
    site = start(request_timeout_s="300ms")

    async def slow(request: Request) -> str:
        notes.add("began")
        await asyncio.sleep(float(request.query_params["s"]))
        notes.add("ended")
        return "slow"

    by_instance, own = site.make(slow), site.make(slow, request_timeout_s=20)
    by_instance.deploy()
    own.deploy()
    assert httpx.get(site.at(by_instance, "?s=30")).status_code == 504
    assert httpx.get(site.at(by_instance, "?s=0")).text == "slow"
    assert notes.read() == ["began", "began", "ended"]
    # A deployment's own limit comes first, also when it is the longer one.
    assert httpx.get(site.at(own, "?s=0.6"), timeout=30).text == "slow"


@near_and_far
def test_timeout_header_can_only_lower_it(site: Site, where: str) -> None:
    async def slow(request: Request) -> str:
        await asyncio.sleep(float(request.query_params["s"]))
        return "slow"

    def get(deployment: serve.Deployment, seconds: float, header: str) -> int:
        headers = {"x-request-timeout-seconds": header}
        url = site.at(deployment, f"?s={seconds}")
        return httpx.get(url, headers=headers, timeout=30).status_code

    long = site.deploy(slow, where=where, request_timeout_s=20)
    assert get(long, 30, "0.2") == 504
    assert get(long, 0, "5") == 200
    short = site.deploy(slow, where=where, request_timeout_s=0.3)
    assert get(short, 30, "60") == 504
    for nonsense in ("-1", "0", "x", "nan", "inf", ""):
        assert get(short, 30, nonsense) == 504
        assert get(short, 0, nonsense) == 200


def test_timeout_ends_with_the_responses_beginning(site: Site) -> None:
    async def slow() -> Any:
        for number in range(8):
            yield str(number)
            await asyncio.sleep(0.1)

    deployment = site.deploy(slow, request_timeout_s=0.3)
    assert httpx.get(site.at(deployment)).text == "01234567"


def test_timeout_in_the_queue(site: Site, gate: Gate, notes: Notes) -> None:
    async def slow(request: Request) -> str:
        notes.add(request.url.path[-1])
        await gate.wait()
        return "slow"

    deployment = site.deploy(slow, max_ongoing_requests=1)
    with send_request(site.at(deployment, "/1"), headers="Connection: close\r\n") as s:
        notes.wait("1")
        headers = {"x-request-timeout-seconds": "0.3"}
        response = httpx.get(site.at(deployment, "/2"), headers=headers)
        assert response.status_code == 504
        gate.open()
        assert read_all(s).endswith(b"slow")
    assert httpx.get(site.at(deployment, "/3")).text == "slow"
    assert notes.read() == ["1", "3"]  # what has timed out is never begun


def test_timeout_while_the_body_comes(site: Site, notes: Notes) -> None:
    async def read(request: Request) -> str:
        notes.add("began")
        return str(len(await request.body()))

    deployment = site.deploy(read, request_timeout_s=0.3)
    url = site.at(deployment)
    for begun in (b"12345", b""):
        with send_request(url, "POST", "Content-Length: 10\r\n", begun) as sock:
            assert b" 504 " in read_all(sock)  # and the connection is closed
    assert notes.read() == []  # a slow sender holds no place


@near_and_far
def test_timeout_of_sync_code(site: Site, where: str, gate: Gate) -> None:
    def slow(request: Request) -> str:
        if request.method == "POST":
            gate.wait_sync()
        return "done"

    deployment = site.deploy(slow, where=where, request_timeout_s=0.3)
    assert httpx.post(site.at(deployment)).status_code == 504
    gate.open()
    assert poll(lambda: httpx.get(site.at(deployment)).text == "done")


# The client goes.


@near_and_far
def test_client_gone_cancels(site: Site, where: str, notes: Notes, gate: Gate) -> None:
    class Inner:
        async def __call__(self) -> None:
            notes.add("inner began")
            try:
                await gate.wait()
            except asyncio.CancelledError:
                notes.add("inner cancelled")
                raise

    inner = site.deploy(Inner, where=where, route_prefix=None)

    class Outer:
        def __init__(self) -> None:
            self.handle = serve.get_deployment(inner.name).get_handle()

        async def __call__(self) -> None:
            try:
                await self.handle.remote()
            except asyncio.CancelledError:
                notes.add("outer cancelled")
                raise

    outer = site.deploy(Outer, where=where)
    with send_request(site.at(outer), headers=f"x-request-id: gone-{where}\r\n"):
        notes.wait("inner began")
    notes.wait("outer cancelled")
    notes.wait("inner cancelled")
    line = log_lines(site, f"gone-{where}", "daskserve.access")[0]
    assert " 499 " in line


@near_and_far
def test_client_gone_in_a_fastapi_app(site: Site, where: str, notes: Notes) -> None:
    app = FastAPI()

    @serve.ingress(app)
    class Api:
        @app.get("/")
        async def get(self) -> None:
            notes.add("began")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                notes.add("cancelled")
                raise

    deployment = site.deploy(Api, where=where)
    with send_request(site.at(deployment, "/")):
        notes.wait("began")
    notes.wait("cancelled")


@near_and_far
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_client_gone_closes_a_stream(
    site: Site, where: str, kind: str, notes: Notes
) -> None:
    async def numbers() -> Any:
        try:
            while True:
                yield "x" * 1000
                await asyncio.sleep(0.001)
        finally:
            notes.add("closed")

    def sync_numbers() -> Iterator[str]:
        try:
            while True:
                yield "x" * 1000
                time.sleep(0.001)
        finally:
            notes.add("closed")

    target = numbers if kind == "async" else sync_numbers
    deployment = site.deploy(target, where=where)
    with httpx.stream("GET", site.at(deployment)) as response:
        next(response.iter_raw())
    notes.wait("closed")


def test_client_gone_from_the_queue(site: Site, notes: Notes, gate: Gate) -> None:
    async def slow(request: Request) -> str:
        notes.add(request.url.path[-1])
        await gate.wait()
        return "slow"

    deployment = site.deploy(slow, max_ongoing_requests=1)
    headers = "Connection: close\r\n"
    with send_request(site.at(deployment, "/1"), headers=headers) as first:
        notes.wait("1")
        request_id = "x-request-id: gone-from-queue\r\n"
        with send_request(site.at(deployment, "/2"), headers=request_id) as second:
            # Long enough in the queue for the proxy to watch its client.
            second.settimeout(0.2)
            with pytest.raises(TimeoutError):
                second.recv(1)
        log_lines(site, "gone-from-queue", " 499 ")
        gate.open()
        assert read_all(first).endswith(b"slow")
    assert httpx.get(site.at(deployment, "/3")).text == "slow"
    assert notes.read() == ["1", "3"]


# No room, no replica.


@near_and_far
def test_queue_full(site: Site, where: str, gate: Gate, notes: Notes) -> None:
    async def slow(request: Request) -> str:
        notes.add(request.url.path[-1])
        await gate.wait()
        return "slow"

    deployment = site.deploy(
        slow, where=where, max_ongoing_requests=1, max_queued_requests=1
    )
    other = site.deploy(slow, where=where, max_ongoing_requests=2)
    strict = site.deploy(
        slow, where=where, max_ongoing_requests=1, max_queued_requests=0
    )
    headers = "Connection: close\r\n"
    with (
        send_request(site.at(deployment, "/1"), headers=headers) as first,
        send_request(site.at(strict, "/s"), headers=headers) as only,
    ):
        notes.wait("1")
        notes.wait("s")

        def fill() -> Any:
            # Sent on one connection after the other: one of the first two waits.
            sock = send_request(site.at(deployment, "/2"), headers=headers)
            sock.settimeout(0.5)
            try:
                sock.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                return sock
            raise AssertionError(read_all(sock))

        with fill() as second:
            for url in (site.at(deployment, "/3"), site.at(strict, "/4")):
                response = httpx.get(url, timeout=5)  # the gate is closed
                assert response.status_code == 503
                assert int(response.headers["retry-after"]) >= 1
                assert "max_queued_requests" in response.text
            with send_request(site.at(other, "/5"), headers=headers) as fifth:
                notes.wait("5")  # the limit is each deployment's own
                gate.open()
                for sock in (first, second, only, fifth):
                    assert read_all(sock).endswith(b"slow")
    assert sorted(notes.read()) == ["1", "2", "5", "s"]


def test_deployment_that_failed(site: Site) -> None:
    class Broken:
        def __init__(self) -> None:
            raise LookupError("cannot start")

        def __call__(self) -> str:
            return "never"

    deployment = site.make(Broken)
    with pytest.raises(DeploymentFailedError, match="cannot start"):
        deployment.deploy()
    assert serve.status().deployments[deployment.name].state == "DEPLOY_FAILED"
    began = time.monotonic()
    response = httpx.get(site.at(deployment), timeout=30)
    assert response.status_code == 503
    assert deployment.name in response.text
    assert time.monotonic() - began < 5


def test_deployment_that_is_starting(site: Site, gate: Gate, notes: Notes) -> None:
    class Starting:
        def __init__(self) -> None:
            notes.add("constructing")
            gate.wait_sync()

        def __call__(self) -> str:
            return "started"

    deployment = site.make(Starting)
    deploying = threading.Thread(target=deployment.deploy)
    deploying.start()
    try:
        notes.wait("constructing")
        # Its route is there, and requests wait.
        response = httpx.get(
            site.at(deployment), headers={"x-request-timeout-seconds": "0.2"}
        )
        assert response.status_code == 503
        assert "running the constructor" in response.text
    finally:
        gate.open()
        deploying.join(20)
    assert httpx.get(site.at(deployment)).text == "started"


# Bodies.


def test_body_too_large(start: Callable[..., Site], notes: Notes) -> None:
    site = start(max_request_body_bytes=200_000)

    async def size(request: Request) -> int:
        notes.add("began")
        return len(await request.body())

    for where in ("near", "far"):
        url = site.at(site.deploy(size, where=where))
        # Announced: refused before any of it is sent, and the connection is closed.
        length = "Content-Length: 200001\r\n"
        with send_request(url, "POST", length) as sock:
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert notes.read() == []
        # Not announced: refused once it is too much, though more were to come.
        chunk = b"%x\r\n%b\r\n" % (10_000, b"x" * 10_000)
        chunked = "Transfer-Encoding: chunked\r\n"
        with send_request(url, "POST", chunked, chunk * 21) as sock:
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 413 ")
        ok = httpx.post(url, content=b"x" * 200_000)
        assert (ok.status_code, ok.json()) == (200, 200_000)
        ok = httpx.post(url, content=iter([b"x" * 100_000] * 2))
        assert (ok.status_code, ok.json()) == (200, 200_000)
        os.unlink(notes.path)


def test_bad_http(site: Site) -> None:
    for data in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
        with connect(site.url) as sock:
            sock.sendall(data)
            assert read_all(sock).startswith(b"HTTP/1.1 400 ")


@near_and_far
def test_body_that_is_not_read(site: Site, where: str) -> None:
    def ignore() -> str:
        return "ignored"

    deployment = site.deploy(ignore, where=where)
    with httpx.Client() as client:
        for size in (0, 10, 100_000, 5_000_000):
            response = client.post(site.at(deployment), content=b"x" * size)
            assert (response.status_code, response.text) == (200, "ignored")


@near_and_far
def test_answer_to_a_body_that_is_not_read(site: Site, where: str) -> None:
    """A client that sends its body first, as most do, gets to read it."""

    def refuse(request: Request) -> Response:
        return PlainTextResponse("no", 403)

    parts = urlsplit(site.at(site.deploy(refuse, where=where)))
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    with contextlib.closing(connection):
        for _ in range(2):
            connection.request("POST", parts.path, body=bytes(10_000_000))
            response = connection.getresponse()
            assert (response.status, response.read()) == (403, b"no")


@near_and_far
def test_head(site: Site, where: str) -> None:
    def page(request: Request) -> str:
        return "page"

    url = site.at(site.deploy(page, where=where))
    path = urlsplit(url).path
    with connect(url) as sock:
        for method in ("HEAD", "GET"):
            sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head, _, body = read_head(sock).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"content-length: 4" in head.lower()
            if method == "GET":  # a body of HEAD would stand before this head
                while len(body) < 4:
                    body += sock.recv(4)
                assert body == b"page"


EVIL = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"


async def say(request: Request) -> Response:
    """Answer as asked, and with a body whatever the status."""
    query = request.query_params
    length = {"content-length": str(len(EVIL))}
    if "stream" in query:
        parts = iter([EVIL[:7], EVIL[7:], ""])
        return StreamingResponse(parts, int(query["status"]), length)
    return Response(EVIL, int(query["status"]), length)


@contextmanager
def keep_alive(url: str, verify: Any = True) -> Iterator[http.client.HTTPConnection]:
    """Give a connection for several requests, that reads no more than is announced."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=10, context=verify
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    with contextlib.closing(connection):
        yield connection


def check_no_bodies(url: str, verify: Any = True) -> None:
    """Check responses of `say` that have no body, and what comes behind them."""
    path = urlsplit(url).path
    with keep_alive(url, verify) as connection:

        def ask(method: str, query: str) -> tuple[int, str | None, bytes]:
            connection.request(method, f"{path}?status={query}")
            response = connection.getresponse()
            length = response.getheader("content-length")
            return response.status, length, response.read()

        whole = (200, str(len(EVIL)), EVIL.encode())
        for query in ("", "&stream"):
            for _ in range(2):
                assert ask("GET", f"204{query}") == (204, None, b"")
                assert ask("GET", f"200{query}") == whole
                assert ask("GET", f"304{query}")[::2] == (304, b"")
                assert ask("HEAD", f"200{query}") == (*whole[:2], b"")
                assert ask("HEAD", f"204{query}") == (204, None, b"")
                assert ask("GET", f"200{query}") == whole
            for status in (100, 101, 103, 199):
                assert ask("GET", f"{status}{query}")[0] == 500
                assert ask("GET", f"200{query}") == whole


@near_and_far
@pytest.mark.parametrize("middlewares", [False, True])
def test_no_body_where_none_may_be(
    start: Callable[..., Site], where: str, middlewares: bool
) -> None:
    cors = Middleware(CORSMiddleware, allow_origins=["*"])
    site = start(middlewares=[cors] if middlewares else [])
    url = site.at(site.deploy(say, where=where))
    check_no_bodies(url)
    with keep_alive(url) as connection:  # what a cache is told of what it has
        connection.request("GET", f"{urlsplit(url).path}?status=304")
        assert connection.getresponse().getheader("content-length") == str(len(EVIL))


@pytest.mark.parametrize("status", [101, 204, 304])
def test_middleware_whose_response_may_have_no_body(
    start: Callable[..., Site], status: int
) -> None:
    class Answer:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            app = self.app
            if scope["path"] == "/mine":
                length = {"content-length": str(len(EVIL))}
                app = Response(EVIL, status, length)
            await app(scope, receive, send)

    site = start(middlewares=[Middleware(Answer)])
    with keep_alive(site.url) as connection:
        for path, expected in [("/mine", status), ("/-/healthz", 200)] * 2:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == (500 if expected == 101 else expected)
            assert EVIL.encode() not in response.read()


def test_endless_stream_for_a_head(site: Site, notes: Notes) -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            start = {"type": "http.response.start", "status": 200, "headers": []}
            await send(start)
            try:
                while True:
                    part = {"type": "http.response.body", "body": b"x"}
                    await send({**part, "more_body": True})
            finally:
                notes.add("ended")

    @serve.ingress(endless)
    class Endless: ...

    url = site.at(site.deploy(Endless))
    with send_request(url, "HEAD") as sock:
        assert read_head(sock).endswith(b"\r\n\r\n")
        assert "ended" not in notes.read()
    notes.wait("ended")  # as its client has gone


# Headers.


@near_and_far
def test_request_id(site: Site, where: str) -> None:
    app = FastAPI()

    @serve.ingress(app)
    class Api:
        @app.get("/sync")
        def sync(self) -> str | None:
            return serve.get_replica_context().request_id

        @app.get("/async")
        async def not_sync(self) -> str | None:
            return serve.get_replica_context().request_id

    class Plain:
        def __call__(self) -> str | None:
            return serve.get_replica_context().request_id

    api, plain = site.deploy(Api, where=where), site.deploy(Plain, where=where)
    urls = [site.at(api, "/sync"), site.at(api, "/async"), site.at(plain)]
    made = set()
    with httpx.Client() as client:
        for url in urls:
            for given in ("a-good/one!~", "x" * 128):
                response = client.get(url, headers={"x-request-id": given})
                assert response.headers.get_list("x-request-id") == [given]
                assert response.text.strip('"') == given
            for bad in (None, "", "x" * 129, "two words", "ü", "tab\there"):
                headers = [] if bad is None else [(b"x-request-id", bad.encode())]
                response = client.get(url, headers=headers)
                (found,) = response.headers.get_list("x-request-id")
                assert re.fullmatch(r"[!-~]{8,128}", found)
                assert response.text.strip('"') == found != bad
                made.add(found)
    assert len(made) == 6 * len(urls)
    for path in ("/nowhere", "/-/routes"):
        response = httpx.get(site.url + path, headers={"x-request-id": "own"})
        assert response.headers["x-request-id"] == "own"
    log_lines(site, f"request_id={'x' * 128}", api.name)


def test_request_id_in_handle_calls(site: Site) -> None:
    def inner() -> str | None:
        return serve.get_replica_context().request_id

    handle = site.deploy(inner, route_prefix=None).get_handle()

    async def outer() -> str | None:
        found: str | None = await handle.remote()
        return found

    deployment = site.deploy(outer)
    headers = {"x-request-id": "through"}
    assert httpx.get(site.at(deployment), headers=headers).text == "through"


@near_and_far
def test_repeated_headers(site: Site, where: str) -> None:
    def cookies(request: Request) -> Response:
        response = PlainTextResponse(",".join(request.headers.getlist("x-many")))
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    deployment = site.deploy(cookies, where=where)
    headers = [("x-many", "1"), ("x-many", "2")]
    response = httpx.get(site.at(deployment), headers=headers)
    assert response.text == "1,2"
    found = response.headers.get_list("set-cookie")
    assert [cookie.partition(";")[0] for cookie in found] == ["a=1", "b=2"]


# Apps.


def test_lifespan(site: Site, notes: Notes) -> None:
    def make_app() -> Starlette:
        @asynccontextmanager
        async def lifespan(app: Starlette) -> Any:
            tag = serve.get_replica_context().replica_tag
            notes.add(f"up {tag}")
            app.state.loop = asyncio.get_running_loop()
            yield {"tag": tag}
            notes.add(f"down {tag}")

        async def get(request: Request) -> Response:
            same = request.app.state.loop is asyncio.get_running_loop()
            return JSONResponse([request.state.tag, same])

        return Starlette(routes=[Route("/", get)], lifespan=lifespan)

    @serve.ingress(make_app)
    class Api: ...

    deployment = site.deploy(Api, num_replicas=2)
    replicas = serve.status().deployments[deployment.name].replicas
    tags = {replica.replica_tag for replica in replicas}
    assert sorted(notes.read()) == sorted(f"up {tag}" for tag in tags)
    for _ in range(10):
        tag, same = httpx.get(site.at(deployment, "/")).json()
        assert tag in tags
        assert same
    assert len(notes.read()) == 2
    deployment.delete()
    assert sorted(notes.read()) == sorted(
        f"{what} {tag}" for tag in tags for what in ("up", "down")
    )


def test_factory_whose_annotations_are_strings(site: Site) -> None:
    # As all are here: "from __future__ import annotations" is at the top.
    def make_app() -> FastAPI:
        app = FastAPI()

        @app.get("/")
        async def get(request: Request) -> str:
            return request.url.path

        return app

    @serve.ingress(make_app)
    class Api: ...

    deployment = site.deploy(Api)
    response = httpx.get(site.at(deployment, "/"))
    assert (response.status_code, response.json()) == (200, f"/{deployment.name}/")


def test_startup_that_fails(site: Site, notes: Notes) -> None:
    def make_app() -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> Any:
            notes.add("tried")
            raise LookupError("no such model")
            yield

        return FastAPI(lifespan=lifespan)

    @serve.ingress(make_app)
    class Api: ...

    deployment = site.make(Api)
    with pytest.raises(DeploymentFailedError, match="no such model"):
        deployment.deploy()
    assert 1 < len(notes.read()) < 20
    assert serve.status().deployments[deployment.name].running_replicas == 0


@near_and_far
def test_fastapi_app(site: Site, where: str, notes: Notes, gate: Gate) -> None:
    app = FastAPI()
    app.state.answer = 42

    class Stamp(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Response:
            request.state.stamp = "stamped"
            response: Response = await call_next(request)
            response.headers["x-stamp"] = "1"
            return response

    app.add_middleware(Stamp)

    async def later() -> None:
        await gate.wait()
        notes.add("background")

    @serve.ingress(app)
    class Api:
        @app.get("/state")
        async def state(self, request: Request) -> list[Any]:
            return [request.app.state.answer, request.state.stamp]

        @app.get("/background")
        async def background(self, tasks: fastapi.BackgroundTasks) -> str:
            tasks.add_task(later)
            return "first"

        @app.get("/events")
        async def events(self) -> StreamingResponse:
            async def stream() -> Any:
                yield "data: 1\n\n"
                await gate.wait()
                yield "data: 2\n\n"

            return StreamingResponse(stream(), media_type="text/event-stream")

        @app.post("/body")
        async def body(self, request: Request) -> int:
            return sum([len(part) async for part in request.stream()])

    inside = FastAPI()

    @inside.get("/x")
    def x() -> str:
        return "mounted"

    app.mount("/mount", inside)

    @serve.ingress(app)
    class Mounted(Api): ...

    deployment = site.deploy(Mounted, where=where)
    with httpx.Client(base_url=site.at(deployment), timeout=10) as client:
        response = client.get("/state")
        assert response.json() == [42, "stamped"]
        assert response.headers["x-stamp"] == "1"
        assert client.get("/mount/x").json() == "mounted"
        assert client.head("/state").status_code == 405
        assert client.post("/body", content=b"x" * 300_000).json() == 300_000
        # The gate is closed: the response does not wait for the task.
        assert client.get("/background").json() == "first"
        with client.stream("GET", "/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            assert [next(lines), next(lines)] == ["data: 1", ""]
            gate.open()
            assert [next(lines), next(lines)] == ["data: 2", ""]
    notes.wait("background")


# Options of the instance.


def test_middlewares(start: Callable[..., Site]) -> None:
    class Stamp:
        def __init__(self, app: Any, text: str) -> None:
            self.app, self.text = app, text.encode()

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def stamped(event: Any) -> None:
                if event["type"] == "http.response.start":
                    event["headers"] = [*event["headers"], (b"x-stamp", self.text)]
                await send(event)

            await self.app(scope, receive, stamped)

    cors = Middleware(CORSMiddleware, allow_origins=["http://o"], allow_methods=["*"])
    outer, inner = Middleware(Stamp, "outer"), Middleware(Stamp, text="inner")
    site = start(middlewares=[cors, outer, inner])

    class Broken:
        def __init__(self, broken: bool) -> None:
            assert not broken

        def __call__(self, request: Request) -> str:
            if "raise" in request.url.path:
                raise LookupError
            return "ok"

    broken = site.make(Broken)
    with pytest.raises(DeploymentFailedError):
        broken.deploy(True)
    fine = site.deploy(Broken, False)
    for url, status in {
        site.at(fine): 200,
        site.at(fine, "/raise"): 500,
        site.at(broken): 503,
        site.url + "/nowhere": 404,
        site.url + "/-/routes": 200,
    }.items():
        response = httpx.get(url, headers={"origin": "http://o"})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "http://o"
        assert response.headers.get_list("x-stamp") == ["inner", "outer"]
        assert "x-request-id" in response.headers
    headers = {"origin": "http://o", "access-control-request-method": "PUT"}
    response = httpx.options(site.at(fine), headers=headers)
    assert response.status_code == 200
    assert "PUT" in response.headers["access-control-allow-methods"]


@near_and_far
def test_access_log(site: Site, where: str) -> None:
    def logged(request: Request) -> Response:
        return Response(status_code=202)

    deployment = site.deploy(logged, where=where, route_prefix=f"/logged/{where}")
    headers = {"x-request-id": f"logged-{where}"}
    url = site.at(deployment, "/deep?password=hidden-query")
    httpx.post(url, headers=headers, content=b"hidden-body")
    lines = log_lines(site, f"logged-{where}", "daskserve.access")
    assert len(lines) == 1
    assert re.search(
        rf"daskserve\.access - INFO - POST /logged/{where} 202 [\d.]+ ?ms "
        rf"request_id=logged-{where} deployment={deployment.name}$",
        lines[0],
    )
    headers = {"x-request-id": f"unrouted-{where}"}
    httpx.get(site.url + "/unrouted?password=hidden-query", headers=headers)
    (line,) = log_lines(site, f"unrouted-{where}", "daskserve.access")
    assert " 404 " in line
    logs = site.cluster.logs()
    assert "hidden-query" not in logs
    assert "hidden-body" not in logs


def test_token(start: Callable[..., Site]) -> None:
    site = start(token="open-sesame")

    def f() -> str:
        return "inside"

    deployment = site.deploy(f)
    paths = [site.at(deployment), site.url + "/-/routes", site.url + "/nowhere"]
    for header in (None, "open-sesame", "Bearer", "Bearer open-sesam", "Basic x", "ü"):
        headers = [] if header is None else [(b"authorization", header.encode())]
        for url in paths:
            response = httpx.get(url, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert "inside" not in response.text
        assert httpx.get(site.url + "/-/healthz", headers=headers).text == "success"
    with httpx.Client(headers={"authorization": "Bearer open-sesame"}) as client:
        assert [client.get(url).status_code for url in paths] == [200, 200, 404]
    for scheme in ("bearer", "BEARER"):
        headers = [(b"authorization", f"{scheme} open-sesame".encode())]
        assert httpx.get(paths[0], headers=headers).text == "inside"
        headers = [(b"authorization", f"{scheme} Open-sesame".encode())]
        assert httpx.get(paths[0], headers=headers).status_code == 401
    # No other path can be had under the name of the one that is open.
    forwarded = {"X-Forwarded-Prefix": "/-"}
    assert httpx.get(site.url + "/-/healthz", headers=forwarded).status_code == 401
    assert "open-sesame" not in site.cluster.logs()


def test_token_with_middlewares(start: Callable[..., Site], notes: Notes) -> None:
    class Read:
        """Look at the body, as middlewares do that check signatures."""

        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                events = [await receive()]
                notes.add(f"{scope['method']} {events}")

                async def again() -> Any:
                    return events.pop() if events else await receive()

                return await self.app(scope, again, send)
            await self.app(scope, receive, send)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=["https://app"],
        allow_methods=["*"],
        allow_headers=["*"],
    )
    site = start(token="t", middlewares=[cors, Middleware(Read)])

    def inside(request: Request) -> str:
        notes.add("inside")
        return "inside"

    url = site.at(site.deploy(inside))
    origin = {"origin": "https://app"}
    ask = {"access-control-request-method": "PUT"}
    asked = {**ask, "access-control-request-headers": "authorization"}
    preflight = httpx.options(url, headers={**origin, **asked})
    assert preflight.status_code == 200
    allowed = preflight.headers["access-control-allow-headers"]
    assert "authorization" in allowed.lower() and "x-request-id" in preflight.headers
    for path in (url, f"{site.url}/-/routes", f"{site.url}/nowhere"):
        refused = httpx.post(path, headers=origin, content=b"secret")
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app"
        assert refused.headers["www-authenticate"] == "Bearer"
    # A body that is announced is not asked for.
    with send_request(
        url, "POST", "Content-Length: 9\r\nExpect: 100-continue\r\n"
    ) as s:
        assert read_head(s).startswith(b"HTTP/1.1 401 ")
    assert "inside" not in notes.read() and "secret" not in "".join(notes.read())
    token = {"authorization": "bearer t"}
    answer = httpx.get(url, headers={**origin, **token})
    assert answer.text == "inside"
    assert answer.headers["access-control-allow-origin"] == "https://app"
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    )
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    with send_request(url, headers=upgrade + key) as sock:
        assert read_all(sock).startswith(b"HTTP/1.1 401 ")
    assert notes.read().count("inside") == 1


def test_unix_socket(start: Callable[..., Site], tmp_path: Path) -> None:
    path = tmp_path / "serve.sock"
    site = start(uds=str(path))

    def f(request: Request) -> str:
        return request.url.path

    deployment = site.deploy(f)
    mode = os.stat(path)
    assert stat.S_ISSOCK(mode.st_mode)
    assert stat.S_IMODE(mode.st_mode) == 0o600
    assert str(path) in site.url
    with httpx.HTTPTransport(uds=str(path)) as transport:
        with httpx.Client(transport=transport, base_url="http://here") as client:
            assert client.get(f"/{deployment.name}/x").text == f"/{deployment.name}/x"
            assert client.get("/nowhere").status_code == 404
    site.instance.shutdown()
    assert not path.exists()


def test_https(start: Callable[..., Site], tmp_path: Path) -> None:
    temporary = Security.temporary()
    (tmp_path / "cert.pem").write_text(temporary.tls_client_cert)
    (tmp_path / "key.pem").write_text(temporary.tls_client_key)
    site = start(
        ssl_certfile=str(tmp_path / "cert.pem"), ssl_keyfile=str(tmp_path / "key.pem")
    )

    async def tell(request: Request) -> dict[str, Any]:
        return {"url": str(request.url), "size": len(await request.body())}

    deployment = site.deploy(tell)
    assert site.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    context.check_hostname = False
    with httpx.Client(verify=context) as client:
        response = client.post(site.at(deployment), content=b"x" * 300_000)
        assert response.json() == {"url": site.at(deployment), "size": 300_000}
    with pytest.raises(httpx.TransportError):
        httpx.get(site.url.replace("https", "http"))


def test_json_of_a_whole_conversation(site: Site) -> None:
    # Many requests on one connection, one after the other and pipelined.
    def echo(request: Request) -> str:
        return request.query_params["n"]

    url = site.at(site.deploy(echo))
    path = urlsplit(url).path
    with connect(url) as sock:
        for n in range(50):
            sock.sendall(f"GET {path}?n={n} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        last = f"GET {path}?n=50 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        sock.sendall(last.encode())
        data = read_all(sock).decode()
    bodies = re.findall(r"\r\n\r\n(\d+)(?:HTTP|$)", data)
    assert json.dumps([int(body) for body in bodies]) == json.dumps(list(range(51)))
