"""Rows of large bodies, beside plain uvicorn; in the process of the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from tests.benchmarks.rows import Bench, Figures, Sides, repeated
from tests.benchmarks.servers import both, start_site
from tests.benchmarks.wire import download, uploads
from tests.test_http import Site

MB = 10**6
SIZES = {"10MB": 10 * MB, "100MB": 100 * MB, "1GB": 1000 * MB}


def _sides(
    kind: str, size: int, where: str
) -> Callable[[Site, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(site: Site, seconds: float) -> Iterator[Sides]:
        with ExitStack() as stack:
            ours, theirs = stack.enter_context(both(site, "large", f"head-{where}"))
            upload = stack.enter_context(uploads(size))

            def transfer(url: str) -> int:
                if kind == "up":
                    return upload(f"{url}up")
                return download(f"{url}{kind}/{size}", size)

            def measure(url: str) -> Figures:
                return {"MB/s": repeated(lambda: transfer(url), seconds) / MB}

            yield Sides(lambda: measure(ours), lambda: measure(theirs))

    return sides


def _benches() -> Iterator[Bench]:
    for kind in ("up", "down", "whole"):
        for size in ("10MB",) if kind == "whole" else SIZES:
            for where in ("far", "near"):
                name = f"bodies/{kind}/{size}/{where}"
                sides = _sides(kind, SIZES[size], where)
                yield Bench(name, "uvicorn", start_site, sides)


BENCHES = list(_benches())
