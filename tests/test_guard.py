"""Limits of a connection that need a server with a small kernel buffer; no cluster."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from daskserve.config import HTTPOptions
from daskserve.proxy.guard import Guard
from daskserve.proxy.server import _Server
from tests.utils import poll

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
STALL_S = 0.6


@contextmanager
def run(app: Any, **options: Any) -> Iterator[tuple[Guard, int]]:
    """Serve an app in a thread; yield the server's guard and its port."""
    guard = Guard(HTTPOptions(stall_timeout_s=STALL_S, **options))
    config = uvicorn.Config(
        app,
        http=guard.protocol,  # type: ignore[arg-type]
        lifespan="off",
        log_level="error",
    )
    server = _Server(config, guard)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Connections take it over; so what the kernel holds is little.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            poll(lambda: server.started)
            yield guard, listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
    assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    return sock


class Respond:
    """An app that sends so many parts of so many bytes."""

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self.ended = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        part = {"type": "http.response.body", "body": b"x" * self.size}
        for _ in range(self.count):
            await send({**part, "more_body": True})
        await send({"type": "http.response.body"})
        self.ended += 1


# Far over the mark at which writing is paused, and far below it.
@pytest.mark.parametrize(("count", "size"), [(100, 65536), (1, 50_000)])
def test_reader_that_stops_is_cut_off(count: int, size: int) -> None:
    app = Respond(count, size)
    with run(app) as (guard, port), connect(port) as sock:
        sock.sendall(REQUEST)
        assert sock.recv(100)
        assert len(guard.connections) == 1
        poll(lambda: not guard.connections)
        poll(lambda: app.ended)  # what the app still sends goes nowhere


def test_slow_reader_is_not_cut_off() -> None:
    app = Respond(10, 65536)
    with run(app) as (guard, port), connect(port) as sock:
        sock.sendall(REQUEST)
        data = b""
        began = time.monotonic()
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(2048)
            if time.monotonic() - began < 3 * STALL_S:
                time.sleep(0.02)
        assert data.count(b"x" * 1000) >= 10 * 65536 // 1000 - 20
        assert len(guard.connections) == 1
        assert not app.ended or data  # all of it has come
        sock.sendall(REQUEST)  # and the connection is good for more
        assert sock.recv(100)


def test_connections_are_forgotten() -> None:
    with run(Respond(1, 10)) as (guard, port):
        socks = [connect(port) for _ in range(5)]
        poll(lambda: len(guard.connections) == 5)
        assert len(guard.idle) == 5
        for sock in socks:
            sock.sendall(REQUEST)
            poll(lambda sock=sock: sock.recv(100))  # type: ignore[misc]
        poll(lambda: len(guard.idle) == 5)
        for sock in socks:
            sock.close()
        poll(lambda: not guard.connections and not guard.idle)


def test_limit_follows_the_files_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
        assert Guard(HTTPOptions()).max_connections == 200
        assert Guard(HTTPOptions(max_connections=20)).max_connections == 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bodies_are_whole() -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            event = await receive()
            size += len(event.get("body", b""))
            more = event.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % size})

    async def check(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for size in (0, 1, 70_000, 3_000_000):
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
            writer.write(head + b"x" * size)
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            assert b"\r\n%d\r\n0\r\n" % size in b"\r\n" + await reader.readuntil(
                b"0\r\n\r\n"
            )
        writer.close()

    with run(echo) as (_, port):
        asyncio.run(check(port))


def test_refused_websocket_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daskserve.proxy.guard.LINGER_S", 0.2)
    hold = threading.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        while not hold.is_set():
            await asyncio.sleep(0.01)

    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with run(wait, max_connections=1) as (guard, port), connect(port) as busy:
        busy.sendall(REQUEST)
        poll(lambda: guard.connections and not guard.idle)
        with connect(port) as sock:
            sock.sendall(REQUEST[:-2] + upgrade)
            assert b" 503 " in sock.recv(1000)

            def cut() -> bool:
                try:
                    sock.sendall(b"x")
                except OSError:
                    return True
                return False

            poll(cut)
        hold.set()


def test_steady_reader_of_many_responses_is_not_cut_off() -> None:
    # Whenever the guard looks, something waits; yet all of it is taken.
    size = 20_000
    with run(Respond(1, size)) as (_, port), connect(port) as sock:
        sock.sendall(REQUEST * 2)
        end = time.monotonic() + 4 * STALL_S
        taken = 0
        while time.monotonic() < end:
            part = sock.recv(2048)
            assert part, "cut off"
            if (taken + len(part)) // size > taken // size:
                sock.sendall(REQUEST)
            taken += len(part)
            time.sleep(0.01)
