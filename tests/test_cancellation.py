"""Clients that leave, time limits and cancelled calls: nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse

import daskserve as serve
from daskserve.exceptions import QueueFullError
from tests.inside import idle_inside, resident_bytes, wait_for_idle
from tests.test_http import (
    Notes,
    Site,
    near_and_far,
    notes,
    open_site,
    send_request,
)

__all__ = ["notes"]  # a fixture

#: Requests in each of the two rounds; more for a thorough run by hand.
N_REQUESTS = int(os.environ.get("DASKSERVE_FUZZ_REQUESTS", "5000"))
N_CLIENTS = 100
#: In the place of a status: the connection was closed in the middle of the answer.
CUT = 0
#: Longer than any client waits.
FOREVER_S = 60


class Back:
    """The second stage."""

    async def work(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    def work_sync(self, number: int) -> int:
        return number + 1


class Front:
    """The first stage: everything it does goes through `Back`."""

    def __init__(self, back: str) -> None:
        self.back = serve.get_deployment(back).get_handle()

    async def relay(self, seconds: float) -> float:
        done: float = await self.back.work.remote(seconds)
        return done


front = FastAPI()


def _replica() -> Front:
    found: Front = serve.get_replica_context().servable_object
    return found


@front.get("/work")
async def work(seconds: float) -> float:
    return await _replica().relay(seconds)


@front.post("/upload")
async def upload(request: Request) -> int:
    size = 0
    async for part in request.stream():
        size += len(part)
    number: int = await _replica().back.work_sync.remote(size)
    return number


@front.get("/stream")
async def stream(chunks: int) -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        for n in range(chunks):
            yield b"%d;" % n * 100
            await _replica().relay(0.001)

    return StreamingResponse(parts())


@front.websocket("/socket")
async def socket_(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(str(await _replica().relay(float(text))))


@serve.ingress(front)
class FrontApp(Front): ...


class Peer:
    """One connection of a client that may not keep to the rules."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer

    def send(
        self, prefix: str, path: str, headers: str = "", *, method: str = "GET"
    ) -> None:
        head = f"{method} {prefix}{path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"
        self.writer.write(head.encode())

    async def answer(self) -> tuple[int, bytes]:
        """Read a response that has a length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), await self.reader.readexactly(length)

    def frame(self, text: str) -> None:
        """Send a WebSocket's text frame."""
        mask = b"\0\0\0\0"
        self.writer.write(bytes([0x81, 0x80 | len(text)]) + mask + text.encode())

    async def received_frame(self) -> str:
        _, length = await self.reader.readexactly(2)
        return (await self.reader.readexactly(length)).decode()

    def reset(self) -> None:
        """Make the close that comes a reset, as of a process that is killed."""
        linger = struct.pack("ii", 1, 0)
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the server has closed it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class Fuzz:
    """Makes requests of all kinds, each drawn from the seed and its number alone."""

    def __init__(self, seed: int, urls: list[str], handles: list[Any]) -> None:
        self.seed = seed
        self.urls = urls
        self.handles = handles
        self.outcomes: Counter[str] = Counter()

    async def run(self, numbers: range) -> None:
        """Make the requests, `N_CLIENTS` at a time."""
        left = iter(numbers)

        async def client() -> None:
            for n in left:
                await self.one(n)

        await asyncio.gather(*(client() for _ in range(N_CLIENTS)))

    async def one(self, n: int) -> None:
        """Make one request; an answer that is wrong fails."""
        rng = random.Random(f"{self.seed} {n}")
        kind = rng.choice(KINDS)
        try:
            async with asyncio.timeout(FOREVER_S / 2):
                if kind is cancelled_call:
                    outcome = await self.call(rng)
                else:
                    outcome = await self.connection(kind, rng)
        except BaseException as err:
            err.add_note(f"request {n}, {kind.__name__}")
            raise
        self.outcomes[f"{kind.__name__}: {outcome}"] += 1

    async def connection(self, kind: Kind, rng: random.Random) -> str:
        parts = urlsplit(rng.choice(self.urls))
        peer = Peer(*await asyncio.open_connection(parts.hostname, parts.port))
        try:
            return await kind(peer, parts.path, rng)
        finally:
            if rng.random() < 0.5:
                peer.reset()
            peer.writer.close()
            with contextlib.suppress(OSError):
                await peer.writer.wait_closed()

    async def call(self, rng: random.Random) -> str:
        handle = rng.choice(self.handles)
        response = handle.relay.remote(rng.choice([0, FOREVER_S]))
        await asyncio.sleep(rng.random() * 0.05)
        if rng.random() < 0.5:
            response.cancel()
        with contextlib.suppress(TimeoutError, QueueFullError):
            async with asyncio.timeout(0.05):  # which cancels it as well
                with contextlib.suppress(asyncio.CancelledError):
                    await response
        return "answered" if not response.cancelled() else "cancelled"


