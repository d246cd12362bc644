"""Rows of `@serve.batch`: a model that takes 5 ms for each call and 0.2 ms for an item.

In the process of the command. 200 connections; the opponent calls the model once for
each request. The best fixed size is to be found by hand among the rows; beside it is
the one that is found while it runs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import daskserve as serve
from tests.benchmarks.load import load
from tests.benchmarks.rows import Bench, Sides
from tests.benchmarks.servers import start_site
from tests.test_http import Site

CONNECTIONS = 200
CALL_S, ITEM_S = 0.005, 0.0002
OPTIONS: dict[str, dict[str, Any]] = {
    f"fixed-{size}": {"max_batch_size": size, "batch_wait_timeout_s": "5ms"}
    for size in (25, 50, 100, 200)
}
OPTIONS["adaptive"] = {"target_latency_s": "50ms"}


class Model:
    """Takes its time, one call after the other, as on a GPU."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def predict(self, items: list[int]) -> list[int]:
        with self._lock:
            time.sleep(CALL_S + ITEM_S * len(items))
            return [item + 1 for item in items]


def _one_by_one() -> type:
    class Single:
        def __init__(self) -> None:
            self.model = Model()

        def __call__(self) -> int:
            return self.model.predict([1])[0]

    return Single


def _batched(options: dict[str, Any]) -> type:
    class Batched:
        def __init__(self) -> None:
            self.model = Model()

        @serve.batch(**options)
        async def predict(self, items: list[int]) -> list[int]:
            return await asyncio.to_thread(self.model.predict, items)

        async def __call__(self) -> int:
            return await self.predict(1)  # type: ignore[arg-type, return-value]

    return Batched


def _sides(
    options: dict[str, Any],
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        limits = {"max_ongoing_requests": 2 * CONNECTIONS}
        try:
            single = site.deploy(_one_by_one(), where="far", **limits)
            batched = site.deploy(_batched(options), where="far", **limits)
            load(site.at(batched), CONNECTIONS, seconds)  # until its size is found
            yield Sides(
                lambda: load(site.at(batched), CONNECTIONS, seconds),
                lambda: load(site.at(single), CONNECTIONS, seconds),
            )
        finally:
            site.clean()

    return sides


BENCHES = [
    Bench(f"batching/{name}", "one by one", start_site, _sides(options))
    for name, options in OPTIONS.items()
]
