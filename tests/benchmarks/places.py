"""Rows of more requests than a replica takes at once; in the command's process.

Requests are empty: what shows is what waiting itself costs, and whether all that wait
get their turn.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from tests.benchmarks import apps
from tests.benchmarks.load import load
from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import served, start_site
from tests.benchmarks.wire import idle_websockets, refused_websocket
from tests.test_http import Site

#: More than clients of any row; a replica takes 100 by default.
ROOM = 2000
CLIENTS = (90, 200, 500, 1000)
CALLERS, CLIENTS_EACH = 3, 200
WEBSOCKETS, CONNECTIONS = 1000, 10


@contextmanager
def _site(workers: int, location: str, own_ports: bool = False) -> Iterator[Site]:
    """Start a site whose processes, like this one, may hold many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with start_site(workers, location, own_ports=own_ports) as site:
            yield site
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _queue(
    clients: int, where: str
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    """Load a replica with the places that it has by default, beside room for all."""

    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        def measure(url: str) -> Figures:
            figures = load(url, clients, seconds)
            # If all wait equally long, each waits for one round of all clients.
            round_us = clients / figures["req/s"] * 1e6
            return {**figures, "p99 / round": figures["p99 us"] / round_us}

        try:
            ours = site.at(site.deploy(apps.function, where=where))
            room = {"max_ongoing_requests": ROOM}
            theirs = site.at(site.deploy(apps.function, where=where, **room))
            yield Sides(lambda: measure(ours), lambda: measure(theirs))
        finally:
            site.clean()

    return sides


@contextmanager
def _callers(site: Site, seconds: float) -> Iterator[Sides]:
    """Load a replica through all servers, one of which is in its process."""

    def ours() -> Figures:
        each = [*pool.map(lambda url: load(url, CLIENTS_EACH, seconds), urls)]
        rates = [figures["req/s"] for figures in each]
        return {
            "req/s": sum(rates),
            "least share": min(rates) / sum(rates) * CALLERS,
            "p99 us": max(figures["p99 us"] for figures in each),
        }

    try:
        path = site.at(site.deploy(apps.function, where="near"))[len(site.url) :]
        urls = [url + path for url in site.instance.http_urls]
        assert len(urls) == CALLERS, urls
        with ThreadPoolExecutor(CALLERS) as pool:
            yield Sides(ours)
    finally:
        site.clean()


@contextmanager
def _idle_websockets(site: Site, seconds: float) -> Iterator[Sides]:
    """Load a replica that holds WebSockets, beside the same without them."""

    def ours() -> Figures:
        with idle_websockets(f"{url}echo", WEBSOCKETS):
            return load(url, CONNECTIONS, seconds)

    try:
        url = site.at(site.deploy(served("large"), where="far"), "/")
        yield Sides(ours, lambda: load(url, CONNECTIONS, seconds))
    finally:
        site.clean()


@contextmanager
def _refused_websocket(site: Site, seconds: float) -> Iterator[Sides]:
    def ours() -> Figures:
        with idle_websockets(url, WEBSOCKETS):
            return {"ms": refused_websocket(url) * 1000}

    try:
        url = site.at(site.deploy(served("large"), where="far"), "/echo")
        yield Sides(ours)
    finally:
        site.clean()


def _benches() -> Iterator[Bench]:
    for where in ("near", "far"):
        for n in CLIENTS:
            name = f"places/{where}/c={n}"
            yield Bench(name, "room for all", _head, _queue(n, where))
    name = f"places/websockets/{WEBSOCKETS}-idle"
    yield Bench(name, "without", _head, _idle_websockets)
    yield Bench("places/websockets/refused", "", _head, _refused_websocket)
    name = f"places/{CALLERS}-callers/c={CLIENTS_EACH}"
    yield Bench(name, "", _every_node, _callers)


_head = partial(_site, 2, "HeadOnly")
_every_node = partial(_site, CALLERS, "EveryNode", own_ports=True)
BENCHES = list(_benches())
