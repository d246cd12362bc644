"""Behind a real nginx and a real jupyter-server-proxy: paths, URLs, streams."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import websockets
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

import daskserve as serve
from tests.fronts import SAY, run_jupyter, run_nginx
from tests.test_http import (
    Gate,
    Notes,
    Site,
    check_docs,
    check_pages,
    echo_scope,
    gate,
    make_api,
    make_pages,
    notes,
    spare,
    start,
)
from tests.utils import free_port, write_certificate

__all__ = ["gate", "notes", "spare", "start"]  # fixtures

pytestmark = pytest.mark.slow

MB = 2**20


@serve.ingress(make_pages)
class Pages: ...


@serve.ingress(make_api)
class Api: ...


@serve.ingress(echo_scope)
class Echo: ...


def make_sockets() -> FastAPI:
    app = FastAPI()

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        wanted = websocket.scope["subprotocols"]
        await websocket.accept(subprotocol=wanted[0] if wanted else None)
        await websocket.send_text(
            f"{websocket.url} {websocket.url_for('page')} {websocket.client[0]}"  # type: ignore[index]
        )
        while (message := await websocket.receive())["type"] == "websocket.receive":
            if message.get("text") == "close":
                return await websocket.close(4001, "so long")
            await websocket.send({**message, "type": "websocket.send"})

    @app.websocket("/refuse")
    async def refuse(websocket: WebSocket) -> None:
        await websocket.close()

    @app.get("/page")
    async def page() -> None: ...

    return app


@serve.ingress(make_sockets)
class Sockets: ...


def deploy_all(site: Site) -> None:
    site.deploy(Pages, route_prefix="/pages")
    site.deploy(Api, route_prefix="/api", where="near")
    site.deploy(Echo, route_prefix="/echo", where="far")
    site.deploy(Sockets, route_prefix="/sockets")


def check_all(url: str, root: str = "", verify: Any = True) -> None:
    """Check all that `deploy_all` deploys, as `root` of the server in front."""
    check_pages(url, f"{root}/pages", verify=verify)
    check_docs(url, f"{root}/api", verify=verify)
    with httpx.Client(follow_redirects=True, verify=verify) as client:
        for start in ("/slash", "", "/"):
            end = client.get(f"{url}{root}/pages{start}")
            assert (end.status_code, end.text) == (200, "root")
        missing = client.get(f"{url}{root}/none")
        assert missing.status_code == 404
        scope = client.get(f"{url}{root}/echo/x%20y/z?q=%20").json()
    assert scope["path"] == f"{root}/echo/x y/z"
    assert scope["raw_path"] == f"{root}/echo/x%20y/z"
    assert scope["query_string"] == "q=%20"
    assert scope["root_path"] == f"{root}/echo"
    assert scope["scheme"] == urlsplit(url).scheme
    assert ["host", urlsplit(url).netloc] in scope["headers"]


WANTED = [Subprotocol("one"), Subprotocol("two")]


UPGRADE = {
    "connection": "upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def _talk(url: str, shown: str, verify: Any) -> None:
    at = url.replace("http", "ws", 1)
    options: Any = {"max_size": None, "ssl": verify if at[:3] == "wss" else None}
    async with asyncio.timeout(30):
        async with websockets.connect(
            f"{at}/echo",
            subprotocols=WANTED,
            **options,
        ) as socket:
            assert socket.subprotocol == "one"
            seen = shown.replace("http", "ws", 1)
            assert await socket.recv() == f"{seen}/echo {shown}/page 127.0.0.1"
            for message in ("text", "ü" * 1000, "", b"bytes", b"x" * 3_000_000):
                await socket.send(message)
                assert await socket.recv() == message
            await socket.send("close")
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            await socket.wait_closed()
        # jupyter-server-proxy does not pass on why a socket was closed.
        if "/proxy/" not in url:
            end = closed.value.rcvd
            assert end is not None and (end.code, end.reason) == (4001, "so long")


def check_sockets(url: str, shown: str | None = None, verify: Any = True) -> None:
    """Talk to ``/sockets``; `shown` is where the app thinks it is, if elsewhere."""
    asyncio.run(_talk(url, shown or url, verify))
    if "/proxy/" not in url:  # which accepts before it asks
        refused = httpx.get(f"{url}/refuse", headers=UPGRADE, verify=verify)
        assert refused.status_code == 403


def host(site: Site) -> str:
    return urlsplit(site.url).netloc


# nginx: the prefix.

STRIPS = "location /serve/ { proxy_pass http://daskserve/; }"
KEEPS = "location /serve { proxy_pass http://daskserve; }"
SAYS = (
    "location /serve/ { proxy_pass http://daskserve/; "
    f"proxy_set_header X-Forwarded-Prefix /serve; {SAY} }}"
)


@pytest.mark.parametrize(
    ("location", "options"),
    [
        (STRIPS, {"root_path": "/serve"}),
        (KEEPS, {"root_path": "/serve"}),
        (SAYS, {}),
        (SAYS, {"root_path": "/another"}),
    ],
    ids=["strips", "keeps", "says", "says another"],
)
def test_prefix(
    start: Callable[..., Site], tmp_path: Path, location: str, options: dict[str, str]
) -> None:
    site = start(**options)
    deploy_all(site)
    with run_nginx(tmp_path, host(site), location) as url:
        check_all(url, "/serve")
        check_sockets(f"{url}/serve/sockets")
        missing = httpx.get(f"{url}/serve/none/x")
        assert missing.text.startswith("Path '/none/x' not found.")
        routes = httpx.get(f"{url}/serve/-/routes").json()
        assert set(routes) == {"/pages", "/api", "/echo", "/sockets"}


@pytest.mark.parametrize("location", [STRIPS, KEEPS], ids=["strips", "keeps"])
def test_prefix_of_the_catch_all(
    start: Callable[..., Site], tmp_path: Path, location: str
) -> None:
    site = start(root_path="/serve")
    site.deploy(Pages, route_prefix="/")
    if location is STRIPS:  # nginx answers this one itself, without the port
        location += "location = /serve { proxy_pass http://daskserve/serve; }"
    with run_nginx(tmp_path, host(site), location) as url:
        check_pages(url, "/serve")
        assert httpx.get(f"{url}/serve/-/healthz").text == "success"


def test_prefix_with_other_characters(
    start: Callable[..., Site], tmp_path: Path
) -> None:
    location = SAYS.replace("Prefix /serve", "Prefix /m%C3%BC@x")
    location = location.replace("/serve/", '"/mü@x/"')
    site = start()
    site.deploy(Echo, route_prefix="/echo")
    with run_nginx(tmp_path, host(site), location) as url:
        scope = httpx.get(f"{url}/m%C3%BC@x/echo/%C3%BC").json()
    assert scope["path"] == "/mü@x/echo/ü"
    assert scope["raw_path"] == "/m%C3%BC@x/echo/%C3%BC"
    assert scope["root_path"] == "/mü@x/echo"


# nginx: who is believed.


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return write_certificate(tmp_path)


def test_https_at_nginx(
    start: Callable[..., Site], tmp_path: Path, certificate: Path
) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    location = f"location / {{ proxy_pass http://daskserve; {SAY} }} {SAYS}"
    site = start()
    deploy_all(site)
    with run_nginx(tmp_path, host(site), location, certificate) as url:
        assert url.startswith("https://")
        for root in ("", "/serve"):
            check_all(url, root, verify=context)
            check_sockets(f"{url}{root}/sockets", verify=context)
        missing = httpx.get(f"{url}/none", verify=context).text
        assert f"{url}/-/routes" in missing


#: Says that it has stripped /serve and ended TLS, for a client elsewhere.
CLAIMS = """
    location / {
        proxy_pass http://daskserve;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-Prefix /serve;
        proxy_set_header X-Forwarded-Proto https;
        proxy_set_header X-Forwarded-For "198.51.100.1, 192.0.2.7";
        proxy_bind 127.0.0.2;
    }
