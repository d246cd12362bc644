"""WebSockets through proxy and replica, in one process and in two."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import websockets
from fastapi import FastAPI, WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

import daskserve as serve
from tests.inside import idle_inside, wait_for_idle
from tests.test_http import (
    Notes,
    Site,
    _site,
    near_and_far,
    notes,
    site,
    spare,
    start,
)
from tests.test_streaming import BUFFERS, settled
from tests.utils import ProcessCluster, poll

__all__ = ["_site", "notes", "site", "spare", "start"]  # fixtures


def make_app() -> FastAPI:
    app = FastAPI()

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        wanted = websocket.scope["subprotocols"]
        await websocket.accept(
            subprotocol=wanted[-1] if wanted else None, headers=[(b"x-app", b"1")]
        )
        while (message := await websocket.receive())["type"] == "websocket.receive":
            if message.get("text") == "close":
                await websocket.close(4001, "so long")
                return
            if message.get("text") == "raise":
                raise LookupError("on purpose")
            if message.get("text") == "nonsense":
                await websocket.send({"type": "websocket.send", "text": object()})
            if message.get("text") == "where":
                await websocket.send_text(
                    f"{websocket.url.path} {websocket.scope['root_path']} "
                    f"{serve.get_replica_context().request_id}"
                )
                continue
            await websocket.send({**message, "type": "websocket.send"})

    @app.websocket("/refuse")
    async def refuse(websocket: WebSocket) -> None:
        await websocket.close()

    @app.websocket("/fail")
    async def fail(websocket: WebSocket) -> None:
        raise LookupError("before accept")

    @app.websocket("/number/{n}")
    async def number(websocket: WebSocket, n: int) -> None:
        await websocket.accept()

    @app.get("/")
    async def get() -> str:
        return "http"

    return app


@serve.ingress(make_app)
class Sockets: ...


def run(
    site: Site, path: str, test: Callable[[str], Coroutine[Any, Any, None]]
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test(path.replace("http://", "ws://"))

    asyncio.run(bounded())


@near_and_far
def test_messages_both_ways(site: Site, where: str) -> None:
    async def talk(url: str) -> None:
        async with websockets.connect(url, max_size=None) as socket:
            for message in ("text", "ü" * 1000, "", b"bytes", b"", b"x" * 3_000_000):
                await socket.send(message)
                assert await socket.recv() == message
            for n in range(500):
                await socket.send(str(n))
            assert [await socket.recv() for _ in range(500)] == [
                str(n) for n in range(500)
            ]

    deployment = site.deploy(Sockets, where=where)
    run(site, site.at(deployment, "/echo"), talk)


@near_and_far
def test_handshake(site: Site, where: str) -> None:
    async def shake(url: str) -> None:
        async with websockets.connect(
            url, subprotocols=["a", "b"], additional_headers={"x-request-id": "ws-1"}
        ) as socket:
            assert socket.subprotocol == "b"
            headers = socket.response.headers  # type: ignore[union-attr]
            assert (headers["x-app"], headers["x-request-id"]) == ("1", "ws-1")
            await socket.send("where")
            prefix = f"/{deployment.name}"
            assert await socket.recv() == f"{prefix}/echo {prefix} ws-1"

    deployment = site.deploy(Sockets, where=where)
    run(site, site.at(deployment, "/echo"), shake)


@pytest.mark.parametrize("path", ["/refuse", "/nothing"])
@near_and_far
def test_refused_before_accept(site: Site, where: str, path: str) -> None:
    async def connect(url: str) -> None:
        with pytest.raises(InvalidStatus) as info:
            await websockets.connect(url)
        assert info.value.response.status_code == 403

    run(site, site.at(site.deploy(Sockets, where=where), path), connect)


def test_no_route(site: Site) -> None:
    async def connect(url: str) -> None:
        with pytest.raises(InvalidStatus) as info:
            await websockets.connect(url)
        assert info.value.response.status_code == 403

    run(site, f"{site.url}/nobody/echo", connect)


def test_a_plain_callable_refuses(site: Site) -> None:
    async def connect(url: str) -> None:
        with pytest.raises(InvalidStatus) as info:
            await websockets.connect(url)
        assert info.value.response.status_code == 403

    run(site, site.at(site.deploy(lambda: "plain", name="plain")), connect)


@near_and_far
def test_an_app_that_fails_before_accept(site: Site, where: str) -> None:
    async def connect(url: str) -> None:
        with pytest.raises(InvalidStatus) as info:
            await websockets.connect(url)
        assert info.value.response.status_code == 500

    run(site, site.at(site.deploy(Sockets, where=where), "/fail"), connect)


@near_and_far
def test_a_refusal_with_whatever_for_a_reason(site: Site, where: str) -> None:
    """FastAPI gives a list of errors; nobody gets to see it, here or elsewhere."""

    async def connect(url: str) -> None:
        with pytest.raises(InvalidStatus) as info:
            await websockets.connect(url)
        assert info.value.response.status_code == 403

    run(site, site.at(site.deploy(Sockets, where=where), "/number/x"), connect)


@near_and_far
def test_what_the_app_gets_after_it_has_closed(
    site: Site, where: str, notes: Notes
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            if scope["path"].endswith("/accept"):
                await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 4001, "reason": "enough"})
            event = await receive()
            notes.add(f"{event['code']} {event['reason']!r}")
            try:
                await send({"type": "websocket.send", "text": "too late"})
            except RuntimeError:
                notes.add("told so")

    @serve.ingress(app)
    class Closes: ...

    async def accepted(url: str) -> None:
        async with websockets.connect(url) as socket:
            with pytest.raises(ConnectionClosed):
                await socket.recv()

    async def refused(url: str) -> None:
        with pytest.raises(InvalidStatus):
            await websockets.connect(url)

    deployment = site.deploy(Closes, where=where)
    run(site, site.at(deployment, "/accept"), accepted)
    poll(lambda: notes.read() == ["4001 'enough'", "told so"])
    run(site, site.at(deployment, "/refuse"), refused)
    poll(lambda: notes.read()[2:] == ["1006 ''", "told so"])


@near_and_far
def test_close_codes_of_the_app(site: Site, where: str) -> None:
    async def close(url: str) -> None:
        async with websockets.connect(url) as socket:
            await socket.send("close")
            with pytest.raises(ConnectionClosed) as info:
                await socket.recv()
            assert info.value.rcvd is not None
            assert (info.value.rcvd.code, info.value.rcvd.reason) == (4001, "so long")

    run(site, site.at(site.deploy(Sockets, where=where), "/echo"), close)


@near_and_far
def test_an_app_that_fails_closes(site: Site, where: str) -> None:
    async def fail(url: str) -> None:
        async with websockets.connect(url) as socket:
            await socket.send("raise")
            with pytest.raises(ConnectionClosed):
                await socket.recv()

    deployment = site.deploy(Sockets, where=where)
    run(site, site.at(deployment, "/echo"), fail)
    assert httpx.get(site.at(deployment, "/")).json() == "http"


@near_and_far
def test_nonsense_harms_nobody_else(site: Site, where: str) -> None:
    async def talk(url: str) -> None:
        async with websockets.connect(url) as socket, websockets.connect(url) as other:
            await socket.send("nonsense")
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            await other.send("still here")
            assert await other.recv() == "still here"

    deployment = site.deploy(Sockets, where=where)
    run(site, site.at(deployment, "/echo"), talk)


@near_and_far
def test_one_too_many_is_refused_at_once_and_takes_no_place_of_requests(
    site: Site, where: str
) -> None:
    deployment = site.deploy(
        Sockets, where=where, max_websockets=1, max_ongoing_requests=1
    )

    async def leave(url: str) -> None:
        async with websockets.connect(url) as first:
            await first.send("here")
            assert await first.recv() == "here"
            for _ in range(3):
                with pytest.raises(websockets.InvalidStatus) as refused:
                    await websockets.connect(url)
                response = refused.value.response
                assert response.status_code == 503
                assert b"max_websockets=1" in (response.body or b"")
            async with httpx.AsyncClient(timeout=10) as client:
                # An app that has no such path, but answers.
                answer = await client.get(url.replace("ws:", "http:"))
                assert answer.status_code == 404
        async with asyncio.timeout(10):
            while True:  # the server sees in a moment that it has gone
                with suppress(InvalidStatus):
                    async with websockets.connect(url) as last:
                        await last.send("served")
                        assert await last.recv() == "served"
                    return

    run(site, site.at(deployment, "/echo"), leave)


@near_and_far
def test_the_app_sees_how_the_client_closed(
    site: Site, where: str, notes: Notes
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            assert (await receive())["type"] == "websocket.connect"
            await send({"type": "websocket.accept"})
            event = await receive()
            notes.add(f"{event['code']} {event.get('reason')}")

    @serve.ingress(app)
    class Watcher: ...

    async def leave(url: str) -> None:
        socket = await websockets.connect(url)
        await socket.close(4002, "enough")

    run(site, site.at(site.deploy(Watcher, where=where)), leave)
    notes.wait("4002 enough")


@near_and_far
def test_a_replica_that_stops_says_goodbye(site: Site, where: str) -> None:
    deployment = site.deploy(Sockets, where=where)

    async def stay(url: str) -> None:
        async with websockets.connect(url) as socket:
            await socket.send("hello")
            await socket.recv()
            deleting = asyncio.create_task(asyncio.to_thread(deployment.delete))
            with pytest.raises(ConnectionClosed) as info:
                await socket.recv()
            assert info.value.rcvd is not None and info.value.rcvd.code == 1001
            await deleting

    run(site, site.at(deployment, "/echo"), stay)


@near_and_far
def test_sockets_hold_their_places_until_they_close(site: Site, where: str) -> None:
    deployment = site.deploy(Sockets, where=where, max_ongoing_requests=2)

    async def hold(url: str) -> None:
        for _ in range(3):
            async with websockets.connect(url) as one, websockets.connect(url) as two:
                for socket in (one, two):
                    await socket.send("here")
                    assert await socket.recv() == "here"

    for _ in range(2):
        run(site, site.at(deployment, "/echo"), hold)
    assert poll(lambda: httpx.get(site.at(deployment, "/")).status_code == 200)


@near_and_far
def test_many_sockets_and_http_beside_them(site: Site, where: str) -> None:
    deployment = site.deploy(Sockets, where=where, max_ongoing_requests=300)

    async def one(url: str, n: int) -> None:
        async with websockets.connect(url, open_timeout=20) as socket:
            for i in range(10):
                await socket.send(f"{n}-{i}")
                assert await socket.recv() == f"{n}-{i}"

    async def crowd(url: str) -> None:
        sockets = [asyncio.create_task(one(url, n)) for n in range(100)]
        async with httpx.AsyncClient(timeout=10) as client:
            for _ in range(20):
                answer = await client.get(site.at(deployment, "/"))
                assert answer.json() == "http"
        await asyncio.gather(*sockets)

    run(site, site.at(deployment, "/echo"), crowd)


def _ping_often() -> None:
    from daskserve.proxy import server, websocket_protocol

    server.PING_INTERVAL_S = server.PING_TIMEOUT_S = 0.3
    websocket_protocol.GOODBYE_S = 0.3


def handshake(site: Site, url: str, receive_buffer: int = 4096) -> socket.socket:
    """Open a WebSocket by hand; whoever does not read soon holds up the sender."""
    parts = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(10)
    sock.connect((parts.hostname, parts.port))
    sock.sendall(
        f"GET {parts.path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert b" 101 " in head, head
    return sock


class Counting:
    """An app that counts what it sends or has received, as the path says."""

    def __init__(self) -> None:
        self.bytes = 0
        self.may_receive = False

    async def serve(self, websocket: WebSocket, path: str) -> None:
        await websocket.accept()
        while path == "send":
            await websocket.send_bytes(bytes(64 * 1024))
            self.bytes += 64 * 1024
        while not self.may_receive:
            await asyncio.sleep(0.01)
        async for data in websocket.iter_bytes():
            self.bytes += len(data)

    def count(self) -> int:
        return self.bytes

    async def receive(self) -> None:
        self.may_receive = True


counting = FastAPI()


@counting.websocket("/{path}")
async def count(websocket: WebSocket, path: str) -> None:
    await serve.get_replica_context().servable_object.serve(websocket, path)


@serve.ingress(counting)
class CountingApp(Counting): ...


@near_and_far
def test_a_client_that_never_reads_ends(
    start: Callable[..., Site], where: str, spare: ProcessCluster
) -> None:
    """Its kernel acknowledges everything, but nobody answers the pings."""
    with spare.client(set_as_default=False) as client:
        client.run(_ping_often)
    site = start()
    deployment = site.deploy(CountingApp, where=where)
    deployment.get_handle().count.remote().result(timeout_s=5)  # its connections stay
    idle = idle_inside(site)
    for path in ("/send", "/receive"):
        with handshake(site, site.at(deployment, path)):
            if path == "/receive":  # it has the app's attention, but says nothing
                deployment.get_handle().receive.remote().result(timeout_s=5)
            wait_for_idle(site, idle)


@near_and_far
def test_a_client_that_never_reads_stops_the_app(site: Site, where: str) -> None:
    deployment = site.deploy(CountingApp, where=where)
    handle = deployment.get_handle()
    with handshake(site, site.at(deployment, "/send")) as sock:
        sent = settled(lambda: handle.count.remote().result(timeout_s=5))
        assert 2**20 <= sent < BUFFERS
        read = 0
        while read < sent + 2**20:
            read += len(sock.recv(2**20))
        assert handle.count.remote().result(timeout_s=5) > sent


@near_and_far
def test_an_app_that_never_receives_stops_the_client(site: Site, where: str) -> None:
    deployment = site.deploy(CountingApp, where=where)
    handle = deployment.get_handle()
    size = 50_000
    frame = b"\x82\xfe" + size.to_bytes(2, "big") + bytes(4 + size)
    with handshake(site, site.at(deployment, "/receive")) as sock:
        sock.setblocking(False)
        sent = 0

        def send() -> int:
            nonlocal sent
            with suppress(BlockingIOError):
                while sent < 2 * BUFFERS:
                    sent += sock.send(frame[sent % len(frame) :])
            return sent

        stuck_at = settled(send)
        assert 2**20 <= stuck_at < BUFFERS
        handle.receive.remote().result(timeout_s=5)
        poll(lambda: send() > stuck_at + 2**20)
        whole = sent // len(frame) * size
        poll(lambda: handle.count.remote().result(timeout_s=5) >= whole)


def test_a_handshake_larger_than_websockets_takes(site: Site) -> None:
    cookie = {"Cookie": "c" * 9000}

    async def talk(url: str) -> None:
        async with websockets.connect(url, additional_headers=cookie) as socket:
            await socket.send("hello")
            assert await socket.recv() == "hello"

    run(site, site.at(site.deploy(Sockets), "/echo"), talk)


@near_and_far
@pytest.mark.parametrize(
    ("status", "expected"), [(101, 500), (199, 500), (204, 204), (304, 304)]
)
def test_a_refusal_has_no_body_where_none_may_be(
    site: Site, where: str, status: int, expected: int
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            start = {"type": "websocket.http.response.start", "status": status}
            await send({**start, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b"EVIL"})

    @serve.ingress(app)
    class Refusing: ...

    address = urlsplit(site.at(site.deploy(Refusing, where=where)))
    handshake = (
        f"GET {address.path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), 10) as sock:
        sock.sendall(handshake.encode())
        answer = b""
        while part := sock.recv(1000):
            answer += part
    assert answer.startswith(b"HTTP/1.1 %d " % expected)
    assert b"EVIL" not in answer


def test_a_handshake_with_a_line_that_websockets_does_not_take(site: Site) -> None:
    address = urlsplit(site.url)
    handshake = (
        b"GET /x HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"X-Long: %s\r\n\r\n" % (b"a" * 8192)
    )
    with socket.create_connection((address.hostname, address.port), 10) as sock:
        sock.sendall(handshake)
        answer = b""
        while part := sock.recv(1000):
            answer += part
    assert answer.startswith(b"HTTP/1.1 403 ")  # there is no such route
