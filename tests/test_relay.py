"""Clients that reach the scheduler and no worker."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

import daskserve as serve
from daskserve.session import client_session
from tests.hosts import HostCluster, open_hosts
from tests.utils import ProcessCluster, scheduler_workers

pytestmark = pytest.mark.slow

#: Replicas with ports of their own would be reached on these.
ENV = {"DASK_DASKSERVE__TRANSPORT__DIRECT": "false"}


@serve.deployment(route_prefix=None)
class Echo:
    async def __call__(self, value: Any) -> Any:
        return value

    async def count(self, n: int) -> Any:
        for i in range(n):
            yield i

    def fail(self) -> None:
        raise LookupError("not here")


def check_calls() -> None:
    Echo.deploy()
    handle = Echo.get_handle()
    assert handle.remote(1).result(20) == 1
    responses = [handle.remote(n) for n in range(200)]
    assert [response.result(20) for response in responses] == list(range(200))
    assert list(handle.options(stream=True).count.remote(2000)) == list(range(2000))
    with pytest.raises(LookupError, match="not here"):
        handle.fail.remote().result(20)


@pytest.fixture
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(1, nanny=False, env=ENV) as cluster:
        yield cluster


def test_calls_go_through_the_scheduler(
    cluster: ProcessCluster, caplog: pytest.LogCaptureFixture
) -> None:
    with cluster.client() as client, serve.start(http_options={"location": None}):
        (worker,) = scheduler_workers(client)
        client_session(client)._relayed[worker] = float("inf")
        check_calls()
        port = int(worker.rpartition(":")[2])
        connections = psutil.Process().net_connections("tcp")
        assert not [c for c in connections if c.raddr and c.raddr.port == port]
        assert "through the scheduler" not in caplog.text
        with caplog.at_level(logging.WARNING):
            large = bytes(3 * 2**20)
            assert Echo.get_handle().remote(large).result(20) == large
        assert "more than 1 MiB goes through the scheduler" in caplog.text

        # What is in the worker is lost with it, and the scheduler is none the worse.
        waiting = Echo.get_handle().options(stream=True).count.remote(10**9)
        assert next(waiting) == 0
        cluster.kill(cluster.workers[0])
        with pytest.raises(serve.ServeError, match=r"was lost|left the cluster"):
            for _ in waiting:
                pass
        cluster.add_worker()
        assert Echo.get_handle().remote(2).result(20) == 2


def test_nobody_gets_anywhere_else(cluster: ProcessCluster) -> None:
    with cluster.client() as client, serve.start(http_options={"location": None}):
        session = client_session(client)
        session._relayed["tcp://127.0.0.1:1"] = float("inf")

        async def read() -> Any:
            return await (await session.connect("tcp://127.0.0.1:1")).read()

        with pytest.raises(OSError, match=r"[Cc]losed"):
            client.sync(read)


def test_a_firewall_before_the_workers() -> None:
    with open_hosts(1) as (host,):
        options: dict[str, Any] = {
            "scheduler_args": ["--port", "8786"],
            "worker_args": ["--worker-port", "9000"],
        }
        with HostCluster(host, [host], **options) as cluster, cluster.client():
            with serve.start(http_options={"location": None}), host.firewall():
                with host.firewall("9000"):
                    Echo.deploy()
                    # The first does not wait until other ways are known to be closed.
                    began = time.monotonic()
                    assert Echo.get_handle().remote(1).result(5) == 1
                    assert time.monotonic() - began < 1  # mostly 0.25
                    check_calls()
