"""Rows of what features cost: daskserve with one beside daskserve without.

In the process of the command. The instance is started anew on the same cluster for each
measurement, and the client sends the same headers to both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import daskserve as serve
from tests.benchmarks.load import load
from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import QuietCluster, deploy
from tests.test_http import Site
from tests.utils import ProcessCluster, free_port

CONNECTIONS = 10
TOKEN = "a-token-of-usual-length-0123456789"
HEADERS = ["Origin: http://example.org", f"Authorization: Bearer {TOKEN}"]
OPTIONS: dict[str, Mapping[str, Any]] = {
    "middleware": {"middlewares": [Middleware(CORSMiddleware, allow_origins=["*"])]},
    "access-log": {},
    "token": {"token": TOKEN},
}


def _sides(
    feature: str,
) -> Callable[[ProcessCluster, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(cluster: ProcessCluster, seconds: float) -> Iterator[Sides]:
        def ours() -> Figures:
            logged = feature == "access-log"
            return _measure(cluster, seconds, OPTIONS[feature], logged)

        yield Sides(ours, lambda: _measure(cluster, seconds, {}, False))

    return sides


def _measure(
    cluster: ProcessCluster, seconds: float, options: Mapping[str, Any], logged: bool
) -> Figures:
    with cluster.client() as client:
        http = {"port": free_port(), **options}
        with serve.start(http_options=http) as instance:
            site = Site(cluster, client, instance)
            client.run(_log_access, logged)
            try:
                url = deploy(site, "starlette", "head-far", HEADERS)
                return load(url, CONNECTIONS, seconds, HEADERS)
            finally:
                client.run(_log_access, False)


def _log_access(on: bool) -> None:
    """Write the access log to nowhere, as a file would get it; in a worker."""
    logger = logging.getLogger("daskserve.access")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = not on
    logger.setLevel(logging.INFO if on else logging.NOTSET)
    if on:
        handler = logging.FileHandler("/dev/null")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)


_place = partial(QuietCluster, 2, nanny=False)
BENCHES = [Bench(f"features/{f}", "without", _place, _sides(f)) for f in OPTIONS]