Kind = Callable[[Peer, str, random.Random], Awaitable[str]]


def _seconds(rng: random.Random) -> float:
    return round(rng.random() * 0.02, 4)


async def plain(peer: Peer, prefix: str, rng: random.Random) -> str:
    seconds = _seconds(rng)
    peer.send(prefix, f"/work?seconds={seconds}")
    status, body = await peer.answer()
    assert status in (200, 503), (status, body)
    assert status == 503 or json.loads(body) == seconds
    return str(status)


async def whole_upload(peer: Peer, prefix: str, rng: random.Random) -> str:
    size = rng.randrange(300_000)
    peer.send(prefix, "/upload", f"Content-Length: {size}\r\n", method="POST")
    peer.writer.write(bytes(size))
    try:
        status, body = await peer.answer()
    except ConnectionResetError:  # refused, and closed with the body unread
        return "reset"
    assert status in (200, 503), (status, body)
    assert status == 503 or json.loads(body) == size + 1
    return str(status)


async def cut_upload(peer: Peer, prefix: str, rng: random.Random) -> str:
    size = rng.randrange(1, 2_000_000)
    peer.send(prefix, "/upload", f"Content-Length: {size}\r\n", method="POST")
    peer.writer.write(bytes(rng.randrange(size)))
    await asyncio.sleep(_seconds(rng))
    return "left"


async def left_at_once(peer: Peer, prefix: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        peer.writer.write(f"GET {prefix}/work HTTP/1.1\r\nHo".encode())
    else:
        peer.send(prefix, "/work?seconds=0")
    return "left"


async def left_waiting(peer: Peer, prefix: str, rng: random.Random) -> str:
    peer.send(prefix, f"/work?seconds={FOREVER_S}")
    await asyncio.sleep(rng.random() * 0.1)
    return "left"


async def left_stream(peer: Peer, prefix: str, rng: random.Random) -> str:
    peer.send(prefix, f"/stream?chunks={10**6}", "Connection: close\r\n")
    for _ in range(rng.randrange(4)):
        await peer.reader.read(1000)
    return "left"


async def timed_out(peer: Peer, prefix: str, rng: random.Random) -> str:
    limit = f"x-request-timeout-seconds: {0.01 + rng.random() / 10}\r\n"
    peer.send(prefix, f"/work?seconds={FOREVER_S}", limit)
    status, body = await peer.answer()
    assert status in (503, 504), (status, body)
    return str(status)


async def dropped_socket(peer: Peer, prefix: str, rng: random.Random) -> str:
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    )
    peer.send(prefix, "/socket", upgrade)
    if rng.random() < 0.2:
        return "left in the handshake"
    if b" 101 " not in await peer.reader.readuntil(b"\r\n\r\n"):
        return "refused"
    for _ in range(rng.randrange(3)):
        seconds = _seconds(rng)
        peer.frame(str(seconds))
        assert await peer.received_frame() == str(seconds)
    peer.frame(str(_seconds(rng)))
    return "left"


