"""The only worker ends before there is another: requests lose nothing but time."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from types import TracebackType

import httpx
import psutil
import pytest

import daskserve as serve
from tests.utils import ProcessCluster, poll

pytestmark = pytest.mark.slow

#: What batch systems leave, as far as daskserve knows it here.
WAIT_S = 10.0


class Slow:
    """Takes so long that some requests are in progress at any time."""

    async def __call__(self) -> int:
        await asyncio.sleep(0.5)
        return os.getpid()


class Load:
    """POSTs at a steady rate, whether answers come or not."""

    def __init__(self, url: str) -> None:
        self.answers: Counter[object] = Counter()
        self.last = time.monotonic()
        self._url = url
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _ask(self, client: httpx.AsyncClient) -> None:
        try:
            response = await client.post(self._url)
        except httpx.HTTPError as err:
            self.answers[repr(err)] += 1
            return
        self.answers[response.status_code] += 1
        self.last = time.monotonic()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(timeout=50, limits=limits) as client:
            tasks = []
            while not self._end.is_set():
                tasks.append(asyncio.create_task(self._ask(client)))
                await asyncio.sleep(0.1)
            await asyncio.gather(*tasks)

    def __enter__(self) -> Load:
        self._thread.start()
        poll(lambda: self.answers[200] >= 5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert set(self.answers) == {200}, self.answers


def start() -> None:
    """Start the server, in the scheduler: no worker is there that would have it."""
    serve.start(detached=True, http_options={"port": 0})


def deploy(num_replicas: int = 1) -> str:
    slow = serve.deployment(name="Slow", num_replicas=num_replicas)(Slow)
    slow.deploy()
    assert slow.url is not None
    return slow.url


def pids() -> set[int]:
    return {r.pid for r in serve.status().deployments["Slow"].replicas if r.pid}


def running() -> int:
    states = [r.state for r in serve.status().deployments["Slow"].replicas]
    return states.count("RUNNING")


@pytest.mark.parametrize(
    "whom",
    [
        pytest.param("both", marks=pytest.mark.long),
        pytest.param("nanny", marks=pytest.mark.by_hand),
        pytest.param("worker without nanny", marks=pytest.mark.by_hand),
    ],
)
def test_signal(whom: str) -> None:
    """SIGTERM, as batch systems send it: to all processes of the job at once."""
    nanny = whom != "worker without nanny"
    env = {"DASK_DASKSERVE__WORKER__SIGNAL_TIMEOUT": f"{WAIT_S}s"}
    with ProcessCluster(0, env=env) as cluster, cluster.client():
        start()
        worker = cluster.add_worker(nanny=nanny)
        url = deploy()
        (served,) = pids()
        with Load(url) as load:
            began = time.monotonic()
            cluster.workers.remove(worker)
            for _ in range(2):  # `srun` and slurmd send one each
                if whom == "both":
                    psutil.Process(served).send_signal(signal.SIGTERM)
                worker.terminate()
                time.sleep(0.005)
            worker.wait(WAIT_S + 5)
            took = time.monotonic() - began
            # It served on for nearly all of that time, as nobody took its place.
            assert WAIT_S * 0.5 < load.last - began < took < WAIT_S + 2
            cluster.add_worker()
            poll(lambda: pids() - {served}, 20)


@pytest.mark.long
def test_known_end() -> None:
    """It serves on while requests can end in time, and no longer."""
    with ProcessCluster(0) as cluster, cluster.client():
        start()
        end = time.time() + 20
        cluster.env["DASK_DASKSERVE__WORKER__ENDS_AT"] = str(end)
        worker = cluster.add_worker()
        url = deploy()
        (served,) = pids()
        del cluster.env["DASK_DASKSERVE__WORKER__ENDS_AT"]
        with Load(url) as load:
            time.sleep(max(0.0, end - time.time()))
            cluster.kill(worker)
            assert time.monotonic() - load.last < 5
            cluster.add_worker()
            poll(lambda: pids() - {served}, 20)


@pytest.mark.by_hand
def test_jobs_that_end_together_do_not_pile_up() -> None:
    """Replicas stay where they are if all end, and go on in the jobs after these."""
    env = {"DASK_DASKSERVE__WORKER__SIGNAL_TIMEOUT": f"{WAIT_S}s"}
    with ProcessCluster(0, env=env) as cluster, cluster.client():
        start()
        workers = [cluster.add_worker() for _ in range(2)]
        cluster.wait_for_workers(2)
        url = deploy(2)
        served = pids()
        with Load(url) as load:
            began = time.monotonic()
            for worker in workers:
                cluster.workers.remove(worker)
                worker.terminate()
            time.sleep(WAIT_S * 0.3)
            assert pids() == served
            for worker in workers:
                worker.wait(WAIT_S + 5)
            assert load.last - began > WAIT_S * 0.5
            for _ in workers:
                cluster.add_worker()
            poll(lambda: pids().isdisjoint(served) and running() == 2, 20)
