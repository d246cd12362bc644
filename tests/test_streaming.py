"""Bodies in both directions: memory, back-pressure and timing, with real processes."""

from __future__ import annotations

import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

import daskserve as serve
from tests.test_http import (
    Gate,
    Notes,
    Site,
    connect,
    near_and_far,
    open_site,
    read_all,
    read_head,
    send_request,
)
from tests.utils import poll

MIB = 2**20
BLOCK = bytes(range(256)) * 4096  # 1 MiB
#: More than all buffers of sockets, proxies and replicas together may hold.
BUFFERS = 24 * MIB


@pytest.fixture(scope="module")
def _site() -> Iterator[Site]:
    with open_site() as site:
        yield site


@pytest.fixture
def site(_site: Site) -> Iterator[Site]:
    yield _site
    _site.clean()


@pytest.fixture
def notes(tmp_path: Any) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Any) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@contextmanager
def memory_limit(site: Site, limit: int) -> Iterator[None]:
    """Fail if any process of the cluster grows by more than `limit` bytes."""
    pids = {site.cluster.scheduler.pid: "scheduler"}
    pids |= {pid: worker for worker, pid in site.client.run(os.getpid).items()}
    processes = {psutil.Process(pid): name for pid, name in pids.items()}
    before = {process: process.memory_info().rss for process in processes}
    growth = dict.fromkeys(processes, 0)
    done = threading.Event()

    def sample() -> None:
        while True:
            for process in processes:
                grown = process.memory_info().rss - before[process]
                growth[process] = max(growth[process], grown)
            if done.wait(0.02):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()
    grown = {processes[p]: round(n / MIB, 1) for p, n in growth.items()}
    print(f"MiB that processes grew by: {grown}")
    assert max(growth.values()) <= limit, grown


def blocks(count: int) -> Iterator[bytes]:
    """Yield `count` MiB, no two of them alike."""
    for number in range(count):
        yield number.to_bytes(8, "big") + BLOCK[8:]


def checksum(parts: Any) -> list[int]:
    """Return size and checksum of the bytes in `parts`."""
    size = crc = 0
    for part in parts:
        size += len(part)
        crc = zlib.crc32(part, crc)
    return [size, crc]


class Bodies:
    """Takes and gives bodies of any size."""

    async def __call__(self, request: Request) -> Any:
        if request.method == "POST":
            size = crc = 0
            async for part in request.stream():
                size += len(part)
                crc = zlib.crc32(part, crc)
            return [size, crc]
        count = int(request.query_params["count"])
        if "sync" in request.query_params:
            return StreamingResponse(blocks(count))

        async def stream() -> Any:
            for block in blocks(count):
                yield block

        return StreamingResponse(stream())


def download(url: str, count: int) -> None:
    with httpx.stream("GET", f"{url}?count={count}", timeout=60) as response:
        assert response.status_code == 200
        assert checksum(response.iter_raw(MIB)) == checksum(blocks(count))


def upload(url: str, count: int) -> None:
    response = httpx.post(url, content=blocks(count), timeout=60)
    assert response.status_code == 200
    assert response.json() == checksum(blocks(count))


transfers = pytest.mark.parametrize("transfer", [upload, download])


@near_and_far
@transfers
def test_50_mb_in_little_memory(
    site: Site, where: str, transfer: Callable[[str, int], None]
) -> None:
    url = site.at(site.deploy(Bodies, where=where))
    transfer(url, 8)  # buffers that stay, and modules that are imported late
    with memory_limit(site, 32 * MIB):
        transfer(url, 50)


@pytest.mark.long
@pytest.mark.timeout(180)
@near_and_far
@transfers
def test_1_gib_in_little_memory(
    site: Site, where: str, transfer: Callable[[str, int], None]
) -> None:
    url = site.at(site.deploy(Bodies, where=where))
    with memory_limit(site, 64 * MIB):
        transfer(url, 1024)


@near_and_far
def test_sync_generator_of_many_bytes(site: Site, where: str) -> None:
    url = site.at(site.deploy(Bodies, where=where))
    with memory_limit(site, 32 * MIB):
        with httpx.stream("GET", f"{url}?count=50&sync", timeout=60) as response:
            assert checksum(response.iter_raw(MIB)) == checksum(blocks(50))


