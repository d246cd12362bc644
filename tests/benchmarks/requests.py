"""Rows of small requests, beside plain uvicorn; in the process of the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from tests.benchmarks.apps import PLAIN
from tests.benchmarks.load import load
from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import both, daskserve
from tests.test_http import Site

VARIANTS = ("head-far", "head-near", "every-1", "every-2")
CONNECTIONS = (1, 10, 100)
#: Of many connections, the kernel gives each of two proxies about half.
LEAST_SHARE = 0.05


def _benches() -> Iterator[Bench]:
    for variant in VARIANTS:
        place = partial(daskserve, variant)
        for app in PLAIN:
            for c in CONNECTIONS:
                name = f"{app}/{variant}/c={c}"
                yield Bench(name, "uvicorn", place, _sides(app, variant, c))


def _sides(
    app: str, variant: str, connections: int
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        def ours() -> Figures:
            before = _requests(site)
            figures = load(url, connections, seconds)
            done = [n - b for n, b in zip(_requests(site), before, strict=True)]
            if len(done) > 1 and connections > 1:
                assert min(done) >= LEAST_SHARE * sum(done), f"not shared: {done}"
            return figures

        with both(site, app, variant) as (url, plain):
            yield Sides(ours, lambda: load(plain, connections, seconds))

    return sides


def _requests(site: Site) -> list[int]:
    """Return how many requests each proxy has had."""

    def count(dask_worker: object) -> int | None:
        server = dask_worker.plugins["daskserve"]._server  # type: ignore[attr-defined]
        if server is None:
            return None
        return int(server._server.server_state.total_requests)

    counts = site.client.run(count)
    return [counts[worker] for worker in sorted(counts) if counts[worker] is not None]


BENCHES = list(_benches())
