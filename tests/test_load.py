"""Many requests at once: each answered right; and how fast beside plain uvicorn."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tests.test_http import Site, open_site
from tests.utils import ROOT, Process, poll

N_REQUESTS = 2000
N_CLIENTS = 100


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the same as `Echo`, for plain uvicorn."""
    if scope["type"] == "http":
        request = Request(scope, receive)
        await JSONResponse(await answer(request))(scope, receive, send)


async def answer(request: Request) -> dict[str, Any]:
    body = (await request.body()).decode()
    return {"n": int(request.query_params["n"]), "body": body}


class Echo:
    async def __call__(self, request: Request) -> dict[str, Any]:
        return await answer(request)


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, n: int
) -> bytes:
    body = b"x" * (n % 50)
    method = "POST" if body else "GET"
    head = f"{method} {path}?n={n} HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 200 "), lines
    (length,) = (int(li[15:]) for li in lines if li.startswith(b"content-length:"))
    return await reader.readexactly(length)


async def _storm(url: str) -> float:
    """Make all requests; return how many a second were answered."""
    parts = urlsplit(url)
    numbers = iter(range(N_REQUESTS))
    answered = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            for n in numbers:
                text = await _exchange(reader, writer, parts.path, n)
                expected = f'{{"n":{n},"body":"{"x" * (n % 50)}"}}'
                assert text.decode() == expected
                answered.append(n)
        finally:
            writer.close()
            await writer.wait_closed()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(N_CLIENTS)))
    seconds = time.perf_counter() - began
    assert sorted(answered) == list(range(N_REQUESTS))
    return N_REQUESTS / seconds


@contextmanager
def plain_uvicorn(directory: Path) -> Iterator[str]:
    """Serve the same app by uvicorn alone, in a process of its own."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_load import app\n"
        "from tests.utils import run_uvicorn\n"
        "import time\n"
        "with run_uvicorn(app, access_log=False) as url:\n"
        "    print(url)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-u", "-c", script, str(ROOT)]
    log = directory / "uvicorn.log"
    process = Process("uvicorn", command, log, {}, directory)

    def url() -> str | None:
        assert process.poll() is None, log.read_text()
        lines = log.read_text().split("\n")
        return lines[-2] if len(lines) > 1 else None

    try:
        yield poll(url, 20)
    finally:
        process.end_group()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as site:
        yield site


def test_2000_requests_at_100_at_once(site: Site, tmp_path: Path) -> None:
    deployment = site.deploy(Echo, num_replicas=2)
    far = site.deploy(Echo, num_replicas=1, where="far")
    rates = {}
    with plain_uvicorn(tmp_path) as url:
        for _ in range(2):  # the second time counts
            rates["plain uvicorn"] = asyncio.run(_storm(url + "/"))
            rates["daskserve, 2 replicas"] = asyncio.run(_storm(site.at(deployment)))
            rates["daskserve, 1 replica on another worker"] = asyncio.run(
                _storm(site.at(far))
            )
    for name, rate in rates.items():
        print(f"{name:40} {rate:8.0f} requests/s")


def test_requests_over_the_room_there_is(site: Site) -> None:
    """100 at once where 2 x 5 fit: all wait their turn, none is lost."""
    deployment = site.deploy(
        Echo, num_replicas=2, max_ongoing_requests=5, max_queued_requests=100
    )
    asyncio.run(_storm(site.at(deployment)))