@near_and_far
def test_large_whole_response(site: Site, where: str) -> None:
    def large() -> bytes:
        return b"".join(blocks(20))

    response = httpx.get(site.at(site.deploy(large, where=where)), timeout=60)
    assert response.headers["content-length"] == str(20 * MIB)
    assert checksum([response.content]) == checksum(blocks(20))


def settled(look: Callable[[], int], quiet_s: float = 0.7) -> int:
    """Wait until a number has not changed for a while; return it."""
    last, since = look(), time.monotonic()

    def is_settled() -> bool:
        nonlocal last, since
        now = look()
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > quiet_s

    poll(is_settled, 20)
    return last


class Endless:
    """Streams without end and counts what it has given."""

    def __init__(self) -> None:
        self.given = 0

    async def __call__(self) -> Any:
        while True:
            yield BLOCK[: 64 * 1024]
            self.given += 64 * 1024

    async def count(self) -> int:
        return self.given


class EndlessSync(Endless):
    """The same from a sync generator."""

    def __call__(self) -> Iterator[bytes]:  # type: ignore[override]
        while True:
            yield BLOCK[: 64 * 1024]
            self.given += 64 * 1024


@near_and_far
@pytest.mark.parametrize("target", [Endless, EndlessSync])
def test_slow_reader_slows_the_generator(site: Site, where: str, target: Any) -> None:
    deployment = site.deploy(target, where=where)
    handle = deployment.get_handle()
    other = site.deploy(quick, where=where)
    with send_request(site.at(deployment)) as sock:
        read_head(sock)
        given = settled(lambda: handle.count.remote().result(timeout_s=5))
        assert 0 < given < BUFFERS
        # Others on the same connection between proxy and worker do not wait for it.
        for _ in range(20):
            assert httpx.get(site.at(other), timeout=2).text == "quick"
        read = 0
        while read < given + 4 * MIB:
            part = sock.recv(MIB)
            assert part
            read += len(part)
        assert handle.count.remote().result(timeout_s=5) > given
    # The reader is gone: so is the generator.
    settled(lambda: handle.count.remote().result(timeout_s=5))


def quick() -> str:
    return "quick"


@near_and_far
def test_slow_app_slows_the_upload(site: Site, where: str, gate: Gate) -> None:
    async def slow(request: Request) -> list[int]:
        await gate.wait()
        size = crc = 0
        async for part in request.stream():
            size += len(part)
            crc = zlib.crc32(part, crc)
        return [size, crc]

    count = 40
    deployment = site.deploy(slow, where=where)
    other = site.deploy(quick, where=where)
    headers = f"Content-Length: {count * MIB}\r\nConnection: close\r\n"
    sent = 0

    def send() -> None:
        nonlocal sent
        for block in blocks(count):
            view = memoryview(block)
            while view:
                n = sock.send(view)
                view = view[n:]
                sent += n

    with send_request(site.at(deployment), "POST", headers) as sock:
        sock.settimeout(30)
        sender = threading.Thread(target=send)
        sender.start()
        try:
            assert 0 < settled(lambda: sent) < BUFFERS
            for _ in range(20):
                assert httpx.get(site.at(other), timeout=2).text == "quick"
        finally:
            gate.open()
            sender.join()
        answer = read_all(sock)
    assert sent == count * MIB
    size, crc = checksum(blocks(count))
    assert answer.endswith(f"[{size},{crc}]".encode())


@near_and_far
def test_head_does_not_wait_for_the_body(site: Site, where: str, gate: Gate) -> None:
    """But for a generator's, whose status is not known before its first item."""

    async def items() -> Any:
        await gate.wait()
        yield "late"

    class Late:
        async def __call__(self) -> Any:
            return StreamingResponse(items(), headers={"x-early": "1"})

    deployment = site.deploy(Late, where=where, request_timeout_s=5)
    with httpx.stream("GET", site.at(deployment), timeout=10) as response:
        assert response.status_code == 200  # and the gate is closed
        gate.open()
        assert response.read() == b"late"


