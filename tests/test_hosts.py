"""Replicas on more than one host: network namespaces, with a cluster across them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from distributed import Client
from starlette.requests import Request

import daskserve as serve
from tests.hosts import Host, HostCluster, open_hosts, seconds_of
from tests.utils import need_program, poll

SILENCE_S = 1.5
#: Dask's heartbeats decide at the earliest after ten of them, which are 5 s.
ENV = {
    "DASK_DASKSERVE__TRANSPORT__SILENCE_TIMEOUT": f"{SILENCE_S}s",
    "DASK_DASKSERVE__TRANSPORT__CONNECT_TIMEOUT": "1s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s",
    "DASK_LOGGING__DASKSERVE": "info",
}


@dataclass
class Net:
    """Hosts and the cluster on them: the scheduler on `a`, workers on `b` and `c`."""

    a: Host
    b: Host
    c: Host
    cluster: HostCluster
    client: Client

    def direct(self) -> dict[str, list[tuple[str, list[str]]]]:
        """Return where the replicas of each host listen, and who is connected there."""
        return {
            address.split("//")[1].split(":")[0]: found
            for address, found in self.client.run(_listeners).items()
        }


def _listeners(dask_worker: Any) -> list[tuple[str, list[str]]]:
    listeners = [
        runner._listener for runner in dask_worker.plugins["daskserve"].runners.values()
    ]
    return [
        (
            listener._server.sockets[0].getsockname()[0],
            [p._transport.get_extra_info("peername")[0] for p in listener._pipes],
        )
        for listener in listeners
    ]


def _ongoing(dask_worker: Any) -> int:
    plugin = dask_worker.plugins["daskserve"]
    return sum(runner.ongoing for runner in plugin.runners.values())


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with open_hosts(3) as (a, b, c):
        # Ports of Dask's that a firewall knows.
        known = {"scheduler_args": ["--port", "8786"]}
        known["worker_args"] = ["--worker-port", "9000"]
        with HostCluster(a, [b, c], env=ENV, **known) as cluster:
            with cluster.client() as client:
                yield Net(a, b, c, cluster, client)


@contextmanager
def started(**http: Any) -> Iterator[serve.ServeInstance]:
    with serve.start(http_options={"port": 8000, **http}) as instance:
        yield instance


@serve.deployment(route_prefix="/where", num_replicas=2)
class Where:
    """Says on which host it is."""

    async def __call__(self, request: Request) -> str:
        await asyncio.sleep(float(request.query_params.get("s", "0")))
        return serve.get_replica_context().replica_tag

    def tag(self) -> str:
        return serve.get_replica_context().replica_tag


def hosts_of(name: str = "Where") -> dict[str, str]:
    """Return the hosts of the replicas that run, by tag."""
    status = serve.status().deployments[name]
    return {
        replica.replica_tag: str(replica.host)
        for replica in status.replicas
        if replica.state == "RUNNING"
    }


def answers(url: str, count: int = 30) -> set[str]:
    """Return who has answered so many requests at once."""

    def ask(_: int) -> str:
        response = client.get(url)
        assert response.status_code == 200, response.text
        return response.text

    with httpx.Client(timeout=10) as client, ThreadPoolExecutor(10) as pool:
        return set(pool.map(ask, range(count)))


def test_head_alone(net: Net) -> None:
    with started(host="0.0.0.0") as instance:
        url = f"http://{net.a.address}:8000"
        assert instance.http_urls == [url]
        (proxy,) = serve.status().proxies
        assert (proxy.worker, proxy.host) == ("scheduler", net.a.address)
        assert proxy.url == url
        Where.deploy()
        places = hosts_of()
        assert sorted(places.values()) == [net.b.address, net.c.address]
        assert answers(f"{url}/where?s=0.02") == set(places)
        handle = Where.get_handle()
        called: set[str] = set()

        def all_called() -> bool:
            calls = [handle.tag.remote() for _ in range(10)]
            called.update(call.result(timeout_s=5) for call in calls)
            return called == set(places)

        poll(all_called, 5)
        # All that by direct connections, to the address that the worker has.
        machine = _machine(net)
        for host in (net.b, net.c):
            ((bound, callers),) = net.direct()[host.address]
            assert bound == host.address
            assert sorted(callers) == sorted([net.a.address, machine])


def _machine(net: Net) -> str:
    return net.a.address.rpartition(".")[0] + ".254"


def test_firewall(net: Net) -> None:
    with started(host="0.0.0.0") as instance:
        with net.b.firewall(), net.c.firewall():
            Where.deploy()
            url = f"{instance.http_urls[0]}/where"
            took, found = seconds_of(lambda: answers(f"{url}?s=0.02"))
            assert found == set(hosts_of())
            assert took < 2
            assert [found[0][1] for found in net.direct().values()] == [[], []]


def test_every_node(net: Net) -> None:
    urls = [f"http://{host.address}:8000" for host in (net.b, net.c)]
    for host in ("0.0.0.0", "interface:eth0"):
        with started(location="EveryNode", host=host) as instance:
            assert instance.http_urls == urls
            found = {proxy.url: proxy.host for proxy in serve.status().proxies}
            assert found == {urls[0]: net.b.address, urls[1]: net.c.address}
            Where.deploy()
            for url in urls:
                assert httpx.get(f"{url}/-/healthz").text == "success"
                assert answers(f"{url}/where") <= set(hosts_of())
                page = net.a.run(need_program("curl"), "-s", f"{url}/where")
                assert page in hosts_of()


@pytest.mark.long
def test_cable_out_and_in_again(net: Net) -> None:
    """For longer than a peer may be silent, but not so long that Dask gives it up."""
    with started(host="0.0.0.0") as instance:
        Where.deploy()
        url = f"{instance.http_urls[0]}/where"
        places = hosts_of()
        assert answers(f"{url}?s=0.02") == set(places)
        (lost,) = (tag for tag, host in places.items() if host == net.c.address)

        def ask(method: str, seconds: float) -> tuple[int, str]:
            response = client.request(method, f"{url}?s={seconds}")
            return response.status_code, response.text

        with ThreadPoolExecutor(20) as pool, httpx.Client(timeout=20) as client:
            held = {
                "GET": [pool.submit(ask, "GET", 0.6) for _ in range(10)],
                "POST": [pool.submit(ask, "POST", 4) for _ in range(10)],
            }
            time.sleep(0.3)
            net.c.cut()
            try:
                began = time.monotonic()
                gets = [job.result() for job in held["GET"]]
                assert time.monotonic() - began < SILENCE_S + 2.5
                # Nobody is sent there any more.
                assert answers(url) == set(places) - {lost}
            finally:
                net.c.restore()
            # What was in it has been cancelled, as nobody waits for it any more.
            left = net.client.run(_ongoing)
            assert left[f"tcp://{net.c.address}:9000"] == 0
            posts = [job.result() for job in held["POST"]]
        assert {status for status, _ in gets} == {200}
        assert {status for status, _ in posts} == {200, 502}
        reasons = {text for status, text in posts if status == 502}
        assert all("host cut off" in text for text in reasons), reasons
        poll(lambda: answers(f"{url}?s=0.02") == set(places), 10)
        assert hosts_of() == places
        # By direct connections again, without a wait for the next try.
        poll(lambda: net.a.address in net.direct()[net.c.address][0][1], 5)


@pytest.mark.long
def test_host_lost_for_good(net: Net) -> None:
    """Its replica is replaced; when the cable is in again, nothing of it is left."""
    with started(host="0.0.0.0") as instance:
        Where.deploy()
        url = f"{instance.http_urls[0]}/where"
        assert net.c.address in hosts_of().values()

        def replaced() -> bool:
            return list(hosts_of().values()) == [net.b.address] * 2

        worker = net.cluster.workers[1]
        net.c.cut()
        try:
            poll(replaced, 15)  # when Dask gives the worker up
            assert answers(f"{url}?s=0.02") == set(hosts_of())
        finally:
            net.c.restore()
        # By Dask's rules a worker that the scheduler has given up ends.
        worker.wait(10)
        net.cluster.workers.remove(worker)
        assert len(net.client.run_on_scheduler(_actors)) == 2
        # At another address: the end of the old one's stream, when Dask notices it,
        # removes whoever has the old one's.
        net.cluster.add_worker_on(net.c, "--worker-port", "9001")
        net.cluster.wait_for_workers(2)
        Where.options(num_replicas=4).deploy()
        assert sorted(hosts_of().values()) == [net.b.address] * 2 + [net.c.address] * 2
        assert answers(f"{url}?s=0.02") == set(hosts_of())


def _actors(dask_scheduler: Any) -> list[Any]:
    return [key for key, task in dask_scheduler.tasks.items() if task.actor]


def test_head_with_a_worker(net: Net) -> None:
    """It is on the scheduler's host, which it uses under another address."""
    other = net.a.address.rpartition(".")[0] + ".101"
    net.a.run("ip", "addr", "add", f"{other}/24", "dev", "eth0")
    beside = net.cluster.add_worker_on(net.a, "--host", other)
    net.cluster.wait_for_workers(3)
    with started(host="0.0.0.0") as instance:
        url = f"http://{other}:8000"
        assert instance.http_urls == [url]
        (proxy,) = serve.status().proxies
        assert (proxy.worker, proxy.host) == (f"tcp://{other}:9000", other)
        apart = Where.options(workers=[net.b.address, net.c.address])
        apart.deploy()
        places = hosts_of()
        assert sorted(places.values()) == [net.b.address, net.c.address]
        assert answers(f"{url}/where?s=0.02") == set(places)
    net.cluster.kill(beside)
    net.cluster.wait_for_workers(2)
