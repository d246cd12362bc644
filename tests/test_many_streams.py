"""Hundreds of WebSockets and event streams at once, and what HTTP feels of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse

import daskserve as serve
from tests.inside import idle_inside, wait_for_idle
from tests.test_http import Site, near_and_far, open_site
from tests.utils import ROOT

N_SOCKETS = 500
N_STREAMS = 200
#: Between two messages of each.
INTERVAL_S = 1.0
#: Times without and with the streams, in turn.
N_SLICES = int(os.environ.get("DASKSERVE_STREAMS_SLICES", "2"))
SLICE_S = 3.0
#: HTTP requests for each second.
HTTP_RATE = 150

app = FastAPI()


@app.get("/")
async def get() -> str:
    return "http"


@app.get("/events")
async def events(name: int) -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        number = 0
        # They began at the same moment, but are not to be all in step.
        wait_s = random.random() * INTERVAL_S
        while True:
            yield f"data: {name}:{number}\n\n"
            number += 1
            await asyncio.sleep(wait_s)
            wait_s = INTERVAL_S

    return StreamingResponse(parts(), media_type="text/event-stream")


@app.websocket("/socket")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


@serve.ingress(app)
class Streams: ...


@contextmanager
def crowd(url: str) -> Iterator[dict[str, int]]:
    """Keep all streams busy in another process; fill in how many messages came."""
    command = [sys.executable, str(ROOT / "tests" / "crowd.py"), url]
    command += [str(N_SOCKETS), str(N_STREAMS), str(INTERVAL_S)]
    messages: dict[str, int] = {}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield messages
            output, _ = process.communicate(timeout=20)
            assert process.returncode == 0
            messages |= json.loads(output)
        finally:
            process.kill()


async def latencies(url: str, seconds: float) -> list[float]:
    """Make HTTP requests at a steady rate on kept connections; return their times."""
    parts = urlsplit(url)
    head = f"GET {parts.path}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    found: list[float] = []

    async def client(number: int, count: int) -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        began = time.perf_counter() + number / HTTP_RATE
        for n in range(int(seconds * HTTP_RATE / count)):
            await asyncio.sleep(began + n * count / HTTP_RATE - time.perf_counter())
            sent = time.perf_counter()
            writer.write(head)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            assert await reader.readexactly(6) == b'"http"'
            found.append(time.perf_counter() - sent)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client(number, 8) for number in range(8)))
    return found


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as site:
        yield site


@pytest.mark.long
@pytest.mark.timeout(120)
@near_and_far
def test_500_sockets_and_200_streams_beside_http(site: Site, where: str) -> None:
    deployment = site.deploy(Streams, where=where, max_ongoing_requests=1000)
    url = site.at(deployment)
    asyncio.run(latencies(url, 1))
    idle = idle_inside(site)
    without: list[float] = []
    beside: list[float] = []
    for _ in range(N_SLICES):
        without += asyncio.run(latencies(url, SLICE_S))
        with crowd(url) as messages:
            beside += asyncio.run(latencies(url, SLICE_S))
        print(messages)
        # Each one, all the time: some are opened while others send already.
        assert messages["socket"] >= N_SOCKETS * (SLICE_S - 1) / INTERVAL_S
        assert messages["stream"] >= N_STREAMS * (SLICE_S - 1) / INTERVAL_S
        wait_for_idle(site, idle)
    site.clean()
    print(figures(where, without, beside))
    # Loose, for machines that have other things to do as well.
    assert p99(beside) <= 4 * p99(without) + 0.01


def figures(where: str, without: list[float], beside: list[float]) -> str:
    def ms(value: Any) -> str:
        return f"{value * 1e3:.2f} ms"

    return (
        f"{where}: p99 {ms(p99(without))} without, {ms(p99(beside))} beside the "
        f"streams: {p99(beside) / p99(without):.2f} times; median "
        f"{ms(statistics.median(without))} and {ms(statistics.median(beside))}"
    )
