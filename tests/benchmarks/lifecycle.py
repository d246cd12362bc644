"""Rows of deploying, updating and deleting; in the process of the command.

Nobody to compare with: the figures are milliseconds, one of each in a round.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from urllib.parse import urlsplit

import daskserve as serve
from tests.benchmarks.rows import Bench, Figures, Sides, timed
from tests.benchmarks.servers import start_site
from tests.test_http import Site

TIMEOUT_S = 30
REPLICAS = (1, 2, 10, 50)
PROXIES = 4
#: So many that each proxy has some: the kernel deals them out.
CONNECTIONS = 60


def empty() -> type:
    """Make a class that travels by value: workers need not import this module."""

    class Empty:
        def __call__(self) -> str:
            return "here"

    return Empty


def _deploy(replicas: int) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        def ours() -> Figures:
            deployment = site.make(empty(), num_replicas=replicas)
            try:
                with _connected(site.url) as connection:
                    passed = timed(lambda: _deploy_and_ask(deployment, connection))
            finally:
                site.clean()
            return {"ms": passed * 1e3}

        yield Sides(ours)

    return sides


def _deploy_and_ask(
    deployment: serve.Deployment, connection: http.client.HTTPConnection
) -> None:
    deployment.deploy()
    status = _status(connection, f"/{deployment.name}")
    assert status == 200, f"{status} after deploy()"


def _delete(replicas: int) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        def ours() -> Figures:
            site.deploy(empty(), num_replicas=replicas)
            return {"ms": timed(site.clean) * 1e3}

        yield Sides(ours)

    return sides


@contextmanager
def _route_update(site: Site, seconds: float) -> Iterator[Sides]:
    """Move a route to and fro, and ask every proxy on connections that are open."""
    deployment = site.deploy(empty(), version="1")
    here, there = f"/{deployment.name}", "/there"

    def move() -> None:
        deployment.options(route_prefix=there).deploy()
        for connection in connections:
            assert _status(connection, there) == 200

    def ours() -> Figures:
        nonlocal here, there
        passed = timed(move)
        for connection in connections:
            assert _status(connection, here) == 404
        here, there = there, here
        return {"ms": passed * 1e3}

    with ExitStack() as stack:
        stack.callback(site.clean)
        connections = [
            stack.enter_context(_connected(site.url)) for _ in range(CONNECTIONS)
        ]
        for connection in connections:
            assert _status(connection, here) == 200
        held = _connections(site)
        assert len(held) == PROXIES and all(held), f"proxies without any: {held}"
        yield Sides(ours)


def _connections(site: Site) -> list[int]:
    """Return how many connections each proxy has."""

    def count(dask_worker: object) -> int:
        server = dask_worker.plugins["daskserve"]._server  # type: ignore[attr-defined]
        return len(server._server.server_state.connections)

    return list(site.client.run(count).values())


@contextmanager
def _connected(url: str) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        str(parts.hostname), parts.port, timeout=TIMEOUT_S
    )
    connection.connect()
    try:
        yield connection
    finally:
        connection.close()


def _status(connection: http.client.HTTPConnection, path: str) -> int:
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response.status


_every_node = partial(start_site, PROXIES, "EveryNode")
BENCHES = [
    *(Bench(f"deploy/{n}", "", start_site, _deploy(n)) for n in REPLICAS),
    *(Bench(f"delete/{n}", "", start_site, _delete(n)) for n in REPLICAS),
    Bench("deploy/route-update", "", _every_node, _route_update),
]
