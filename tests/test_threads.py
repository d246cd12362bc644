"""Sync code of replicas: on one thread, which keeps what is its own, or on several."""

from __future__ import annotations

import decimal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.requests import Request

import daskserve as serve
from tests.test_http import Site, near_and_far, open_site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _site() -> Iterator[Site]:
    with open_site() as site:
        yield site


@pytest.fixture
def site(_site: Site) -> Iterator[Site]:
    yield _site
    _site.clean()


class Store:
    """Keeps what works on the thread only that made it."""

    def __init__(self) -> None:
        self.tag = serve.get_replica_context().replica_tag
        self.database = sqlite3.connect(":memory:")
        self.database.execute("create table t (x)")
        self.local = threading.local()
        self.local.model = "loaded"
        decimal.getcontext().prec = 5

    def reconfigure(self, config: int) -> None:
        self.database.execute("insert into t values (?)", (config,))

    def check_health(self) -> None:
        self.database.execute("select 1")

    def __call__(self, request: Request) -> Iterator[str]:
        for (x,) in self.database.execute("select x from t"):
            yield f"{x} "

    def add(self, x: int) -> int:
        self.database.execute("insert into t values (?)", (x,))
        return int(self.database.execute("select count(*) from t").fetchone()[0])

    def items(self) -> Iterator[int]:
        for (x,) in self.database.execute("select x from t"):
            yield x

    def own(self) -> tuple[str, str, str]:
        return self.tag, self.local.model, str(1 / decimal.Decimal(3))


@near_and_far
def test_what_belongs_to_a_thread(site: Site, where: str) -> None:
    deployment = site.make(Store, where=where, version="1", user_config=10)
    deployment.deploy()
    handle = deployment.get_handle()
    assert [handle.add.remote(x).result(timeout_s=10) for x in (1, 2)] == [2, 3]
    assert list(handle.items.options(stream=True).remote()) == [10, 1, 2]
    assert httpx.get(site.at(deployment)).text == "10 1 2 "
    deployment.options(user_config=20).deploy()
    assert httpx.get(site.at(deployment)).text == "10 1 2 20 "
    (replica,) = serve.status().deployments[deployment.name].replicas
    own = handle.own.remote().result(timeout_s=10)
    assert own == (replica.replica_tag, "loaded", "0.33333")


class Reads:
    def __call__(self) -> None:
        time.sleep(0.05)


def seconds_for(handle: Any, number: int) -> float:
    began = time.monotonic()
    for response in [handle.remote() for _ in range(number)]:
        response.result(timeout_s=60)
    return time.monotonic() - began


def test_code_that_waits_scales_with_threads(site: Site) -> None:
    one = site.deploy(Reads, where="far").get_handle()
    eight = site.deploy(Reads, where="far", threads=8).get_handle()
    for handle in (one, eight):
        seconds_for(handle, 8)
    times = seconds_for(one, 40), seconds_for(eight, 40)
    print(f"8 threads: {times[0] / times[1]:.2f} times one")
    assert times[0] > 5 * times[1]


def test_other_threads_need_other_replicas(site: Site) -> None:
    class Threads:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(2)

        def __call__(self) -> str:
            try:
                self.barrier.wait(0.5)
            except threading.BrokenBarrierError:
                self.barrier.reset()
                return "alone"
            return "met"

    def ask() -> set[str]:
        with ThreadPoolExecutor(2) as pool:
            urls = [site.at(deployment)] * 2
            found = pool.map(lambda url: httpx.get(url, timeout=20).text, urls)
        return set(found)

    deployment = site.make(Threads, version="1")
    deployment.deploy()
    assert "met" not in ask()
    deployment = deployment.options(threads=2)
    assert deployment.threads == 2
    deployment.deploy()
    assert ask() == {"met"}
    assert serve.get_deployment(deployment.name).threads == 2


@pytest.mark.parametrize("threads", [0, "4", True, 2.5])
def test_bad_number_is_refused_where_it_stands(threads: Any) -> None:
    with pytest.raises(ValueError, match=f"threads\n.*{threads!r} is not allowed"):
        serve.deployment(threads=threads)
