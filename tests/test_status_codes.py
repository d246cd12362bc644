"""The status that an HTTP client gets when what a deployment calls goes wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request

import daskserve as serve
from daskserve.exceptions import (
    DeploymentUnavailableError,
    QueueFullError,
    RequestTimeoutError,
)
from daskserve.transport.values import request_error
from tests.test_http import Site, open_site
from tests.utils import poll

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as made:
        yield made


@pytest.fixture(autouse=True)
def _clean(site: Site) -> Iterator[None]:
    keep = len(site.deployed)
    yield
    site.clean(keep)


class Inner:
    """What can go wrong one call further."""

    async def late(self) -> None:
        await asyncio.sleep(5)

    async def full(self) -> None:
        raise QueueFullError("the queue behind is full")

    async def gone(self) -> None:
        await serve.DeploymentHandle("Nobody").remote()

    async def picky(self) -> None:
        raise HTTPException(418, "I am a teapot")

    async def broken(self) -> None:
        raise OSError("secret")


class Plain:
    def __init__(self, inner: str) -> None:
        self.inner = serve.get_deployment_handle(inner)

    async def __call__(self, request: Request) -> Any:
        method = request.path_params.get("method") or request.query_params["method"]
        try:
            return await getattr(self.inner, method).remote()
        except RequestTimeoutError:
            if "catch" in request.query_params:
                return "caught"
            raise


class Sync(Plain):
    def __call__(self, request: Request) -> Any:  # type: ignore[override]
        return getattr(self.inner, request.query_params["method"]).remote().result()


class Grouped(Plain):
    async def __call__(self, request: Request) -> Any:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(super().__call__(request))


async def _pass_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


def make_fastapi(middleware: bool = False, handler: bool = False) -> type:
    wrapped = [Middleware(BaseHTTPMiddleware, dispatch=_pass_on)] if middleware else []
    app = FastAPI(middleware=wrapped)
    if handler:

        @app.exception_handler(Exception)
        async def handle(request: Request, error: Exception) -> Any:
            from starlette.responses import PlainTextResponse

            return PlainTextResponse("mine", status_code=500)

    @serve.ingress(app)
    class WithApp(Plain):
        @app.get("/")
        async def ask(self, request: Request) -> Any:
            return await Plain.__call__(self, request)

    return WithApp


STYLES = {
    "plain": Plain,
    "sync": Sync,
    "group": Grouped,
    "fastapi": make_fastapi(),
    "middleware": make_fastapi(middleware=True),
}


@pytest.mark.parametrize("style", STYLES)
def test_what_fails_inside_keeps_its_status(site: Site, style: str) -> None:
    inner = site.deploy(Inner, route_prefix=None, request_timeout_s=0.2)
    outer = site.deploy(STYLES[style], inner.name)

    def ask(method: str, **params: Any) -> httpx.Response:
        params["method"] = method
        return httpx.get(site.at(outer, "/"), params=params, timeout=20)

    answer = ask("late")
    assert answer.status_code == 504
    assert inner.name in answer.text
    answer = ask("full")
    assert (answer.status_code, answer.text) == (503, "the queue behind is full")
    assert answer.headers["retry-after"] == "1"
    assert ask("gone").status_code == 503
    answer = ask("broken")
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    if style in ("plain", "fastapi"):
        assert ask("picky").status_code == 418
        assert "caught" in ask("late", catch="1").text
    if style not in ("fastapi", "middleware"):
        head = httpx.head(site.at(outer, "/"), params={"method": "full"})
        assert head.status_code == 503


def test_an_app_with_a_handler_of_its_own_answers_itself(site: Site) -> None:
    inner = site.deploy(Inner, route_prefix=None)
    outer = site.deploy(make_fastapi(handler=True), inner.name)
    answer = httpx.get(site.at(outer, "/"), params={"method": "full"})
    assert (answer.status_code, answer.text) == (500, "mine")


def test_errors_of_a_task_group() -> None:
    full, late = QueueFullError("full"), RequestTimeoutError("late")
    assert request_error(ExceptionGroup("", [full, late])) is full
    assert request_error(ExceptionGroup("", [ExceptionGroup("", [late])])) is late
    assert request_error(ExceptionGroup("", [full, OSError()])) is None
    assert request_error(OSError()) is None


class Counting:
    """Generators that raise before they yield."""

    async def _check(self, request: Request) -> None:
        if "n" not in request.query_params:
            raise HTTPException(422, "say n", headers={"x-why": "n"})

    async def __call__(self, request: Request) -> AsyncIterator[str]:
        await self._check(request)
        for i in range(int(request.query_params["n"])):
            yield f"{i}\n"


class SyncCounting:
    def __call__(self, request: Request) -> Iterator[str]:
        if "n" not in request.query_params:
            raise HTTPException(422, "say n", headers={"x-why": "n"})
        for i in range(int(request.query_params["n"])):
            yield f"{i}\n"


class MapCounting:
    """An iterator that is no generator."""

    def __call__(self, request: Request) -> Iterator[str]:
        if "n" not in request.query_params:
            raise HTTPException(422, "say n", headers={"x-why": "n"})
        return map("{}\n".format, range(int(request.query_params["n"])))


@pytest.mark.parametrize("target", [Counting, SyncCounting, MapCounting])
def test_a_generator_that_raises_before_its_first_item(site: Site, target: Any) -> None:
    url = site.at(site.deploy(target))
    assert httpx.get(url, params={"n": 3}).text == "0\n1\n2\n"
    answer = httpx.get(url, params={"n": 0})
    assert (answer.status_code, answer.text) == (200, "")
    answer = httpx.get(url)
    assert (answer.status_code, answer.text) == (422, "say n")
    assert answer.headers["x-why"] == "n"
    assert httpx.get(url, params={"n": "x"}).status_code == 500


def test_a_generator_that_calls_what_fails(site: Site) -> None:
    inner = site.deploy(Inner, route_prefix=None)

    class Stream:
        def __init__(self, name: str) -> None:
            self.inner = serve.get_deployment_handle(name)

        async def __call__(self, request: Request) -> AsyncIterator[str]:
            await self.inner.full.remote()
            yield "never"

    answer = httpx.get(site.at(site.deploy(Stream, inner.name)))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_form_data_that_is_malformed(site: Site) -> None:
    class Form:
        async def __call__(self, request: Request) -> Any:
            return sorted((await request.form()).keys())

    url = site.at(site.deploy(Form))
    assert httpx.post(url, files={"a": b"1"}).json() == ["a"]
    headers = {"content-type": "multipart/form-data"}
    answer = httpx.post(url, content=b"odd", headers=headers)
    assert (answer.status_code, answer.text) == (400, "Missing boundary in multipart.")


class Opening:
    """One that starts once there is a file."""

    def __init__(self, gate: str) -> None:
        while not Path(gate).exists():
            time.sleep(0.02)

    async def __call__(self) -> str:
        return "open"


def test_while_the_first_version_starts(site: Site, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    opening = site.make(Opening, request_timeout_s=0.5)
    url = site.at(opening)
    assert httpx.get(url).status_code == 404
    thread = threading.Thread(target=opening.deploy, args=[str(gate)])
    thread.start()
    try:
        poll(lambda: httpx.get(url).status_code != 404)
        answer = httpx.get(url)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "had no replica within 0.5 s: 0 of 1 replicas running" in answer.text
        with pytest.raises(DeploymentUnavailableError, match="0 of 1 replicas"):
            opening.get_handle().remote().result(timeout_s=10)
        began = time.monotonic()
        headers = {"x-request-timeout-seconds": "0.1"}
        assert httpx.get(url, headers=headers).status_code == 503
        assert time.monotonic() - began < 0.4
    finally:
        gate.touch()
        thread.join()
    assert httpx.get(url).text == "open"


def test_a_first_version_that_fails(site: Site) -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no disk")

    broken = site.make(Broken)
    with pytest.raises(RuntimeError, match="no disk"):
        broken.deploy()
    answer = httpx.get(site.at(broken))
    assert answer.status_code == 503
    assert "failed to deploy" in answer.text


@pytest.mark.parametrize("style", ["plain", "fastapi", "handle"])
def test_a_request_that_names_no_model(site: Site, style: str) -> None:
    app = FastAPI()

    class Models:
        @serve.multiplexed
        async def load(self, model_id: str) -> str:
            if model_id == "unknown":
                raise HTTPException(404, f"no model {model_id}")
            return model_id

        @app.get("/")
        async def ask(self) -> str:
            return await self.load()  # type: ignore[call-arg]

        async def __call__(self) -> str:
            return await self.load(serve.get_multiplexed_model_id())

    class Caller:
        def __init__(self, name: str) -> None:
            self.models = serve.get_deployment_handle(name)

        async def __call__(self, request: Request) -> Any:
            model_id = request.headers.get("serve_multiplexed_model_id", "")
            return await self.models.options(multiplexed_model_id=model_id).remote()

    if style == "fastapi":
        url = site.at(site.deploy(serve.ingress(app)(Models)), "/")
    else:
        models = site.deploy(Models)
        url = site.at(models)
        if style == "handle":
            url = site.at(site.deploy(Caller, models.name))

    def ask(**headers: str) -> httpx.Response:
        return httpx.get(url, headers=headers)

    assert "a" in ask(serve_multiplexed_model_id="a").text
    assert ask(serve_multiplexed_model_id="unknown").status_code == 404
    answer = ask()
    assert answer.status_code == 400
    assert "serve_multiplexed_model_id" in answer.text
