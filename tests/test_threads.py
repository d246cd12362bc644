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
from tests.utils import poll

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


@pytest.mark.long
def test_code_that_waits_scales_with_threads(site: Site) -> None:
    one = site.deploy(Reads, where="far").get_handle()
    eight = site.deploy(Reads, where="far", threads=8).get_handle()
    for handle in (one, eight):
        seconds_for(handle, 8)
    times = seconds_for(one, 40), min(seconds_for(eight, 40) for _ in range(5))
    print(f"8 threads: {times[0] / times[1]:.2f} times one")
    assert times[0] > 5 * times[1]


class Meets:
    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)

    def __call__(self) -> str:
        self.barrier.wait(20)
        return "met"


def tags(deployment: serve.Deployment) -> set[str]:
    replicas = serve.status().deployments[deployment.name].replicas
    return {replica.replica_tag for replica in replicas}


def test_other_threads_need_other_replicas(site: Site) -> None:
    deployment = site.make(Meets, version="1")
    deployment.deploy()
    before = tags(deployment)
    deployment = deployment.options(threads=2)
    deployment.deploy()
    assert serve.get_deployment(deployment.name).threads == 2
    poll(lambda: len(tags(deployment)) == 1)
    assert tags(deployment) != before
    with ThreadPoolExecutor(2) as pool:
        urls = [site.at(deployment)] * 2
        found = pool.map(lambda url: httpx.get(url, timeout=30).text, urls)
        assert list(found) == ["met", "met"]


@pytest.mark.parametrize("threads", [0, "4", True, 2.5])
def test_bad_number_is_refused_where_it_stands(threads: Any) -> None:
    with pytest.raises(ValueError, match=f"threads\n.*{threads!r} is not allowed"):
        serve.deployment(threads=threads)


LIMIT_S = 3.0


class Sleeps:
    """Is in no hurry, if asked to."""

    def __call__(self, request: Request) -> str:
        time.sleep(float(request.query_params.get("s", 0)))
        return "awake"


@pytest.mark.long
def test_replica_in_a_call_that_nobody_waits_for(site: Site) -> None:
    """It is named soon, and replaced when that takes too long; the check is far off."""
    deployment = site.deploy(
        Sleeps,
        num_replicas=2,
        threads=2,
        abandoned_call_timeout_s=LIMIT_S,
        health_check_period_s=60,
    )
    url = site.at(deployment)
    before = tags(deployment)

    def reasons() -> list[str]:
        status = serve.status().deployments[deployment.name]
        assert (status.state, status.running_replicas) == ("HEALTHY", 2)
        return [r.reason for r in status.replicas if r.reason]

    headers = {"x-request-timeout-seconds": "0.2"}
    began = time.monotonic()
    # A call that ends again is named, and no more; nor is one that somebody waits for.
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(httpx.get, url, params={"s": LIMIT_S + 2}, timeout=30)
        response = httpx.get(url, params={"s": 2}, headers=headers)
        assert response.status_code == 504
        line = Sleeps.__call__.__code__.co_firstlineno + 1
        (reason,) = poll(reasons)
        assert reason.startswith("busy since ")
        place = f"{__file__}:{line} in __call__()"
        assert f"with a call that nobody waits for: it is at {place}" in reason
        poll(lambda: reasons() == [])
        assert waits.result().text == "awake"
    assert time.monotonic() - began >= LIMIT_S + 2
    assert tags(deployment) == before

    assert httpx.get(url, params={"s": 30}, headers=headers).status_code == 504
    began = time.monotonic()
    deaths = poll(lambda: serve.status().deployments[deployment.name].deaths, 20)
    took_s = time.monotonic() - began
    print(f"replaced {took_s:.1f} s after its call was abandoned")
    assert LIMIT_S - 0.5 <= took_s
    assert deaths[0].replica_tag in before
    reason = f"a call that nobody waits for has run on for {LIMIT_S:g} s"
    assert f"{reason} (abandoned_call_timeout_s)" in deaths[0].reason
    assert place in deaths[0].reason

    def whole() -> bool:
        status = serve.status().deployments[deployment.name]
        running = [r for r in status.replicas if r.state == "RUNNING"]
        return len(running) == 2 and status.state == "HEALTHY"

    poll(whole)
    assert f"{deaths[0].replica_tag} is to be replaced: {reason}" in site.cluster.logs()
    for _ in range(4):
        assert httpx.get(url, timeout=10).text == "awake"
