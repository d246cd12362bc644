"""Rows of many small pieces, beside plain uvicorn; in the process of the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tests.benchmarks.apps import BYTE, CHUNK, CHUNKS
from tests.benchmarks.rows import Bench, Figures, Sides, repeated
from tests.benchmarks.servers import both, start_site
from tests.benchmarks.wire import read_many, websockets
from tests.test_http import Site

CLIENTS = 100


def _streams(
    pause_ms: int, where: str
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        def read(url: str) -> int:
            count = read_many(f"{url}stream/{pause_ms}", CLIENTS, BYTE)
            assert count == CLIENTS * CHUNKS * len(CHUNK), count
            return CLIENTS * CHUNKS

        def measure(url: str) -> Figures:
            return {"chunks/s": repeated(lambda: read(url), seconds)}

        with both(site, "large", f"head-{where}") as (ours, theirs):
            yield Sides(lambda: measure(ours), lambda: measure(theirs))

    return sides


def _echo(
    clients: int, where: str
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        with (
            both(site, "large", f"head-{where}") as (ours, theirs),
            websockets(f"{ours}echo", clients) as our_echo,
            websockets(f"{theirs}echo", clients) as their_echo,
        ):
            yield Sides(
                lambda: {"messages/s": our_echo(seconds)},
                lambda: {"messages/s": their_echo(seconds)},
            )

    return sides


def _benches() -> Iterator[Bench]:
    for where in ("far", "near"):
        for pause_ms in (0, 1):
            name = f"streams/{CLIENTS}-clients/{pause_ms}ms/{where}"
            yield Bench(name, "uvicorn", start_site, _streams(pause_ms, where))
    for where in ("far", "near"):
        for clients in (1, 50):
            name = f"websockets/echo/{where}/c={clients}"
            yield Bench(name, "uvicorn", start_site, _echo(clients, where))


BENCHES = list(_benches())
