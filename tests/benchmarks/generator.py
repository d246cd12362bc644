"""Makes the calls of a load, by HTTP or through a handle; a process of its own.

It gets a target and a load as JSON on stdin and prints what came of the calls. At a
thousand requests a second it takes about a tenth of a core.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

import uvloop
from distributed import Client

from tests.benchmarks.calls import TIMEOUT_S, Done, Load, Send, make
from tests.benchmarks.load import exchange, request_bytes
from tests.utils import ROOT

#: Interpreter, imports and connecting.
START_S = 20


@dataclass(frozen=True)
class Target:
    """What is called.

    Parameters
    ----------
    via
        ``"pool"``: by HTTP, on `Pool`; ``"httpx"``: by HTTP, on that library's;
        ``"handle"``: through a handle of a new client of Dask's.
    urls
        Called in turn; for a handle the scheduler's address alone.
    body
        Sent by POST; None for GET.
    deployment
        The name of what the handle is of.
    """

    via: str
    urls: Sequence[str]
    body: str | None = None
    deployment: str = ""


def generate(target: Target, load: Load) -> list[Done]:
    """Make the calls of a load in another process."""
    job = json.dumps({"target": asdict(target), "load": asdict(load)})
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.generator"],
        input=job,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=load.seconds + TIMEOUT_S + START_S,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    return [Done(*row) for row in json.loads(done.stdout)]


class Pool:
    """Keep-alive connections, as many as there are requests in flight.

    Those that have been idle for longest are used first: all that were opened are used,
    so that servers which share a port all have their part.
    """

    def __init__(self, urls: Sequence[str], body: str | None) -> None:
        self._urls = cycle(urls)
        self._body = body
        self._idle: dict[str, deque[Any]] = {url: deque() for url in urls}
        self._requests: dict[tuple[str, float], bytes] = {}

    async def send(self, ms: float) -> tuple[int, str]:
        url = next(self._urls)
        idle = self._idle[url]
        reader, writer = idle.popleft() if idle else await _connect(url)
        try:
            status, body = await exchange(reader, writer, self._request(url, ms))
        except BaseException:
            writer.close()
            raise
        idle.append((reader, writer))
        return status, body.decode()

    def close(self) -> None:
        for idle in self._idle.values():
            for _, writer in idle:
                writer.close()

    def _request(self, url: str, ms: float) -> bytes:
        request = self._requests.get((url, ms))
        if request is None:
            request = request_bytes(with_ms(url, ms), (), self._body)
            self._requests[url, ms] = request
        return request


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


def with_ms(url: str, ms: float) -> str:
    """Return a URL that says how long the call is to take."""
    return f"{url}?ms={ms:g}"


async def _by_pool(target: Target, load: Load) -> list[Done]:
    with closing(Pool(target.urls, target.body)) as pool:
        return await make(pool.send, load)


async def _by_httpx(target: Target, load: Load) -> list[Done]:
    import httpx  # heavy, and rarely wanted

    urls = cycle(target.urls)

    async def send(ms: float) -> tuple[int, str]:
        response = await client.get(with_ms(next(urls), ms))
        return response.status_code, response.text

    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        return await make(send, load)


def through(deployment: str) -> Send:
    """Return how to call a deployment of `models` from where this runs."""
    import daskserve as serve

    handle = serve.get_deployment(deployment).get_handle().work

    async def send(ms: float) -> tuple[int, str]:
        return 200, await handle.remote(ms)

    return send


def _run(target: Target, load: Load) -> list[Done]:
    if target.via == "handle":
        with Client(*target.urls):
            return uvloop.run(make(through(target.deployment), load))
    by = {"pool": _by_pool, "httpx": _by_httpx}[target.via]
    return uvloop.run(by(target, load))


if __name__ == "__main__":
    _job = json.load(sys.stdin)
    print(json.dumps(_run(Target(**_job["target"]), Load(**_job["load"]))))
