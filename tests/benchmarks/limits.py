"""A row of how many files a process has open when much is deployed; in the command's.

Every server is asked for every deployment: each has callers everywhere.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import daskserve as serve
from tests.benchmarks.lifecycle import empty
from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import QuietCluster
from tests.test_http import Site

WORKERS, DEPLOYMENTS, REPLICAS = 12, 120, 440
#: The common limit, which processes cannot raise here.
OPEN_FILES = 1024


class LimitedCluster(QuietCluster):
    """A cluster whose processes may open so many files and no more."""

    def _place(self, name: str) -> tuple[list[str], list[str]]:
        before, options = super()._place(name)
        # "sh" is the name that the shell itself goes by; then comes the command.
        limit = ["sh", "-c", f'ulimit -n {OPEN_FILES}; exec "$@"', "sh"]
        return [*before, *limit], options


@contextmanager
def _site() -> Iterator[Site]:
    with LimitedCluster(WORKERS, nanny=False, timeout=90) as cluster:
        with cluster.client() as client:
            http_options = {"port": 0, "location": "EveryNode"}
            with serve.start(http_options=http_options) as instance:
                yield Site(cluster, client, instance)


@contextmanager
def _open_files(site: Site, seconds: float) -> Iterator[Sides]:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    def ours() -> Figures:
        for url in urls:
            _ask(url, names)
        counts = site.client.run(count).values()
        at_scheduler = site.client.run_on_scheduler(count)
        return {"most in a worker": max(counts), "in the scheduler": at_scheduler}

    more = REPLICAS % DEPLOYMENTS
    try:
        for number in range(DEPLOYMENTS):
            replicas = REPLICAS // DEPLOYMENTS + (number < more)
            site.deploy(empty(), num_replicas=replicas)
        names = [deployment.name for deployment in site.deployed]
        urls = site.instance.http_urls
        assert len(urls) == WORKERS, urls
        yield Sides(ours)
    finally:
        site.clean()


def _ask(url: str, names: list[str]) -> None:
    """Ask a server for each deployment, several times: replicas take turns."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
    try:
        for name in names * 2:
            connection.request("GET", f"/{name}")
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, (url, name, response.status, body)
    finally:
        connection.close()


BENCHES = [Bench("limits/open-files", "", _site, _open_files)]
