"""What is fuzzed: a server and a replica in one worker's process, and a watch on it."""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dask
import psutil

import daskserve as serve
from tests.fuzz.mutations import pieces
from tests.utils import ProcessCluster

#: Limits of one connection, so short that each is met often, and not by those who only
#: have to wait for their turn on a machine in use.
LIMITS: dict[str, Any] = {
    "header_timeout_s": 5,
    "stall_timeout_s": 5,
    "keep_alive_timeout_s": 3,
    "request_timeout_s": 5,
    "max_header_bytes": 16 * 1024,
    "max_request_body_bytes": 2**20,
}
#: When a connection that nothing is sent on any more has to be over: one limit after
#: another, and what a machine in use adds.
OVER_S = 30.0


def make_echo() -> Any:
    """Return an ASGI app that says what it was sent; in a function, to travel whole."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (event := await receive())["type"] != "websocket.disconnect":
                await send({**event, "type": "websocket.send"})
            return
        body, more = b"", True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body, more = body + event["body"], event["more_body"]
        answer = b"x" * 500_000 if scope["path"].endswith("/large") else b"hello"
        given = dict(scope["headers"]).get(b"x-id", b"")
        said = b"%s/%d/%d" % (given, len(body), zlib.crc32(body))
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"x-echo", said),
                    (b"content-length", b"%d" % len(answer)),
                ],
            }
        )
        await send({"type": "http.response.body", "body": answer})

    return echo


class Target:
    """A cluster with the echo at ``/echo``.

    Attributes
    ----------
    process
        The worker, which has the server and the replica.
    port, direct
        Of the server; and host, port and secret of the replica's own.
    """

    def __init__(self, cluster: ProcessCluster, client: Any, **options: Any) -> None:
        self._cluster = cluster
        instance = serve.start(http_options={"port": 0, **LIMITS, **options})
        serve.deployment(name="echo", route_prefix="/echo", max_ongoing_requests=1000)(
            serve.ingress(make_echo)(type("Echo", (), {}))
        ).deploy()
        self.port = int(instance.http_urls[0].rpartition(":")[2])
        self.process = psutil.Process(cluster.workers[0].pid)
        self.direct: tuple[str, int, bytes] = client.run(_direct_address).popitem()[1]

    def logs(self) -> str:
        """Return what all processes have printed."""
        return self._cluster.logs()

    def open(self) -> tuple[float, int]:
        """Return the memory in MiB and the number of open files."""
        return self.process.memory_info().rss / 2**20, self.process.num_fds()


def _direct_address() -> Any:
    from daskserve.session import current_session

    (replica,) = current_session().dispatcher.snapshot["deployments"]["echo"][
        "replicas"
    ]
    return tuple(replica[3])


def nanny_environment() -> dict[str, str]:
    """Return what nannies set: with it, allocators give back what is free."""
    environ = dask.config.get("distributed.nanny.pre-spawn-environ")
    return {name: str(value) for name, value in environ.items()}


@contextmanager
def open_target(**options: Any) -> Iterator[Target]:
    """Start a cluster to be fuzzed, with more HTTP options."""
    with (
        ProcessCluster(1, nanny=False, env=nanny_environment()) as cluster,
        cluster.client() as client,
    ):
        yield Target(cluster, client, **options)


async def talk(
    rng: random.Random, address: tuple[str, int], data: Iterable[bytes]
) -> tuple[bytes, bool]:
    """Send data in pieces; return what came until the server closed, and if it did."""
    reader, writer = await asyncio.open_connection(*address)

    async def send() -> None:
        with suppress(OSError):
            for each in data:
                parts = pieces(rng, each)
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    # Never so slow that a limit is met.
                    await asyncio.sleep(rng.random() * 0.05 / len(parts))

    sending = asyncio.create_task(send())
    answer = b""
    began = time.monotonic()
    try:
        async with asyncio.timeout(OVER_S):
            with suppress(ConnectionError):
                while part := await reader.read(65536):
                    answer += part
    except TimeoutError:
        return answer, False
    finally:
        sending.cancel()
        writer.transport.abort()
    longest[0] = max(longest[0], time.monotonic() - began)
    return answer, True


#: Seconds that the longest connection has lived.
longest = [0.0]