async def pipelined(peer: Peer, prefix: str, rng: random.Random) -> str:
    count = rng.randrange(2, 5)
    slow = rng.random() < 0.5
    for n in range(count):
        path = "/work?seconds=0" if not slow or n else f"/stream?chunks={10**6}"
        peer.send(prefix, path)
    if slow:
        await peer.reader.read(1000)
        return "left"
    for _ in range(count):
        status, body = await peer.answer()
        assert status == 503 or json.loads(body) == 0
    return "answered"


async def cancelled_call(peer: Peer, prefix: str, rng: random.Random) -> str:
    raise AssertionError("goes through a handle")


KINDS: list[Kind] = [
    plain,
    plain,
    whole_upload,
    cut_upload,
    left_at_once,
    left_waiting,
    left_stream,
    timed_out,
    dropped_socket,
    pipelined,
    cancelled_call,
]


@pytest.fixture(scope="module")
def _site() -> Iterator[Site]:
    with open_site(location="EveryNode") as site:
        yield site


@pytest.fixture
def site(_site: Site) -> Iterator[Site]:
    yield _site
    _site.clean()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_nothing_is_left_of_requests_that_were_cancelled(site: Site) -> None:
    seed = int(os.environ.get("DASKSERVE_FUZZ_SEED") or random.randrange(10**6))
    print(f"DASKSERVE_FUZZ_SEED={seed}")
    back = site.deploy(Back, num_replicas=2, max_ongoing_requests=10)
    fronts = [
        site.deploy(FrontApp, back.name, num_replicas=2, max_ongoing_requests=20),
        site.deploy(FrontApp, back.name, where="near", max_ongoing_requests=5),
        site.deploy(
            FrontApp,
            back.name,
            where="far",
            max_ongoing_requests=5,
            max_queued_requests=5,
        ),
    ]
    urls = [
        f"{url}/{front.name}" for front in fronts for url in site.instance.http_urls
    ]
    fuzz = Fuzz(seed, urls, [front.get_handle() for front in fronts])
    for url in urls:
        assert httpx.get(f"{url}/work?seconds=0", timeout=10).json() == 0
    assert fuzz.handles[0].relay.remote(0).result(timeout_s=10) == 0
    idle = idle_inside(site)
    rss = []
    for round_ in range(2):
        asyncio.run(fuzz.run(range(round_ * N_REQUESTS, (round_ + 1) * N_REQUESTS)))
        wait_for_idle(site, idle)
        for url in urls:
            assert httpx.get(f"{url}/work?seconds=0.5", timeout=10).json() == 0.5
        wait_for_idle(site, idle)
        rss.append(resident_bytes(site))
    for outcome, count in sorted(fuzz.outcomes.items()):
        print(f"{count:6} {outcome}")
    growth = {worker: rss[1][worker] / rss[0][worker] - 1 for worker in rss[0]}
    print(f"resident memory: {rss}, growth in the second round: {growth}")
    assert max(growth.values()) < 0.05


@near_and_far
@pytest.mark.parametrize("streams", [False, True])
def test_client_gone_with_requests_behind_the_one_that_runs(
    site: Site, where: str, streams: bool, notes: Notes
) -> None:
    class Endless:
        async def __call__(self) -> Any:
            notes.add("began")
            if streams:
                return self.stream()
            try:
                await asyncio.sleep(FOREVER_S)
            finally:
                notes.add("ended")

        async def stream(self) -> AsyncIterator[str]:
            try:
                while True:
                    yield "more"
                    await asyncio.sleep(0.01)
            finally:
                notes.add("ended")

    deployment = site.deploy(Endless, where=where)
    idle = idle_inside(site)
    with send_request(site.at(deployment)) as sock:
        notes.wait("began")
        for _ in range(3):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    notes.wait("ended")
    wait_for_idle(site, idle)


