"""Rows of calls from Python, beside calls of plain Dask actors.

The same class is deployed and submitted as an actor, on the same worker of the same
cluster. Who calls is the process of the command, or a replica and an actor in another
worker.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from statistics import median
from typing import Any

from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import start_site
from tests.test_http import Site

TIMEOUT_S = 30
IN_FLIGHT = (1, 100)
#: Sizes of arrays that go there, and there and back, in MB.
ARRAYS = (1, 10, 100)


class Noop:
    """What is called."""

    def __call__(self) -> None:
        """Deployments have one."""

    def sync(self) -> None:
        """Run in a thread, by daskserve and by Dask."""

    async def coro(self) -> None:
        """Run on a loop."""

    def take(self, array: Any) -> int:
        """Take an array."""
        return int(array.nbytes)

    def echo(self, array: Any) -> Any:
        """Take an array and return it."""
        return array


class Caller:
    """Calls from where it runs."""

    def __call__(self) -> None:
        """Deployments have one."""

    async def call_deployment(
        self, name: str, method: str, in_flight: int, seconds: float
    ) -> Figures:
        import daskserve as serve

        handle = getattr(serve.get_deployment(name).get_handle(), method)
        return await call_many(handle.remote, in_flight, seconds)

    async def call_actor(
        self, actor: Any, method: str, in_flight: int, seconds: float
    ) -> Figures:
        return await call_many(getattr(actor, method), in_flight, seconds)


async def call_many(call: Callable[[], Any], in_flight: int, seconds: float) -> Figures:
    """Await calls, so many at a time."""
    latencies: list[float] = []
    deadline = (start := time.perf_counter()) + seconds

    async def keep_calling() -> None:
        while (began := time.perf_counter()) < deadline:
            await call()
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(keep_calling() for _ in range(in_flight)))
    return _figures(latencies, time.perf_counter() - start)


def call_and_wait(call: Callable[[], Any], in_flight: int, seconds: float) -> Figures:
    """Ask for results, so many calls ahead."""
    latencies: list[float] = []
    calls: deque[tuple[float, Any]] = deque()
    deadline = (start := time.perf_counter()) + seconds
    while time.perf_counter() < deadline:
        while len(calls) < in_flight:
            calls.append((time.perf_counter(), call()))
        began, response = calls.popleft()
        response.result(timeout=TIMEOUT_S)
        latencies.append(time.perf_counter() - began)
    figures = _figures(latencies, time.perf_counter() - start)
    for _, response in calls:
        response.result(timeout=TIMEOUT_S)
    return figures


def _figures(latencies: list[float], seconds: float) -> Figures:
    return {
        "calls/s": len(latencies) / seconds,
        "p50 us": median(latencies) * 1e6,
    }


def _from_client(
    method: str, in_flight: int
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        try:
            deployment = site.deploy(Noop, where="far", route_prefix=None)
            actor = _actor(site, Noop, "far")
            remote = getattr(deployment.get_handle(), method).remote
            yield Sides(
                lambda: call_and_wait(remote, in_flight, seconds),
                lambda: call_and_wait(getattr(actor, method), in_flight, seconds),
            )
        finally:
            site.clean()

    return sides


def _from_replica(
    method: str, in_flight: int
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        def ours() -> Figures:
            call = handle.call_deployment.remote(noop.name, method, in_flight, seconds)
            figures: Figures = call.result(timeout=seconds + TIMEOUT_S)
            return figures

        def theirs() -> Figures:
            call = caller.call_actor(actor, method, in_flight, seconds)
            figures: Figures = call.result(timeout=seconds + TIMEOUT_S)
            return figures

        try:
            noop = site.deploy(Noop, where="far", route_prefix=None)
            handle = site.deploy(Caller, where="near", route_prefix=None).get_handle()
            actor, caller = _actor(site, Noop, "far"), _actor(site, Caller, "near")
            yield Sides(ours, theirs)
        finally:
            site.clean()

    return sides


def _arrays(
    method: str, size: int
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    """Send an array from a client, one call at a time."""

    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        import numpy as np

        array = np.random.default_rng(0).random(size // 8)
        try:
            deployment = site.deploy(Noop, where="far", route_prefix=None)
            actor = _actor(site, Noop, "far")
            ours = partial(getattr(deployment.get_handle(), method).remote, array)
            theirs = partial(getattr(actor, method), array)
            yield Sides(
                lambda: call_and_wait(ours, 1, seconds),
                lambda: call_and_wait(theirs, 1, seconds),
            )
        finally:
            site.clean()

    return sides


def _actor(site: Site, cls: type, where: str) -> Any:
    future = site.client.submit(cls, actor=True, pure=False, **site.place(where))
    return future.result(timeout=TIMEOUT_S)


def _benches() -> Iterator[Bench]:
    for caller, sides in (("client", _from_client), ("replica", _from_replica)):
        for method in ("coro", "sync"):
            for n in IN_FLIGHT:
                name = f"handles/{caller}/{method}/c={n}"
                yield Bench(name, "Dask actor", start_site, sides(method, n))
    for method in ("take", "echo"):
        for size in ARRAYS:
            name = f"handles/arrays/{method}/{size}MB"
            yield Bench(name, "Dask actor", start_site, _arrays(method, size * 10**6))


BENCHES = list(_benches())
