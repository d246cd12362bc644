"""Who calls in the rows of work, and the clusters they call in; the command's process.

A caller is a context manager that gives a function which makes the calls of a load on a
deployment of `models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import daskserve as serve
from tests.benchmarks import models
from tests.benchmarks.calls import TIMEOUT_S, Done, Load
from tests.benchmarks.generator import Target, generate
from tests.benchmarks.servers import start_site
from tests.test_http import Site

MakeCalls = Callable[[Load], list[Done]]
Caller = Callable[[Site, serve.Deployment], AbstractContextManager[MakeCalls]]

#: A model's own threads would take the other replicas' cores.
ENV = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


@contextmanager
def by_http(
    site: Site, deployment: serve.Deployment, via: str = "pool"
) -> Iterator[MakeCalls]:
    path = site.at(deployment).removeprefix(site.url)
    urls = [url + path for url in site.instance.http_urls]
    yield partial(generate, Target(via, urls))


#: What users would write; it costs the client's process much more.
by_httpx: Caller = partial(by_http, via="httpx")


@contextmanager
def by_replica(site: Site, deployment: serve.Deployment) -> Iterator[MakeCalls]:
    """Call from a replica on the worker of one of those that are called."""
    relay = site.deploy(models.Relay, where="near", route_prefix=None).get_handle()

    def make(load: Load) -> list[Done]:
        call = relay.make.remote(deployment.name, load)
        done: list[Done] = call.result(timeout=load.seconds + 2 * TIMEOUT_S)
        return done

    yield make


@contextmanager
def by_task(site: Site, deployment: serve.Deployment) -> Iterator[MakeCalls]:
    """Call from a Dask task on the worker of one of those that are called."""

    def make(load: Load) -> list[Done]:
        future = site.client.submit(
            models.call_in_task,
            deployment.name,
            load,
            workers=[site.near],
            pure=False,
        )
        done: list[Done] = future.result(timeout=load.seconds + 2 * TIMEOUT_S)
        return done

    yield make


@contextmanager
def by_client(site: Site, deployment: serve.Deployment) -> Iterator[MakeCalls]:
    """Call from a client that has never called before, in a process of its own."""
    target = Target("handle", [site.cluster.address], deployment=deployment.name)
    yield partial(generate, target)


_head = {"head": by_http, "replica": by_replica, "task": by_task, "client": by_client}
#: By the options of `start_site`, the callers by the names that rows have for them.
CALLERS: list[tuple[Mapping[str, Any], Mapping[str, Caller]]] = [
    ({"location": "HeadOnly"}, _head),
    ({"location": "HeadOnly", "server_first": True}, {"scheduler": by_http}),
    ({"location": "EveryNode"}, {"every": by_http}),
    ({"location": "EveryNode", "own_ports": True}, {"every-0": by_http}),
]


def places(
    workers: int,
) -> Iterator[tuple[Callable[[], AbstractContextManager[Site]], Mapping[str, Caller]]]:
    """Give what starts each cluster, and those who call there."""
    for options, callers in CALLERS:
        yield partial(start_site, workers, env=ENV, **options), callers