"""


@pytest.mark.parametrize("trusted", [None, [], ["127.0.0.2"], ["127.0.0.0/8", "::1"]])
def test_trusted_proxies(
    start: Callable[..., Site], tmp_path: Path, trusted: list[str] | None
) -> None:
    site = start(**({} if trusted is None else {"trusted_proxies": trusted}))
    site.deploy(Echo, route_prefix="/echo")
    with run_nginx(tmp_path, host(site), CLAIMS) as url:
        scope = httpx.get(f"{url}/echo").json()
        missing = httpx.get(f"{url}/none").text
    found = scope["client"][0], scope["scheme"], scope["root_path"]
    if trusted:
        assert found == ("192.0.2.7", "https", "/serve/echo")
        assert "https://" in missing
    else:
        assert found == ("127.0.0.2", "http", "/echo")
        assert "https://" not in missing


def test_unix_socket(
    start: Callable[..., Site], tmp_path: Path, certificate: Path
) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    path = tmp_path / "serve.sock"
    site = start(uds=str(path))
    deploy_all(site)
    with run_nginx(tmp_path, f"unix:{path}", SAYS, certificate) as url:
        check_all(url, "/serve", verify=context)
        check_sockets(f"{url}/serve/sockets", verify=context)


# nginx: bodies and connections.


def make_streams(gate: Gate, notes: Notes) -> Callable[[], FastAPI]:
    def make() -> FastAPI:
        app = FastAPI()

        @app.put("/upload")
        async def upload(request: Request) -> int:
            size = 0
            async for chunk in request.stream():
                if not size:
                    notes.add("first")
                size += len(chunk)
            return size

        @app.get("/events")
        async def events() -> StreamingResponse:
            async def each() -> AsyncIterator[str]:
                yield "data: one\n\n"
                await gate.wait()
                yield "data: two\n\n"

            return StreamingResponse(each(), media_type="text/event-stream")

        @app.get("/many")
        async def many() -> StreamingResponse:
            async def each() -> AsyncIterator[bytes]:
                for n in range(64):
                    yield bytes([n]) * (MB // 4)

            return StreamingResponse(each())

        return app

    return make


STREAMS = """
    client_max_body_size 40m;
    location / { proxy_pass http://daskserve; proxy_request_buffering %s; }
    location /streams/events { proxy_pass http://daskserve; proxy_buffering off; }
    location /streams/many { proxy_pass http://daskserve; proxy_buffering off; }
"""


@pytest.mark.parametrize("buffering", ["on", "off"])
def test_streams(
    start: Callable[..., Site], tmp_path: Path, gate: Gate, notes: Notes, buffering: str
) -> None:
    site = start()

    @serve.ingress(make_streams(gate, notes))
    class Streams: ...

    site.deploy(Streams, route_prefix="/streams")

    def body(size: int) -> Iterator[bytes]:
        yield b"x" * MB
        if buffering == "off":  # the app has the beginning before there is more
            notes.wait("first")
        for _ in range(size // MB - 1):
            yield b"x" * MB

    with run_nginx(tmp_path, host(site), STREAMS % buffering) as url:
        url += "/streams"
        with httpx.Client(timeout=30) as client:
            for headers in ({}, {"content-length": str(30 * MB)}):
                Path(notes.path).unlink(missing_ok=True)
                sent = client.put(
                    f"{url}/upload", content=body(30 * MB), headers=headers
                )
                assert (sent.status_code, sent.text) == (200, str(30 * MB)), headers
            refused = client.put(f"{url}/upload", content=b"x" * 41 * MB)
            assert refused.status_code == 413
            assert "nginx" in refused.text
            with client.stream("GET", f"{url}/events") as response:
                lines = response.iter_lines()
                assert next(lines) == "data: one"
                gate.open()
                assert [line for line in lines if line] == ["data: two"]
            many = client.get(f"{url}/many").content
            assert many == b"".join(bytes([n]) * (MB // 4) for n in range(64))


async def read_nothing(request: Request) -> str:
    return "so long"


@pytest.mark.parametrize("buffering", ["on", "off"])
def test_answers_to_bodies_that_nobody_reads(
    start: Callable[..., Site], tmp_path: Path, buffering: str
) -> None:
    site = start(max_request_body_bytes=8 * MB)
    deployment = site.deploy(read_nothing)
    with run_nginx(tmp_path, host(site), STREAMS % buffering) as url:
        url += f"/{deployment.name}"
        for _ in range(5):
            # On new connections: nginx ends one on which it had an early answer, and
            # may have said before that it can be used again.
            refused = httpx.put(url, content=b"x" * 9 * MB, timeout=30)
            assert refused.status_code == 413
            assert "nginx" not in refused.text
            answered = httpx.put(url, content=b"x" * 7 * MB, timeout=30)
            assert (answered.status_code, answered.text) == (200, "so long")


def test_connections_are_kept(start: Callable[..., Site], tmp_path: Path) -> None:
    site = start()
    site.deploy(Echo, route_prefix="/echo")
    location = "location / { proxy_pass http://daskserve; }"
    with run_nginx(tmp_path, host(site), location) as url:
        with httpx.Client(base_url=url) as client:
            peers = {tuple(client.get("/echo").json()["client"]) for _ in range(20)}
            assert len(peers) == 1
            # An error of daskserve's own ends no connection that can go on.
            assert client.get("/none").status_code == 404
            assert tuple(client.get("/echo").json()["client"]) in peers


# Jupyter.


def test_jupyter(start: Callable[..., Site], tmp_path: Path, gate: Gate) -> None:
    site = start()
    deploy_all(site)
    port = urlsplit(site.url).port
    with run_jupyter(tmp_path, "/user/me@x/") as url:
        at, root = url.removesuffix("/user/me@x"), f"/user/me@x/proxy/{port}"
        check_all(at, root)
        # It does not tell sockets what it has stripped.
        check_sockets(f"{at}{root}/sockets", shown=f"{at}/sockets")
        assert httpx.get(f"{at}{root}/-/healthz").text == "success"


def test_jupyter_streams(
    start: Callable[..., Site], tmp_path: Path, gate: Gate, notes: Notes
) -> None:
    site = start()

    @serve.ingress(make_streams(gate, notes))
    class Streams: ...

    site.deploy(Streams, route_prefix="/streams")
    with run_jupyter(tmp_path, "/") as url:
        url += f"/proxy/{urlsplit(site.url).port}/streams"
        body = b"x" * 20 * MB
        assert httpx.put(f"{url}/upload", content=body, timeout=30).text == "20971520"
        accept = {"accept": "text/event-stream"}  # what makes it pass on what it has
        with httpx.stream("GET", f"{url}/events", headers=accept) as response:
            lines = response.iter_lines()
            assert next(lines) == "data: one"
            gate.open()
            assert [line for line in lines if line] == ["data: two"]


def test_jupyter_that_keeps_the_prefix(
    start: Callable[..., Site], tmp_path: Path
) -> None:
    port = free_port()
    root = f"/user/me/proxy/absolute/{port}"
    site = start(port=port, root_path=root)
    deploy_all(site)
    with run_jupyter(tmp_path, "/user/me") as url:
        at = url.removesuffix("/user/me")
        check_all(at, root)
        check_sockets(f"{at}{root}/sockets")
