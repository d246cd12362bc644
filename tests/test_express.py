"""The quick way through a proxy: who takes it, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from distributed import Worker
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from daskserve.proxy import express
from tests.inside import idle_inside, wait_for_idle
from tests.test_http import Site, connect, open_site, send_request
from tests.utils import poll


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as site:
        yield site


async def wait(request: Request) -> str:
    await asyncio.sleep(float(request.query_params.get("s", 0)))
    return "done"


async def answer(request: Request) -> Response:
    kind = request.query_params["kind"]
    if kind == "stream":
        await asyncio.sleep(float(request.query_params.get("s", 0)))
        return StreamingResponse(iter(["a", "b"]))
    if kind == "large":
        return Response(b"x" * 1_000_000)
    if kind == "close":
        return Response("bye", headers={"connection": "close"})
    if kind == "raise":
        raise ValueError(kind)
    if kind == "empty":
        return Response(status_code=204)
    return Response((await request.body()).decode() or kind)


def _ways(dask_worker: Worker) -> tuple[int, int]:
    """Return how many requests go the quick way and the ordinary one."""
    plugin: Any = dask_worker.plugins["daskserve"]
    if plugin._server is None:
        return 0, 0
    server = plugin._server
    return len(server._guard.express.running), len(server._server.server_state.tasks)


def ways(site: Site) -> tuple[int, int]:
    both = site.client.run(_ways).values()
    return sum(quick for quick, _ in both), sum(ordinary for _, ordinary in both)


def answered(socks: list[socket.socket]) -> None:
    for sock in socks:
        read_until(sock, b"done")
        sock.close()


def read_until(sock: socket.socket, what: bytes, times: int = 1) -> bytes:
    got = b""
    while got.count(what) < times:
        assert (data := sock.recv(10_000)), got
        got += data
    return got


def test_requests_that_wait_have_no_task(site: Site) -> None:
    idle = idle_inside(site)
    url = site.at(site.deploy(wait)) + "?s=1"
    socks = [send_request(url) for _ in range(5)]
    poll(lambda: ways(site) == (5, 0), 5)
    answered(socks)
    site.clean()
    wait_for_idle(site, idle)


def test_what_is_not_simple_goes_the_ordinary_way(site: Site) -> None:
    idle = idle_inside(site)
    url = site.at(site.deploy(answer))
    with httpx.Client() as client:
        for kind, status, body in [
            ("plain", 200, b"plain"),
            ("stream", 200, b"ab"),
            ("large", 200, b"x" * 1_000_000),
            ("close", 200, b"bye"),
            ("raise", 500, b"Internal Server Error"),
            ("empty", 204, b""),
            ("plain", 200, b"plain"),
        ]:
            response = client.get(f"{url}?kind={kind}")
            assert (response.status_code, response.content) == (status, body)
            assert len(response.headers["x-request-id"]) > 10
        for size in (1, 60_000, 70_000, 3_000_000):
            sent = "y" * size
            assert client.post(f"{url}?kind=body", content=sent).text == sent
        head = client.head(f"{url}?kind=plain")
        assert head.headers["content-length"] == "5" and head.content == b""
    site.clean()
    wait_for_idle(site, idle)


def test_requests_wait_for_a_replica_on_the_quick_way(site: Site) -> None:
    idle = idle_inside(site)
    url = site.at(site.deploy(wait, max_ongoing_requests=2)) + "?s=0.5"
    socks = [send_request(url) for _ in range(6)]
    poll(lambda: ways(site) == (6, 0), 5)
    answered(socks)
    site.clean()
    wait_for_idle(site, idle)


def test_a_client_that_leaves_ends_its_request(site: Site) -> None:
    idle = idle_inside(site)
    url = site.at(site.deploy(wait)) + "?s=60"
    socks = [send_request(url) for _ in range(3)]
    poll(lambda: ways(site) == (3, 0), 5)
    for sock in socks:
        sock.close()
    poll(lambda: ways(site) == (0, 0), 5)
    site.clean()
    wait_for_idle(site, idle)


def _set_exact_timeout(seconds: float) -> float:
    before, express.EXACT_TIMEOUT_S = express.EXACT_TIMEOUT_S, seconds
    return before


@pytest.mark.parametrize("exact", [True, False])
def test_timeouts_are_kept(site: Site, exact: bool) -> None:
    """Short ones exactly, long ones by a sweep."""
    url = site.at(site.deploy(wait)) + "?s=60"
    if not exact:
        before = site.client.run(_set_exact_timeout, 0)
    try:
        began = time.monotonic()
        with send_request(url, headers="x-request-timeout-seconds: 0.4\r\n") as sock:
            assert sock.recv(1000).startswith(b"HTTP/1.1 504 ")
        assert 0.4 <= time.monotonic() - began < 3
    finally:
        if not exact:
            site.client.run(_set_exact_timeout, max(before.values()))
    site.clean()


def test_pipelined_requests_are_answered_in_turn(site: Site) -> None:
    url = site.at(site.deploy(wait))
    path = urlsplit(url).path
    with connect(url) as sock:
        lines = [
            f"GET {path}?s={s} HTTP/1.1\r\nhost: x\r\nx-request-id: r{s}\r\n\r\n"
            for s in (0.3, 0, 0.1)
        ]
        sock.sendall("".join(lines).encode())
        got = read_until(sock, b"done", 3)
    order = [got.index(f"x-request-id: r{s}".encode()) for s in (0.3, 0, 0.1)]
    assert order == sorted(order)
    site.clean()


def test_a_body_behind_a_request_that_is_taken_over(site: Site) -> None:
    """It belongs to the second one, though the first left the quick way meanwhile."""
    url = site.at(site.deploy(answer))
    path, body = urlsplit(url).path, b"0123456789" * 10
    with connect(url) as sock:
        sock.sendall(
            b"GET %s?kind=stream&s=0.4 HTTP/1.1\r\nhost: x\r\n\r\n"
            b"POST %s?kind=body HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n%s"
            % (path.encode(), path.encode(), body[:30])
        )
        read_until(sock, b"0\r\n\r\n")
        sock.sendall(body[30:])
        read_until(sock, body)
    site.clean()
