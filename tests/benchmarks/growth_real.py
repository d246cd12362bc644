"""A real cluster of many workers, all in this process, on real connections."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client, LocalCluster

import daskserve as serve


class Echo:
    def __call__(self) -> str:
        return serve.get_replica_context().replica_tag


@contextmanager
def _printed(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    print(f"{what:60} {time.perf_counter() - began:8.2f} s", flush=True)


def print_times(workers: int, deployments: int = 5, replicas: int = 20) -> None:
    """Start, deploy, ask, change a route, lose a worker; print how long each takes."""
    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
    )
    with cluster, Client(cluster) as client:
        with _printed(f"start on {workers} workers"):
            instance = serve.start(client, http_options={"port": 0})
        url = instance.http_urls[0]
        made = [
            serve.deployment(name=f"Echo{n}", num_replicas=replicas)(Echo)
            for n in range(deployments)
        ]
        with _printed(f"deploy {deployments} times {replicas} replicas"):
            for deployment in made:
                deployment.deploy()
        with _printed("1000 requests, one after the other"):
            tags = {_get(f"{url}/Echo{n % deployments}") for n in range(1000)}
        print(f"{'replicas that answered':60} {len(tags):8}")
        with _printed("another route for one"):
            made[0].options(route_prefix="/other").deploy()
        _get(f"{url}/other")
        with _printed("shut down"):
            instance.shutdown()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())
