"""Limits of a connection that need a server with a small kernel buffer; no cluster."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from daskserve.config import HTTPOptions
from daskserve.proxy.guard import FREE_FILES, Guard
from daskserve.proxy.server import _Server
from daskserve.proxy.websocket_protocol import WebSocketProtocol
from daskserve.transport.files import missing_files, open_files
from tests.utils import poll, write_certificate

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
STALL_S = 0.6


@contextmanager
def run(
    app: Any, certificate: Path | None = None, **options: Any
) -> Iterator[tuple[Guard, int]]:
    """Serve an app in a thread; yield the server's guard and its port."""
    guard = Guard(HTTPOptions(**{"stall_timeout_s": STALL_S, **options}))
    config = uvicorn.Config(
        app,
        http=guard.protocol,  # type: ignore[arg-type]
        ws=WebSocketProtocol,
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


def connect(port: int, certificate: Path | None = None) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    if certificate is not None:
        context = ssl.create_default_context(cafile=certificate)
        context.check_hostname = False
        return context.wrap_socket(sock)
    return sock


def ask(
    port: int,
    data: bytes,
    certificate: Path | None = None,
    until: Callable[[bytes], bool] = lambda answer: False,
) -> bytes:
    """Return what comes for `data` until the server closes, or `until` says enough."""
    answer = b""
    with connect(port, certificate) as sock:
        sender = threading.Thread(target=_send, args=(sock, data))
        # Two threads may not use a socket with TLS; the kernel takes so much at once.
        sender.run() if len(data) < 150_000 else sender.start()
        try:
            while not until(answer) and (part := sock.recv(65536)):
                answer += part
        except ConnectionResetError:
            pass
        if sender.ident is not None:
            sender.join(10)
    return answer


def whole(answer: bytes) -> bool:
    """Whether a response has come, with all of its body."""
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(end) and length is not None and len(body) >= int(length[1])


def _send(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        sock.sendall(data)


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


def test_nothing_is_asked_for_after_a_refusal(certificate: Path | None) -> None:
    began, gate = threading.Event(), threading.Event()
    received: list[Any] = []

    async def late(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        while not gate.is_set():
            await asyncio.sleep(0.01)
        try:
            received.append(await receive())
        except RuntimeError as err:
            received.append(err)

    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    with run(late, certificate) as (_, port), connect(port, certificate) as sock:
        sock.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert began.wait(10)
        sock.sendall(b"nonsense\r\n")
        answer = sock.recv(65536)
        gate.set()
        poll(lambda: received)
        with suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
    assert received == [{"type": "http.disconnect"}]
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1


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


# What stands beside heads and bodies.


async def tell(scope: Any, receive: Any, send: Any) -> None:
    """Answer with path, body and headers."""
    body, more = b"", True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        body += event["body"]
        more = event["more_body"]
    text = f"{scope['path']} {body.decode()} {dict(scope['headers'])}".encode()
    length = (b"content-length", b"%d" % len(text))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": text})


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """Answer without a look at the body."""
    length = (b"content-length", b"2")
    await send({"type": "http.response.start", "status": 401, "headers": [length]})
    await send({"type": "http.response.body", "body": b"no"})


CHUNKED = b"POST /post HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_trailers_are_dropped(certificate: Path | None, step: int) -> None:
    trailers = [
        b"X-User: admin",
        b"X-Forwarded-For: 6.6.6.6",
        b"Authorization: Bearer t",
        b"Host: evil",
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"X-Last: x",
    ]
    sent = CHUNKED + b"3\r\nabc\r\n0\r\n" + b"\r\n".join(trailers) + b"\r\n\r\n"
    with run(tell, certificate) as (_, port), connect(port, certificate) as sock:
        for i in range(0, len(sent), step):
            sock.sendall(sent[i : i + step])
        sock.sendall(LAST)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"/post abc {b'host': b'x', b'transfer-encoding': b'chunked'}" in answer
    assert b"/last  {b'host': b'x', b'connection': b'close'}" in answer


@pytest.mark.parametrize(
    "trailer", [b"Connection: close", b"Content-Length: 5", CHUNKED[-30:-4]]
)
def test_trailers_that_would_frame_the_message(trailer: bytes) -> None:
    with run(tell) as (_, port):
        answer = ask(port, CHUNKED + b"0\r\n" + trailer + b"\r\n\r\n" + LAST)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


ENDLESS = {
    "trailers": b"0\r\n" + b"a:b\r\n" * 2_000_000,
    "trailer": b"0\r\na: " + b"b" * 10_000_000,
    "name of a trailer": b"0\r\n" + b"a" * 10_000_000,
    "extension": b"1;" + b"a" * 10_000_000,
    "extensions": (b"1;" + b"a" * 1000 + b"\r\nx\r\n") * 10_000,
    "zeros": b"0" * 10_000_000,
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("app", [tell, refuse])
def test_what_stands_beside_a_body_is_limited(
    certificate: Path | None, name: str, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daskserve.proxy.guard.LINGER_S", 0.1)
    if "zeros" in name and app is refuse:
        pytest.skip("refused by the parser")
    sent = itertools.count()
    with run(app, certificate, stall_timeout_s=30) as (guard, port):
        with connect(port, certificate) as sock:
            sock.sendall(CHUNKED)
            try:
                for i in range(0, len(ENDLESS[name]), 50_000):
                    sock.sendall(ENDLESS[name][i : i + 50_000])
                    next(sent)
                    time.sleep(0.01)
            except OSError:
                pass
            answer = b""
            with suppress(OSError):
                while part := sock.recv(65536):
                    answer += part
        assert next(sent) < 150  # of 200, until it is cut off
        assert answer.count(b"HTTP/1.1 ") <= 1
        if app is tell and answer:
            assert answer.startswith(b"HTTP/1.1 431 ") or "zeros" in name
        poll(lambda: not guard.connections)


def test_small_chunks_are_no_overhead(certificate: Path | None) -> None:
    body = b"00000001\r\nx\r\n" * 5_000 + b"1;a=b\r\ny\r\n" + b"0\r\nA: b\r\n\r\n"
    with run(tell, certificate, max_header_bytes=2000) as (_, port):
        answer = ask(port, (CHUNKED + body) * 2 + LAST, certificate)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"x" * 5_000 + b"y") == 2


@pytest.mark.long
def test_an_error_behind_an_answer_gets_none_itself(certificate: Path | None) -> None:
    with run(refuse, certificate) as (_, port), connect(port, certificate) as sock:
        sock.sendall(CHUNKED)
        answer = sock.recv(1000)
        while not answer.endswith(b"no"):
            answer += sock.recv(1000)
        sock.sendall(b"nonsense\r\n")
        with suppress(ConnectionResetError):
            assert sock.recv(1000) == b""


# Requests behind others.


@pytest.mark.parametrize("count", [100, 3000, 9000])
def test_many_small_requests_at_once(certificate: Path | None, count: int) -> None:
    if certificate is not None and count > 3000:
        pytest.skip("more than the kernel takes at once")
    data = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
    asked = b"".join(data % i for i in range(count))
    with run(tell, certificate) as (_, port):
        answer = ask(
            port,
            asked,
            certificate,
            lambda answer: (
                answer.count(b"HTTP/1.1 200 OK") == count and answer.endswith(b"}")
            ),
        )
    paths = [int(part.split()[0]) for part in answer.split(b"\r\n\r\n/")[1:]]
    assert paths == list(range(count))


@pytest.mark.parametrize("count", [260, 2600])
def test_many_upgrades_at_once(certificate: Path | None, count: int) -> None:
    if certificate is not None and count > 260:
        pytest.skip("more than the kernel takes at once")
    body = b"Content-Length: 3\r\n\r\nabc"
    data = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    with run(tell, certificate) as (_, port):
        answer = ask(port, (data + b"\r\n" + data + body) * count + LAST, certificate)
    assert answer.count(b"HTTP/1.1 200 OK") == 2 * count + 1
    assert answer.count(b"/ abc ") == count


def test_head_behind_others_is_limited_as_the_first(certificate: Path | None) -> None:
    large = b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 30_000
    with run(tell, certificate, max_header_bytes=20_000) as (_, port):
        for before in (b"", REQUEST, REQUEST * 200):
            count = before.count(REQUEST)
            for end in (b"\r\n\r\n", b"b" * 600_000):
                with connect(port, certificate) as sock:
                    sock.sendall(before)
                    answer = b""
                    while answer.count(b"HTTP/1.1 200 OK") < count:
                        answer += sock.recv(65536)
                    _send(sock, large + end)
                    with suppress(ConnectionResetError):
                        while b"431" not in answer and (part := sock.recv(65536)):
                            answer += part
                assert answer.count(b"HTTP/1.1 431 ") == 1


# WebSockets' handshakes.

KEY = (
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
HANDSHAKE = b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n" + KEY


class Socket:
    """An app that answers requests when it may, and accepts and closes WebSockets."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            while not self.gate.is_set():
                await asyncio.sleep(0.01)
            return await tell(scope, receive, send)
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})


@pytest.mark.parametrize("count", [1, 3])
def test_websocket_behind_requests_waits(certificate: Path | None, count: int) -> None:
    app = Socket()
    with run(app, certificate) as (guard, port), connect(port, certificate) as sock:
        sock.sendall(REQUEST * count + HANDSHAKE + b"\r\n")
        poll(lambda: app.scopes)
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(10)
        app.gate.set()
        answer = b""
        while b"\x88\x02\x03\xe8" not in answer:  # its close
            assert (part := sock.recv(65536)), answer
            answer += part
        status = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
        assert status == [b"200"] * count + [b"101"]
        assert not guard.connections


def test_websocket_behind_a_request_whose_client_goes() -> None:
    app = Socket()
    with run(app) as (guard, port):
        with connect(port) as sock:
            sock.sendall(REQUEST + HANDSHAKE + b"\r\n")
            poll(lambda: app.scopes)
        poll(lambda: not guard.connections)
        app.gate.set()
        poll(lambda: len(app.scopes) == 1)


LARGE = {
    "cookie": b"Cookie: " + b"c" * 9000 + b"\r\n",
    "many headers": b"".join(b"A%d: b\r\n" % i for i in range(200)),
    "no ASCII": b"A: \xff\xc3\xbc\r\n",
    "empty body": b"Content-Length: 0\r\n",
}


@pytest.mark.parametrize("name", LARGE)
def test_handshake_may_be_as_large_as_any_head(
    certificate: Path | None, name: str
) -> None:
    app = Socket()
    with run(app, certificate) as (_, port):
        answer = ask(
            port,
            HANDSHAKE + LARGE[name] + b"\r\n",
            certificate,
            lambda answer: answer.endswith(b"\x03\xe8"),
        )
    assert answer.startswith(b"HTTP/1.1 101 ")
    (scope,) = app.scopes
    sent = [tuple(line.split(b": ")) for line in LARGE[name].split(b"\r\n")[:-1]]
    got = [(name.title(), value) for name, value in scope["headers"][-len(sent) :]]
    assert [(name.title(), value) for name, value in sent] == got
    assert (scope["path"], scope["http_version"]) == ("/ws", "1.1")


SPOILED = {
    "no HTTP": (400, b"nonsense\r\n\r\n"),
    "head": (400, b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "too long": (431, b"GET /x HTTP/1.1\r\nA: " + b"x" * 70_000 + b"\r\n\r\n"),
    "chunk": (400, CHUNKED + b"zz\r\n"),
    "handshake": (400, HANDSHAKE + b"Content-Length: 4\r\n\r\nabcd"),
}


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize("count", [1, 3])
def test_nonsense_behind_requests_waits_for_their_answers(
    certificate: Path | None, what: str, count: int
) -> None:
    status, nonsense = SPOILED[what]
    app = Socket()
    statuses, answer = list[int](), b""
    with run(app, certificate) as (guard, port):
        with connect(port, certificate) as sock:
            sock.sendall(REQUEST * count + nonsense)
            poll(lambda: app.scopes)
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(10)
            app.gate.set()
            while len(statuses) <= count and (part := sock.recv(65536)):
                answer += part
                statuses = [int(s) for s in re.findall(rb"HTTP/1.1 (\d+) ", answer)]
        poll(lambda: not guard.connections)
    assert statuses == [200] * count + [status]
    assert len(app.scopes) == count


MALFORMED = {
    "length": (400, HANDSHAKE + b"Content-Length: 3\r\n"),
    "chunked": (400, HANDSHAKE + b"Transfer-Encoding: chunked\r\n"),
    "POST": (405, HANDSHAKE.replace(b"GET", b"POST")),
    "no key": (400, HANDSHAKE.replace(b"-Key", b"-Ke")),
    "no version": (400, HANDSHAKE.replace(b": 13", b": 12")),
    "two hosts": (400, HANDSHAKE + b"Host: y\r\n"),
    "too large": (431, HANDSHAKE + b"A: " + b"b" * 70_000 + b"\r\n"),
    "extensions": (400, HANDSHAKE + b"Sec-WebSocket-Extensions: ;;\r\n"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_handshake_is_answered(certificate: Path | None, name: str) -> None:
    status, data = MALFORMED[name]
    app = Socket()
    with run(app, certificate, max_connections=10) as (guard, port):
        for _ in range(30):
            answer = ask(port, data + b"\r\n", certificate, whole)
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer
            assert answer.count(b"HTTP/1.1 ") == 1
            assert (b"\r\nallow: get\r\n" in answer.lower()) == (status == 405)
        assert not app.scopes
        poll(lambda: not guard.connections)
        app.gate.set()
        assert b" 200 " in ask(port, LAST, certificate)


def test_malformed_handshake_is_not_held(certificate: Path | None) -> None:
    # Its client waits, and reads nothing.
    app = Socket()
    app.gate.set()
    with run(app, certificate, max_connections=10) as (_, port), ExitStack() as stack:
        for _, data in MALFORMED.values():
            for _ in range(5):
                sock = stack.enter_context(connect(port, certificate))
                _send(sock, data + b"\r\n")
        poll(lambda: b" 200 " in ask(port, LAST, certificate))


# Before a connection counts.


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return write_certificate(tmp_path)


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


def test_handshakes_have_an_end(pem: Path) -> None:
    with run(Respond(1, 10), pem, header_timeout_s=0.5) as (guard, port):
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


def test_handshakes_count(pem: Path) -> None:
    with run(Respond(1, 10), pem, max_connections=5) as (guard, port):
        silent = [connect(port) for _ in range(100)]
        poll(lambda: sum(map(is_cut, silent)) >= 95)  # who came first goes first
        assert guard.listener is not None
        assert len(guard.listener.handshakes) == 5
        for _ in range(10):
            assert b" 200 " in get_encrypted(port)
        for sock in silent:
            sock.close()


@pytest.mark.parametrize("encrypted", [False, True])
def test_clients_that_take_all_files(pem: Path, encrypted: bool) -> None:
    """Who asks for something gets its answer; who only is there has to go."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[Any] = []
    crowd = [socket.socket() for _ in range(60)]
    # The clients have their files before there is a limit.
    guests = [socket.socket() for _ in range(3)]
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with run(Respond(1, 10), pem if encrypted else None) as (guard, port):
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
