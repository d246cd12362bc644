"""Apps of several deployments on a cluster; end to end."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any
from urllib.parse import urlsplit

import dask
import dask.array as da
import httpx
import numpy as np
import psutil
import pytest
from distributed import default_client, get_worker, wait

import daskserve as serve
from daskserve.exceptions import (
    DeploymentFailedError,
    DeploymentUnavailableError,
    PicklingError,
    ReplicaDiedError,
)
from tests.utils import ProcessCluster, leftover_threads, poll, scheduler_workers

pytestmark = pytest.mark.slow


@serve.deployment(version="1")
class Model:
    def __init__(self, factor: int, error: str | None = None) -> None:
        if error is not None:
            raise OSError(error)
        self.factor = factor

    def __call__(self, x: int) -> int:
        return x * self.factor

    def pid(self) -> int:
        return os.getpid()


@serve.deployment(version="1", route_prefix="/unused")
class Combiner:
    async def __call__(self, parts: list[int]) -> int:
        return sum(parts)


@serve.deployment(version="1")
class Ingress:
    def __init__(
        self,
        models: list[serve.DeploymentHandle],
        combine: serve.DeploymentHandle,
        offset: int = 0,
    ) -> None:
        self.models = models
        self.combine = combine
        self.offset = offset

    async def __call__(self, request: Any) -> int:
        return await self.compute(int(request.query_params["x"]))

    async def compute(self, x: int) -> int:
        parts = [model.remote(x) for model in self.models]
        total = await self.combine.remote([await part for part in parts])
        return int(total) + self.offset


def app(*factors: int, **options: Any) -> serve.Application:
    models = [Model.bind(factor) for factor in factors]
    return Ingress.options(**options).bind(models, combine=Combiner.bind())


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(3, nanny=False, nthreads=2) as cluster:
        yield cluster
    assert leftover_threads() == []


@pytest.fixture(scope="module")
def url(cluster: ProcessCluster) -> Iterator[str]:
    with cluster.client(), serve.start(http_options={"port": 0}) as instance:
        yield instance.http_urls[0]


@pytest.fixture(autouse=True)
def clean(url: str) -> Iterator[None]:
    yield
    for deployment in serve.list_deployments().values():
        deployment.delete()


def tags() -> dict[str, set[str]]:
    return {
        name: {replica.replica_tag for replica in deployment.replicas}
        for name, deployment in serve.status().deployments.items()
    }


@serve.deployment(version="1", num_replicas=3, route_prefix=None)
class Data:
    """One replica on each worker."""

    def where(self, *args: Any) -> str:
        return str(get_worker().address)

    def total(self, array: Any, other: Any = None) -> float:
        return float(array.sum())

    def kind(self, value: Any) -> str:
        return type(value).__name__

    def add(self, x: int, y: int) -> int:
        return x + y

    async def slow(self, x: int) -> int:
        await asyncio.sleep(0.3)
        return x

    def fail(self) -> None:
        raise LookupError("not here")

    async def numbers(self, n: int) -> Any:
        for i in range(n):
            yield i

    async def relay(self, n: int) -> Any:
        handle = serve.get_deployment("Data").get_handle()
        async for i in handle.options(stream=True).numbers.remote(n):
            yield i

    async def sums(self) -> int:
        handle = serve.get_deployment("Data").get_handle()
        return int(
            await handle.add.remote(handle.slow.remote(1), handle.slow.remote(2))
        )


def test_an_app_comes_changes_and_goes(url: str) -> None:
    handle = serve.run(app(2, 3))
    assert handle.compute.remote(10).result(10) == 50
    assert httpx.get(url, params={"x": 1}).text == "5"
    assert httpx.get(f"{url}/-/routes").json() == {"/": "Ingress"}
    assert serve.get_app_handle() == handle
    inner = serve.get_deployment_handle("Model_1", app_name="default")
    assert inner.remote(4).result(10) == 12
    status = serve.status()
    assert {d.app for d in status.deployments.values()} == {"default"}
    assert "app default" in str(status)
    before = tags()
    assert before.keys() == {"Combiner", "Ingress", "Model", "Model_1"}

    # One replaced, one gone, the others stay.
    assert serve.run(app(5)).compute.remote(10).result(10) == 50
    after = tags()
    assert after.keys() == {"Combiner", "Ingress", "Model"}
    assert after["Combiner"] == before["Combiner"]
    assert after["Model"] != before["Model"] and after["Ingress"] != before["Ingress"]
    with pytest.raises(DeploymentUnavailableError, match="Model_1"):
        inner.remote(4).result(10)

    # Beside it, as ever.
    Model.options(name="Alone").deploy(7)
    serve.get_deployment("Model").options(num_replicas=2).deploy()
    assert serve.status().deployments["Model"].app == "default"
    assert len(tags()["Model"]) == 2

    serve.delete("default")
    assert tags().keys() == {"Alone"}
    with pytest.raises(KeyError, match="no app named 'default'"):
        serve.delete("default")
    with pytest.raises(KeyError):
        serve.get_app_handle("default")
    with pytest.raises(KeyError):
        serve.get_deployment_handle("Model", app_name="default")


def test_two_apps_of_the_same_classes(url: str) -> None:
    serve.run(app(1), route_prefix="/one")
    other = serve.run(app(2), name="other", route_prefix="/two")
    assert httpx.get(f"{url}/one", params={"x": 1}).text == "1"
    assert httpx.get(f"{url}/two", params={"x": 1}).text == "2"
    assert other.deployment_name == "other:Ingress"
    assert serve.get_deployment_handle("Model", "other").remote(1).result(10) == 2
    with pytest.raises(ValueError, match="route_prefix='/two'"):
        serve.run(app(3), name="third", route_prefix="/two")
    serve.run(Model.bind(4), name="hidden", route_prefix=None)
    assert httpx.get(f"{url}/-/routes").json().keys() == {"/one", "/two"}
    serve.delete("other")
    assert serve.get_app_handle().compute.remote(1).result(10) == 1


def test_an_app_that_fails_is_taken_back() -> None:
    bad = Ingress.bind([Model.bind(1), Model.bind(2, error="no weights")], None)
    with pytest.raises(DeploymentFailedError, match="no weights"):
        serve.run(bad)
    assert tags() == {}
    handle = serve.run(app(2, 3))
    before = tags()
    worse = [Model.bind(2), Model.bind(4), Model.bind(5, error="no weights")]
    with pytest.raises(DeploymentFailedError, match="no weights"):
        serve.run(Ingress.bind(worse, combine=Combiner.bind(), offset=1))
    assert handle.compute.remote(10).result(10) == 50
    after = tags()
    assert after.keys() == before.keys()
    for name in ("Model", "Combiner", "Ingress"):
        assert after[name] == before[name], name
    assert {d.state for d in serve.status().deployments.values()} == {"HEALTHY"}


def test_what_users_wrote_wrongly_deploys_nothing() -> None:
    with pytest.raises(PicklingError, match=r"init_args of 'Model'.*generator"):
        serve.run(Ingress.bind([Model.bind(n for n in [1])], None))  # type: ignore[arg-type]
    cycle: list[Any] = []
    root = Ingress.bind(cycle, Combiner.bind())
    cycle.append(root)
    with pytest.raises(ValueError, match="Ingress -> Ingress"):
        serve.run(root)
    assert tags() == {}


@pytest.fixture
def data(url: str) -> serve.DeploymentHandle:
    Data.deploy()
    return Data.get_handle()


def test_streams_between_processes(data: serve.DeploymentHandle) -> None:
    streaming = data.options(stream=True)
    assert list(streaming.numbers.remote(3000)) == list(range(3000))
    assert list(streaming.relay.remote(300)) == list(range(300))

    async def consume() -> list[int]:
        return [i async for i in streaming.relay.remote(5)]

    assert asyncio.run(consume()) == [0, 1, 2, 3, 4]


def test_responses_are_arguments_and_nobody_waits(
    data: serve.DeploymentHandle,
) -> None:
    began = time.monotonic()
    three = data.add.remote(data.slow.remote(1), y=data.slow.remote(2))
    seven = data.add.remote(three, y=data.add.remote(three, 1))
    assert time.monotonic() - began < 0.2
    assert seven.result(10) == 7
    assert three.result(10) == 3
    assert data.kind.remote([data.slow.remote(1)]).result(10) == "list"
    assert data.sums.remote().result(10) == 3
    with pytest.raises(LookupError, match="not here"):
        data.add.remote(data.fail.remote(), 1).result(10)
    slow = data.slow.remote(1)
    cancelled = data.add.remote(slow, 1)
    slow.cancel()
    with pytest.raises(CancelledError):
        cancelled.result(10)


def test_dask_collections_are_arguments(data: serve.DeploymentHandle) -> None:
    array = da.ones((1000, 10), chunks=(100, 10))
    assert data.total.remote(array).result(20) == 10_000
    assert data.kind.remote(array).result(20) == "ndarray"
    assert data.kind.remote(dask.delayed(sum)([1, 2])).result(20) == "int"
    assert data.add.remote(dask.delayed(1), dask.delayed(2)).result(20) == 3
    failing = dask.delayed(int)("x")
    with pytest.raises(ValueError, match="invalid literal"):
        data.kind.remote(failing).result(20)


def test_a_replica_near_the_bytes_is_preferred(
    cluster: ProcessCluster, data: serve.DeploymentHandle
) -> None:
    client = default_client()
    for worker in scheduler_workers(client):
        large = client.submit(bytes, 2_000_000, workers=[worker], pure=False)
        small = client.submit(bytes, 10, pure=False)
        found = {data.where.remote(small, large).result(10) for _ in range(5)}
        assert found == {worker}


def test_large_values_pass_neither_the_client_nor_the_scheduler(
    cluster: ProcessCluster, data: serve.DeploymentHandle
) -> None:
    client = default_client()
    addresses = list(scheduler_workers(client))
    small = client.submit(np.ones, 1000, workers=addresses[:1], pure=False)
    assert data.total.remote(small).result(20) == 1000  # all connections stand
    large = client.submit(
        np.ones, 100 * 2**17, workers=addresses[0], pure=False, key="large"
    )
    wait(large)
    processes = [psutil.Process(), psutil.Process(cluster.scheduler.pid)]
    before = [process.memory_info().rss for process in processes]
    peaks, done = list(before), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for i, process in enumerate(processes):
                peaks[i] = max(peaks[i], process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        calls = [data.total.remote(large) for _ in range(6)]
        assert {call.result(30) for call in calls} == {100 * 2**17}
    finally:
        done.set()
        watching.join()
    growth = [peak - first for peak, first in zip(peaks, before, strict=True)]
    assert max(growth) < 16 * 2**20, growth


class Stage:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    async def __call__(self, x: int) -> int:
        await asyncio.sleep(0.02)
        return x * self.factor


class Sum:
    def __call__(self, x: int, y: int) -> int:
        return x + y


class Front:
    def __init__(
        self,
        left: serve.DeploymentHandle,
        right: serve.DeploymentHandle,
        combine: serve.DeploymentHandle,
    ) -> None:
        self.left, self.right, self.combine = left, right, combine

    async def __call__(self, request: Any) -> Any:
        x = int(request.query_params["x"])
        try:
            return await self.combine.remote(self.left.remote(x), self.right.remote(x))
        except ReplicaDiedError:
            return "lost"


def test_a_stage_whose_worker_is_killed(cluster: ProcessCluster, url: str) -> None:
    pids: dict[int, str] = {
        pid: address for address, pid in default_client().run(os.getpid).items()
    }
    first = serve.status().proxies[0].worker
    doomed = next(w for w in cluster.workers if pids[w.pid] != first)
    safe = [address for pid, address in pids.items() if pid != doomed.pid]

    def part(target: Any, name: str, **options: Any) -> serve.Deployment:
        made: serve.Deployment = serve.deployment(name=name, **options)(target)
        return made

    limit = 30
    right = part(Stage, "Right", num_replicas=3, max_ongoing_requests=limit)
    app = part(Front, "Front", workers=safe, max_ongoing_requests=200).bind(
        part(Stage, "Left", workers=safe).bind(10),
        right.bind(1),
        part(Sum, "Sum", workers=safe).bind(),
    )
    serve.run(app)
    replicas = serve.status().deployments["Right"].replicas
    assert doomed.pid in {replica.pid for replica in replicas}

    address = urlsplit(url)
    found: list[tuple[int, str]] = []

    async def visit(first: int) -> None:  # httpx would take most of the time
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for x in range(first, 2000, 200):
            writer.write(f"GET /?x={x} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].split()[0])
            body = (await reader.readexactly(length)).decode()
            assert head.split()[1] == "200", (head, body)
            found.append((x, body))
        writer.close()

    async def kill() -> None:
        while len(found) < 500:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(cluster.kill, doomed)

    async def load() -> None:
        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            group.create_task(kill())
            for first in range(200):
                group.create_task(visit(first))

    asyncio.run(load())
    assert sorted(x for x, _ in found) == list(range(2000))
    lost = [x for x, text in found if text == "lost"]
    assert all(text == str(11 * x) for x, text in found if text != "lost")
    assert len(lost) <= limit
    status = serve.status().deployments
    (death,) = status["Right"].deaths
    assert "left the cluster" in death.reason
    assert all(not status[name].deaths for name in ("Front", "Left", "Sum"))
    poll(lambda: serve.status().deployments["Right"].running_replicas == 3)
    assert {d.state for d in serve.status().deployments.values()} == {"HEALTHY"}
