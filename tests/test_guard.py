"""Limits of a connection that need a server with a small kernel buffer; no cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from distributed import Security

from daskserve.config import HTTPOptions
from daskserve.proxy.guard import FREE_FILES, Guard
from daskserve.proxy.server import _Server
from daskserve.transport.files import missing_files, open_files
from tests.utils import poll

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
STALL_S = 0.6


@contextmanager
def run(
    app: Any, certificate: Path | None = None, **options: Any
) -> Iterator[tuple[Guard, int]]:
    """Serve an app in a thread; yield the server's guard and its port."""
    guard = Guard(HTTPOptions(stall_timeout_s=STALL_S, **options))
    config = uvicorn.Config(
        app,
        http=guard.protocol,  # type: ignore[arg-type]
        lifespan="off",
        log_level="error",
        ssl_certfile=certificate,
    )
    server = _Server(config, guard)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Connections take it over; so what the kernel holds is little.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.setblocking(False)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            poll(lambda: server.started)
            yield guard, listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
            guard.release_files()
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


# Before a connection counts.


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    temporary = Security.temporary()
    path = tmp_path / "cert.pem"
    path.write_text(temporary.tls_worker_key + temporary.tls_worker_cert)
    return path


def get_encrypted(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with connect(port) as sock, context.wrap_socket(sock) as tls:
        tls.sendall(REQUEST)
        return tls.recv(100)


def is_cut(sock: socket.socket) -> bool:
    """Whether it is at its end now."""
    sock.settimeout(0.001)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_handshakes_have_an_end(certificate: Path) -> None:
    with run(Respond(1, 10), certificate, header_timeout_s=0.5) as (guard, port):
        with connect(port) as silent, connect(port) as slow:
            slow.sendall(b"\x16\x03\x01")  # the beginning of a hello
            assert guard.listener is not None
            poll(lambda: guard.listener and len(guard.listener.handshakes) == 2)
            assert b" 200 " in get_encrypted(port)
            poll(lambda: is_cut(silent) and is_cut(slow), 2)
            assert not guard.listener.handshakes
        with connect(port) as plain:
            plain.sendall(REQUEST)  # no TLS at all
            poll(lambda: is_cut(plain))
        assert b" 200 " in get_encrypted(port)


def test_handshakes_count(certificate: Path) -> None:
    with run(Respond(1, 10), certificate, max_connections=5) as (guard, port):
        silent = [connect(port) for _ in range(100)]
        poll(lambda: sum(map(is_cut, silent)) >= 95)  # who came first goes first
        assert guard.listener is not None
        assert len(guard.listener.handshakes) == 5
        for _ in range(10):
            assert b" 200 " in get_encrypted(port)
        for sock in silent:
            sock.close()


@pytest.mark.parametrize("encrypted", [False, True])
def test_clients_that_take_all_files(certificate: Path, encrypted: bool) -> None:
    """Who asks for something gets its answer; who only is there has to go."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[Any] = []
    crowd = [socket.socket() for _ in range(60)]
    # The clients have their files before there is a limit.
    guests = [socket.socket() for _ in range(3)]
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with run(Respond(1, 10), certificate if encrypted else None) as (guard, port):
        poll(lambda: guard._reserve)
        limit = open_files() + 50  # type: ignore[operator]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            for sock in crowd:
                sock.connect(("127.0.0.1", port))
            poll(lambda: guard.short_of_files or missing_files(FREE_FILES) == 0)
            poll(lambda: missing_files(FREE_FILES) == 0)

            def take_all() -> bool:
                """Take what no connection has, until the reserve is given out."""
                with contextlib.suppress(OSError):
                    while guard._reserve:
                        taken.append(os.open(os.devnull, os.O_RDONLY))
                return not guard._reserve

            poll(take_all)
            for guest in guests:
                guest.settimeout(5)
                guest.connect(("127.0.0.1", port))
                if encrypted:
                    guest = context.wrap_socket(guest)
                guest.sendall(REQUEST)
                assert b" 200 " in guest.recv(100)
                guest.close()
            for file in taken:
                os.close(file)
            poll(lambda: guard._reserve and not guard.short_of_files)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for sock in (*crowd, *guests):
                sock.close()
