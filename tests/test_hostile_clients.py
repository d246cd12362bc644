"""Clients that break the rules of HTTP or stand still; real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from tests.test_http import (
    Gate,
    Notes,
    Site,
    _site,
    connect,
    gate,
    log_lines,
    near_and_far,
    notes,
    read_all,
    read_head,
    send_request,
    site,
    spare,
    start,
)
from tests.utils import poll

__all__ = ["_site", "gate", "notes", "site", "spare", "start"]  # fixtures

HOST = "Host: x\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
EVIL = "GET /EVIL HTTP/1.1\r\nHost: x\r\n\r\n"


# Requests that are no HTTP, or could be taken for another request by somebody else.


def _post(headers: str, body: str = "", version: str = "1.1") -> str:
    return f"POST /PATH HTTP/{version}\r\n{HOST}{headers}\r\n{body}"


BAD = {
    "no HTTP": "nonsense\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown version": f"GET /PATH HTTP/1.2\r\n{HOST}\r\n",
    "unknown method": f"JUMP /PATH HTTP/1.1\r\n{HOST}\r\n",
    "bare LF": "GET /PATH HTTP/1.1\nHost: x\n\n",
    "bare CR": "GET /PATH HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
    "null in the path": f"GET /PATH\x00 HTTP/1.1\r\n{HOST}\r\n",
    "non-ASCII path": f"GET /PATH/\xff HTTP/1.1\r\n{HOST}\r\n",
    "space in the path": f"GET /PATH /x HTTP/1.1\r\n{HOST}\r\n",
    "null in a header": f"GET /PATH HTTP/1.1\r\n{HOST}A: b\x00c\r\n\r\n",
    "space before a colon": "GET /PATH HTTP/1.1\r\nHost : x\r\n\r\n",
    "folded header": f"GET /PATH HTTP/1.1\r\n{HOST}A: b\r\n c\r\n\r\n",
    "header without a name": f"GET /PATH HTTP/1.1\r\n{HOST}: b\r\n\r\n",
    "two hosts": f"GET /PATH HTTP/1.1\r\n{HOST}Host: y\r\n\r\n",
    "length and chunked": _post(f"Content-Length: 4\r\n{CHUNKED}", f"0\r\n\r\n{EVIL}"),
    "chunked and length": _post(f"{CHUNKED}Content-Length: 4\r\n", f"0\r\n\r\n{EVIL}"),
    "two lengths": _post("Content-Length: 4\r\nContent-Length: 5\r\n", "abcde"),
    "one length twice": _post("Content-Length: 4\r\nContent-Length: 4\r\n", "abcd"),
    "list of lengths": _post("Content-Length: 4, 4\r\n", "abcd"),
    "length with a sign": _post("Content-Length: +4\r\n", "abcd"),
    "negative length": _post("Content-Length: -1\r\n"),
    "hexadecimal length": _post("Content-Length: 0x4\r\n", "abcd"),
    "huge length": _post(f"Content-Length: {'9' * 30}\r\n"),
    "unknown coding": _post("Transfer-Encoding: gzip\r\n", EVIL),
    "unknown coding of an upgrade": _post(
        "Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: gzip\r\n", EVIL
    ),
    "nearly chunked": _post("Transfer-Encoding: xchunked\r\n", f"0\r\n\r\n{EVIL}"),
    "chunked not last": _post(f"{CHUNKED[:-2]}, identity\r\n", f"0\r\n\r\n{EVIL}"),
    "chunked twice": _post(CHUNKED * 2, f"0\r\n\r\n{EVIL}"),
    "hidden chunked": _post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n"),
    "chunk size": _post(CHUNKED, "zz\r\n"),
    "chunk size overflow": _post(CHUNKED, f"{'f' * 17}\r\n"),
    "chunk too long": _post(CHUNKED, "4\r\nabcdXX0\r\n\r\n"),
    "chunk with a bare LF": _post(CHUNKED, "4\nabcd\n0\n\n"),
}


@pytest.fixture(scope="module")
def listening(_site: Site, tmp_path_factory: Any) -> Iterator[tuple[Site, str, Notes]]:
    """Give a deployment, its path, and the notes that it makes of all requests."""
    notes = Notes(tmp_path_factory.mktemp("listening") / "notes")

    async def tell(request: Request) -> str:
        text = f"{request.method} {request.url.path} {await request.body()!r}"
        notes.add(text)
        return text

    deployment = _site.deploy(tell, where="far")
    yield _site, f"/{deployment.name}", notes


@pytest.mark.parametrize("name", BAD)
def test_bad_request(listening: tuple[Site, str, Notes], name: str) -> None:
    site, path, notes = listening
    before = notes.read()
    data = BAD[name].replace("/PATH", path).replace("/EVIL", f"{path}/evil")
    with connect(site.url) as sock:
        sock.sendall(data.encode("latin-1"))
        answer = read_all(sock)  # until the server closes
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert answer.count(b"HTTP/1.1") == 1
    assert httpx.get(site.url + path).text == f"GET {path} b''"
    assert notes.read() == [*before, f"GET {path} b''"]  # user code saw nothing else
    log_lines(site, "Refused a request from 127.0.0.1: 400, ")


@pytest.mark.parametrize("segments", [1, 2, 50])
@pytest.mark.parametrize("chunked", [False, True])
def test_upgrade_to_something_unknown(
    listening: tuple[Site, str, Notes], segments: int, chunked: bool
) -> None:
    site, path, _ = listening
    body = EVIL.replace("/EVIL", f"{path}/evil").encode()
    framing, sent = f"Content-Length: {len(body)}\r\n", body
    if chunked:
        framing, sent = CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    upgrade = f"{HOST}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    data = f"POST {path} HTTP/1.1\r\n{upgrade}{framing}\r\n".encode() + sent
    data += f"GET {path} HTTP/1.1\r\n{upgrade}\r\n".encode()
    data += f"GET {path} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n".encode()
    step = len(data) // segments + 1
    with connect(site.url) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(data), step):
            sock.sendall(data[i : i + step])
            time.sleep(0.002)
        answers = read_all(sock).decode().split("HTTP/1.1 200 OK")[1:]
    told = [answer.partition("\r\n\r\n")[2] for answer in answers]
    assert told == [f"POST {path} {body!r}", f"GET {path} b''", f"GET {path} b''"]


def test_error_in_the_body_ends_the_request(
    site: Site, notes: Notes, gate: Gate
) -> None:
    async def read(request: Request) -> str:
        try:
            async for part in request.stream():
                notes.add(f"got {len(part)}")
            await gate.wait()
        except BaseException as err:
            notes.add(type(err).__name__)
            raise
        return "complete"

    url = site.at(site.deploy(read))
    with send_request(url, "POST", CHUNKED) as sock:
        sock.sendall(b"%x\r\n%b\r\n" % (100_000, b"x" * 100_000))
        poll(lambda: any(line.startswith("got") for line in notes.read()))
        sock.sendall(b"nonsense\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    poll(lambda: {"CancelledError", "ClientDisconnect"} & set(notes.read()))


def test_error_in_the_body_after_the_response_began(site: Site) -> None:
    async def echo(request: Request) -> StreamingResponse:
        return StreamingResponse(request.stream())

    url = site.at(site.deploy(echo))
    with send_request(url, "POST", CHUNKED) as sock:
        sock.sendall(b"%x\r\n%b\r\n" % (100_000, b"x" * 100_000))
        data = read_head(sock)
        sock.sendall(b"nonsense\r\n")
        try:
            data += read_all(sock)
        except ConnectionResetError:
            pass
    assert data.count(b"HTTP/1.1") == 1  # no second answer in the middle of the first
    assert not data.endswith(b"0\r\n\r\n")


# Limits of a request's head.


def test_head_size(site: Site) -> None:
    def f(request: Request) -> str:
        return request.headers["x"][:1] + request.headers["z"]

    path = urlsplit(site.at(site.deploy(f))).path

    def ask(*headers: str, query: str = "", step: int = 0) -> bytes:
        head = "".join(header + "\r\n" for header in ("Connection: close", *headers))
        data = f"GET {path}?{query} HTTP/1.1\r\n{HOST}{head}z: z\r\n\r\n".encode()
        with connect(site.url) as sock:
            try:
                for i in range(0, len(data), step or len(data)):
                    sock.sendall(data[i : i + (step or len(data))])
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all of it was sent
            return read_all(sock)

    limit = 64 * 1024
    good = "x: " + "y" * (limit - 1000)
    for step in (0, 5000):
        assert ask(good, step=step).endswith(b"yz")
        for bad in (
            ["x: " + "y" * limit],
            [f"x{i}: {'y' * 100}" for i in range(1000)],
            ["x: " + "y" * 20_000_000],
        ):
            answer = ask(*bad, step=step)
            assert answer.startswith(b"HTTP/1.1 431 "), answer
        assert ask("x: y", query="q" * limit, step=step).startswith(b"HTTP/1.1 431 ")


# Limits of time.


@pytest.fixture
def impatient(start: Callable[..., Site]) -> Site:
    """Give a site where clients have little time."""
    return start(header_timeout_s=1, stall_timeout_s=1.5, request_timeout_s=30)


def test_head_that_takes_its_time(impatient: Site) -> None:
    def f() -> str:
        return "ok"

    path = urlsplit(impatient.at(impatient.deploy(f))).path
    whole = f"GET {path} HTTP/1.1\r\n{HOST}\r\n".encode()
    with connect(impatient.url) as silent, connect(impatient.url) as slow:
        with connect(impatient.url) as second:
            second.sendall(whole)
            assert read_head(second).startswith(b"HTTP/1.1 200 ")
            second.sendall(whole[:20])  # on a connection that was good before
            assert _drip(slow, whole[:-2]).startswith(b"HTTP/1.1 408 ")
            assert b"HTTP/1.1 408 " in read_all(second)
        assert read_all(silent) == b""  # closed, and nothing was asked
    assert httpx.get(impatient.url + path).text == "ok"


def _drip(sock: socket.socket, data: bytes, period_s: float = 0.2) -> bytes:
    """Send byte by byte until the other side has had enough; return its answer."""
    sock.settimeout(0.01)
    for i in range(len(data)):
        try:
            sock.sendall(data[i : i + 1])
        except OSError:
            break
        try:
            if answer := sock.recv(65536):
                return answer
            break
        except TimeoutError:
            time.sleep(period_s)
    return b""


@near_and_far
def test_body_that_stops(impatient: Site, where: str, notes: Notes) -> None:
    async def read(request: Request) -> str:
        notes.add("began")
        try:
            return str(len(await request.body()))
        except BaseException as err:
            notes.add(type(err).__name__)
            raise

    url = impatient.at(impatient.deploy(read, where=where, max_ongoing_requests=1))
    length = "Content-Length: 1000000\r\n"
    with send_request(url, "POST", length, b"x" * 1000) as sock:
        # It has no place in the replica yet, though there is one only.
        assert httpx.post(url, content=b"y").text == "1"
        assert read_all(sock).startswith(b"HTTP/1.1 408 ")
    with send_request(url, "POST", length, b"x" * 500_000) as sock:
        poll(lambda: notes.read().count("began") == 2)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"stall_timeout_s" in answer
    notes.wait("CancelledError")
    assert httpx.post(url, content=b"yy").text == "2"  # the place is free again


@near_and_far
def test_reader_that_stops(impatient: Site, where: str, notes: Notes) -> None:
    async def flood() -> Any:
        async def parts() -> Any:
            try:
                while True:
                    yield b"x" * 65536
            finally:
                notes.add("ended")

        return parts()

    url = impatient.at(impatient.deploy(flood, where=where))
    with send_request(url) as sock:
        read_head(sock)
        notes.wait("ended")
        log_lines(impatient, "takes next to nothing of a response")


@pytest.mark.parametrize("token", ["wrong", "secret"])
def test_answer_during_an_upload_arrives(
    start: Callable[..., Site], token: str
) -> None:
    # More than the kernels buffer is on its way when the answer comes.
    site = start(token="secret", max_request_body_bytes="1 MB")
    url = site.at(site.deploy(max))
    headers = f"Authorization: Bearer {token}\r\nContent-Length: 50000000\r\n"
    with send_request(url, "POST", headers) as sock:
        try:
            sock.sendall(b"x" * 50_000_000)
        except (BrokenPipeError, ConnectionResetError):
            pass  # not all of it is listened to
        status = b"413" if token == "secret" else b"401"
        assert read_head(sock).startswith(b"HTTP/1.1 " + status)


# Limits of number.


def test_more_connections_than_allowed(
    start: Callable[..., Site], gate: Gate, notes: Notes
) -> None:
    site = start(max_connections=10)

    async def wait() -> str:
        notes.add("began")
        await gate.wait()
        return "done"

    url = site.at(site.deploy(wait))
    with ExitStack() as stack:
        for _ in range(30):  # idle ones make room for others
            stack.enter_context(connect(url))
        busy = [stack.enter_context(send_request(url)) for _ in range(10)]
        poll(lambda: len(notes.read()) == 10)
        with send_request(url) as sock:
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer and b"max_connections" in answer
        assert httpx.get(f"{site.url}/-/healthz").text == "success"
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        with send_request(url, headers=upgrade) as sock:
            assert read_all(sock).startswith(b"HTTP/1.1 503 ")
        gate.open()
        for sock in busy:
            assert read_head(sock).startswith(b"HTTP/1.1 200 ")
    assert httpx.get(url).text == "done"


def test_many_clients_that_vanish(site: Site) -> None:
    async def f() -> str:
        await asyncio.sleep(0.01)
        return "ok"

    url = site.at(site.deploy(f))
    for _ in range(200):
        sock = send_request(url)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()  # by a reset
    assert httpx.get(url).text == "ok"


def test_overload_is_answered_at_once(site: Site, gate: Gate, notes: Notes) -> None:
    async def wait() -> str:
        notes.add("began")
        await gate.wait()
        return "done"

    url = site.at(site.deploy(wait, max_ongoing_requests=10, max_queued_requests=40))

    async def check() -> list[int]:
        limits = httpx.Limits(max_connections=400)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            requests = [asyncio.ensure_future(client.get(url)) for _ in range(300)]
            refused = []
            for request in asyncio.as_completed(requests):
                refused.append((await request).status_code)
                if len(refused) == 250:  # the gate is closed: all others wait
                    break
            began = time.monotonic()
            for _ in range(20):
                health = await client.get(f"{site.url}/-/healthz")
                assert health.text == "success"
            assert time.monotonic() - began < 10  # 20 times, on a busy machine
            assert set(refused) == {503}
            gate.open()
            return [(await request).status_code for request in requests]

    statuses = asyncio.run(check())
    assert statuses.count(200) == 50
    assert len(notes.read()) == 50
