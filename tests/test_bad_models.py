"""Constructors that take their worker down: one is lost, and neighbours serve on."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from distributed import Client

import daskserve as serve
from tests.utils import ProcessCluster, poll, scheduler_workers

pytestmark = pytest.mark.slow

LIMIT = 500_000_000


def exit_process() -> None:
    os._exit(1)


def segfault() -> None:
    ctypes.string_at(0)


def take_too_much() -> None:
    held = [bytearray(10_000_000) for _ in range(80)]
    for part in held:
        part[::4096] = b"x" * len(part[::4096])
    time.sleep(30)


def model(harm: Callable[[], None]) -> type:
    class Bad:
        def __init__(self) -> None:
            time.sleep(0.1)
            harm()

        def __call__(self) -> int:
            return 1

    return Bad


class Good:
    def __call__(self) -> int:
        return os.getpid()


class Slow(Good):
    def __init__(self) -> None:
        time.sleep(3)


def process() -> int | None:
    """Return the process where `slow` is about to start."""
    found = serve.status().deployments.get("slow")
    return found.replicas[0].pid if found and found.replicas else None


@contextmanager
def neighbour(client: Client) -> Iterator[Callable[[], set[int]]]:
    """Deploy a replica on each worker; give what tells the processes that serve."""
    serve.start(client, http_options={"location": "NoServer"})
    count = len(scheduler_workers(client))
    deployment = serve.deployment(name="good", num_replicas=count)(Good)
    deployment.deploy()
    handle = deployment.get_handle()

    def serving() -> set[int]:
        for _ in range(30):
            assert handle.remote().result(timeout_s=20) > 0
        replicas = serve.status().deployments["good"].replicas
        return {r.pid for r in replicas if r.pid and r.state == "RUNNING"}

    try:
        yield serving
    finally:
        serve.shutdown()


@pytest.mark.parametrize("harm", [exit_process, segfault])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_one_worker_is_lost(harm: Callable[[], None], num_replicas: int) -> None:
    with ProcessCluster(3, nanny=False) as cluster, cluster.client() as client:
        with neighbour(client) as serving:
            before = serving()
            bad = serve.deployment(name="bad", num_replicas=num_replicas)(model(harm))
            with pytest.raises(serve.ServeError, match="not tried elsewhere"):
                bad.deploy()
            assert len(scheduler_workers(client)) == 2
            assert len(serving() & before) == 2
            assert serve.status().deployments["good"].state == "HEALTHY"


def test_an_update_that_uses_too_much_memory() -> None:
    """A nanny ends one worker, and says why; the version before serves on."""
    args = ["--memory-limit", str(LIMIT)]
    with ProcessCluster(3, worker_args=args) as cluster, cluster.client() as client:
        with neighbour(client) as serving:
            before = serving()
            assert len(before) == 3
            bad = serve.deployment(name="bad", version="1")(Good)
            bad.deploy()
            update = serve.deployment(name="bad", version="2")
            with pytest.raises(serve.ServeError, match="memory limit") as caught:
                update(model(take_too_much)).deploy()
            assert "its former version '1' goes on serving" in str(caught.value)
            poll(lambda: len(scheduler_workers(client)) == 3, 20)
            poll(lambda: serve.status().deployments["bad"].state != "UPDATING", 20)
            assert len(serving() & before) == 2
            assert bad.get_handle().remote().result(timeout_s=20) > 0


def test_a_restart_is_nobodys_fault() -> None:
    """``client.restart()`` ends workers while constructors run there."""
    with ProcessCluster(2) as cluster, cluster.client() as client:
        serve.start(client, http_options={"location": "NoServer"})
        deployment = serve.deployment(name="slow")(Slow)
        with ThreadPoolExecutor(1) as pool:
            deploying = pool.submit(deployment.deploy)
            poll(process, 10)
            client.restart()
            deploying.result(timeout=60)
        assert deployment.get_handle().remote().result(timeout_s=20) > 0


def test_a_worker_that_was_told_to_leave_is_nobodys_fault() -> None:
    """The constructor that ran there is run elsewhere, and ``deploy()`` goes on."""
    with ProcessCluster(2, nanny=False) as cluster, cluster.client() as client:
        serve.start(client, http_options={"location": "NoServer"})
        deployment = serve.deployment(name="slow")(Slow)
        with ThreadPoolExecutor(1) as pool:
            deploying = pool.submit(deployment.deploy)
            pid = poll(process, 10)
            os.kill(pid, signal.SIGTERM)
            deploying.result(timeout=40)
        assert deployment.get_handle().remote().result(timeout_s=10) != pid