@near_and_far
def test_echo_in_lockstep(site: Site, where: str) -> None:
    """Each part of a body is answered before the next is sent."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = True
        while more:
            event = await receive()
            more = event["more_body"]
            body = b"%d;" % len(event["body"])
            await send({"type": "http.response.body", "body": body, "more_body": more})

    @serve.ingress(echo)
    class Echo: ...

    deployment = site.deploy(Echo, where=where)

    def chunk(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data)

    chunked = "Transfer-Encoding: chunked\r\n"
    # The beginning of a body is read before the replica is asked.
    first = chunk(b"x" * 100_000)
    with send_request(site.at(deployment), "POST", chunked, first) as sock:
        data = read_head(sock)

        def read_until(total: int) -> None:
            nonlocal data
            while sum(int(n) for n in _numbers(data)) < total:
                part = sock.recv(65536)
                assert part
                data += part

        read_until(100_000)
        for number in range(1, 21):
            sock.sendall(chunk(b"y" * 1000))
            read_until(100_000 + number * 1000)
        sock.sendall(chunk(b""))
        while not data.endswith(b"0\r\n\r\n"):
            part = sock.recv(65536)
            assert part
            data += part


def _numbers(data: bytes) -> list[str]:
    body = data.partition(b"\r\n\r\n")[2].decode()
    lines = body.split("\r\n")[1::2]  # sizes and chunks in turn
    return [n for n in "".join(lines).split(";") if n]


def test_expect_100_continue(site: Site) -> None:
    async def size(request: Request) -> int:
        return len(await request.body())

    url = site.at(site.deploy(size))
    headers = "Expect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n"
    with send_request(url, "POST", headers) as sock:
        assert read_head(sock).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"12345")
        assert read_all(sock).endswith(b"\r\n\r\n5")


@near_and_far
def test_many_streams_at_once(site: Site, where: str) -> None:
    deployment = site.deploy(Bodies, where=where)
    url = site.at(deployment)
    jobs = [upload, download] * 16
    with ThreadPoolExecutor(len(jobs)) as pool:
        for job in [pool.submit(job, url, 2) for job in jobs]:
            job.result()


@near_and_far
def test_streams_that_are_left_end(site: Site, where: str, notes: Notes) -> None:
    class Left:
        async def __call__(self) -> Any:
            try:
                while True:
                    yield b"x" * 100_000
            finally:
                notes.add("ended")

    deployment = site.deploy(Left, where=where, max_ongoing_requests=4)
    for _ in range(3):  # more than there are places
        socks = [send_request(site.at(deployment)) for _ in range(4)]
        for sock in socks:
            read_head(sock)
        for sock in socks:
            sock.close()
    poll(lambda: len(notes.read()) == 12)


@near_and_far
def test_upload_that_breaks_off(site: Site, where: str, notes: Notes) -> None:
    async def read(request: Request) -> None:
        notes.add("began")
        try:
            async for _ in request.stream():
                pass
        except BaseException as err:
            notes.add(type(err).__name__)
            raise
        notes.add("complete")

    deployment = site.deploy(read, where=where, max_ongoing_requests=1)
    headers = "Content-Length: 1000000\r\n"
    for _ in range(3):
        with send_request(site.at(deployment), "POST", headers, b"x" * 200_000):
            poll(lambda: notes.read()[-1:] == ["began"])
        poll(lambda: notes.read()[-1] in ("CancelledError", "ClientDisconnect"))
    assert len(notes.read()) == 6


def test_window_follows_the_reader(site: Site) -> None:
    """A reader in small sips gets everything, in order."""
    deployment = site.deploy(Bodies, where="far")
    parts = urlsplit(site.at(deployment))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect((parts.hostname, parts.port))
        head = f"GET {parts.path}?count=3 HTTP/1.1\r\nHost: x\r\nConnection: close"
        sock.sendall(head.encode() + b"\r\n\r\n")
        data = read_all(sock)
    rest = data.partition(b"\r\n\r\n")[2]
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert chunks.pop() == b""
    assert checksum(chunks) == checksum(blocks(3))


def test_connections_are_reused(site: Site) -> None:
    url = site.at(site.deploy(Bodies))
    path = urlsplit(url).path
    with connect(url) as sock:
        for _ in range(3):
            head = f"GET {path}?count=1 HTTP/1.1\r\nHost: x\r\n\r\n"
            sock.sendall(head.encode())
            data = read_head(sock)
            while not data.endswith(b"0\r\n\r\n"):
                data += sock.recv(65536)
    assert serve.status().deployments