@near_and_far
@pytest.mark.parametrize("how", ["close", "reset"])
def test_client_gone_while_its_upload_waits_for_room(
    site: Site, where: str, how: str, notes: Notes
) -> None:
    async def never_reads(request: Request) -> None:
        notes.add("began")
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            notes.add("ended")

    deployment = site.deploy(never_reads, where=where)
    idle = idle_inside(site)
    headers = "Content-Length: 100000000\r\n"
    # More than the window has room for; the rest is in the sockets' buffers.
    with send_request(site.at(deployment), "POST", headers, bytes(1_500_000)) as sock:
        notes.wait("began")
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    notes.wait("ended")
    wait_for_idle(site, idle)
    assert " 499 " in site.cluster.logs()


@near_and_far
@pytest.mark.parametrize("argument", ["plain", "request"])
def test_calls_that_nobody_awaits_end_with_their_request(
    site: Site, where: str, argument: str, notes: Notes
) -> None:
    class Called:
        async def __call__(self, argument: Any) -> None:
            notes.add("began")
            try:
                await asyncio.sleep(FOREVER_S)
            finally:
                notes.add("ended")

    called = site.deploy(Called).get_handle()

    class Caller:
        async def __call__(self, request: Request) -> None:
            called.remote(request if argument == "request" else 1)
            await asyncio.sleep(FOREVER_S)

    deployment = site.deploy(Caller, where=where)
    idle = idle_inside(site)
    with send_request(site.at(deployment)):
        notes.wait("began")
    notes.wait("ended")
    wait_for_idle(site, idle)


@near_and_far
def test_calls_of_a_request_whose_time_is_up_end(
    site: Site, where: str, notes: Notes
) -> None:
    class Called:
        async def __call__(self) -> None:
            try:
                await asyncio.sleep(FOREVER_S)
            finally:
                notes.add("ended")

    called = site.deploy(Called).get_handle()

    class Caller:
        async def __call__(self) -> None:
            await called.remote()

    deployment = site.deploy(Caller, where=where, request_timeout_s=0.5)
    idle = idle_inside(site)
    assert httpx.get(site.at(deployment), timeout=10).status_code == 504
    notes.wait("ended")
    wait_for_idle(site, idle)


START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"x"}
#: What misbehaving apps send, how the client finds the answer, and what the log says.
MISBEHAVING: dict[str, tuple[list[dict[str, Any]], list[int], str]] = {
    "body first": ([BODY], [500], "Expected 'http.response.start' before the body"),
    "start twice": ([START, START], [500, CUT], "second 'http.response.start'"),
    "after the end": ([START, BODY, BODY], [200], "after the response was complete"),
    "nothing": ([], [500], "returned without completing its response"),
    "no end": ([START], [500, CUT], "returned without completing its response"),
    "unknown": ([{"type": "http.nonsense"}], [500], "message 'http.nonsense'"),
    "newline": (
        [{**START, "headers": [(b"x-a", b"1\r\nx-b: 2")]}, BODY],
        [500],
        "Invalid HTTP header",
    ),
}


@near_and_far
@pytest.mark.parametrize("name", MISBEHAVING)
def test_misbehaving_app(site: Site, where: str, name: str) -> None:
    events, answers, reason = MISBEHAVING[name]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            for event in events:
                await send(event)

    @serve.ingress(app)
    class Misbehaving: ...

    deployment = site.deploy(Misbehaving, where=where)
    idle = idle_inside(site)
    request_id = f"misbehaving-{name.replace(' ', '-')}-{where}"
    try:
        headers = {"x-request-id": request_id}
        answer = httpx.get(site.at(deployment), headers=headers, timeout=10).status_code
    except httpx.RemoteProtocolError:
        answer = CUT
    assert answer in answers
    wait_for_idle(site, idle)
    assert httpx.get(f"{site.url}/-/healthz", timeout=10).status_code == 200
    failed = f"Request {request_id} to deployment {deployment.name!r} failed"
    log = site.cluster.logs()
    assert failed in log
    assert reason in log[log.index(failed) :].partition(" - INFO - ")[0]
