"""Dask inside a replica: clients for sync and async code, tasks that end with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import distributed
import httpx
import pytest

import daskserve as serve
from tests.test_http import Site, open_site
from tests.utils import ProcessCluster, poll

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as made:  # its workers have one thread
        yield made


def square(x: int) -> int:
    return x * x


def note_and_wait(path: str, seconds: float) -> None:
    with open(path, "a") as file:
        file.write("began\n")
    time.sleep(seconds)


class Both:
    async def __call__(self, request: Any) -> int:
        client = await serve.get_client()
        assert client is serve.get_client() and client.asynchronous
        squares = client.map(square, range(int(request.query_params["n"])))
        return int(await client.submit(sum, squares))

    def sync(self, n: int) -> int:
        client = serve.get_client()
        assert client is serve.get_client() and not client.asynchronous
        return int(client.submit(sum, client.map(square, range(n))).result())

    async def many(self, path: str) -> None:
        client = await serve.get_client()
        calls = [client.submit(note_and_wait, path, 0.5, pure=False) for _ in range(50)]
        await client.gather(calls)

    def many_sync(self, path: str) -> None:
        client = serve.get_client()
        calls = [client.submit(note_and_wait, path, 0.5, pure=False) for _ in range(50)]
        client.gather(calls)

    async def elsewhere(self) -> str:
        def run() -> str:
            try:
                asyncio.run(self.ask())
            except serve.ServeError as err:
                return str(err)
            return "no error"

        return await asyncio.to_thread(run)

    async def ask(self) -> None:
        serve.get_client()


def tasks(site: Site) -> int:
    def count(dask_scheduler: Any) -> int:
        keys = map(str, dask_scheduler.tasks)
        return sum("note_and_wait" in key for key in keys)

    return int(site.client.run_on_scheduler(count))


def test_async_and_sync_code_have_clients(site: Site) -> None:
    both = site.deploy(Both, where="near")
    url = site.at(both)
    assert httpx.get(url, params={"n": 5}, timeout=20).json() == 30
    handle = both.get_handle()
    assert handle.sync.remote(6).result(timeout_s=20) == 55
    assert "not the replica's" in handle.elsewhere.remote().result(timeout_s=20)

    def clients(dask_scheduler: Any) -> int:
        return sum("daskserve-replica" in name for name in dask_scheduler.clients)

    assert site.client.run_on_scheduler(clients) == 2
    both.delete()
    poll(lambda: site.client.run_on_scheduler(clients) == 0)


@pytest.mark.parametrize("method", ["many", "many_sync"])
def test_tasks_end_with_the_request(site: Site, tmp_path: Path, method: str) -> None:
    both = site.deploy(Both, where="far")
    log = tmp_path / "log"
    response = getattr(both.get_handle(), method).remote(str(log))
    poll(lambda: log.exists() and tasks(site) > 40)
    response.cancel()
    poll(lambda: tasks(site) == 0)
    began = len(log.read_text().splitlines())
    time.sleep(0.7)
    assert len(log.read_text().splitlines()) == began < 40
    assert both.get_handle().sync.remote(3).result(timeout_s=20) == 5


def test_outside_of_replicas_there_is_none() -> None:
    with pytest.raises(serve.ServeError, match="outside of a replica"):
        serve.get_client()


def fail(text: str) -> None:
    raise OSError(text)


class Plain:
    """Asks Dask's own functions, as tasks do, and returns futures as they are."""

    def __init__(self) -> None:
        # A class with async methods is made on the replica's loop.
        self.made = distributed.get_client().submit(square, 3).result()
        distributed.get_worker().made_by_plain = True  # type: ignore[attr-defined]

    async def awaited(self, n: int) -> int:
        client = distributed.get_client()
        assert not client.asynchronous
        assert isinstance(client.submit(square, n), distributed.Future)
        return self.made + await client.submit(square, n)  # type: ignore[operator]

    async def slowly(self) -> int:
        return await distributed.get_client().submit(time.sleep, 5, pure=False)  # type: ignore[no-any-return]

    async def ping(self) -> str:
        return "pong"

    async def awaited_failure(self) -> None:
        await distributed.get_client().submit(fail, "on purpose", pure=False)

    async def seen(self) -> bool:
        worker: Any = distributed.get_worker()
        return worker.made_by_plain and isinstance(worker, distributed.Worker)

    def sync_future(self, n: int) -> Any:
        return distributed.get_client().submit(square, n)

    async def future(self, n: int) -> Any:
        return distributed.get_client().submit(square, n)

    async def async_future(self, n: int) -> Any:
        return (await serve.get_client()).submit(square, n)

    def of_worker(self, n: int) -> Any:
        worker: Any = distributed.get_worker()
        client = type(worker).__mro__[1]._get_client(worker)  # Dask's own
        return client.submit(square, n)

    async def failing_future(self) -> Any:
        return distributed.get_client().submit(fail, "of a task", pure=False)

    async def response(self, name: str, n: int) -> Any:
        return serve.get_deployment_handle(name).future.remote(n)

    async def __call__(self, request: Any) -> Any:
        return distributed.get_client().submit(square, int(request.query_params["n"]))


@pytest.fixture(scope="module")
def plain(site: Site) -> serve.Deployment:
    return site.deploy(Plain)


def test_futures_of_dask_can_be_awaited(plain: serve.Deployment) -> None:
    handle = plain.get_handle()
    assert handle.awaited.remote(4).result(timeout_s=10) == 25
    assert handle.seen.remote().result(timeout_s=10) is True
    with pytest.raises(OSError, match="on purpose"):
        handle.awaited_failure.remote().result(timeout_s=10)


def test_a_replica_answers_others_while_it_awaits(plain: serve.Deployment) -> None:
    handle = plain.get_handle()
    slow = handle.slowly.remote()
    began = time.monotonic()
    for _ in range(3):
        assert handle.ping.remote().result(timeout_s=10) == "pong"
    assert time.monotonic() - began < 2
    assert not slow.done()
    slow.cancel()


def test_a_future_that_is_returned_is_its_value(
    site: Site, plain: serve.Deployment
) -> None:
    handle = plain.get_handle()
    for method in ("sync_future", "future", "async_future", "of_worker"):
        call = handle.options(method_name=method)
        assert call.remote(5).result(timeout_s=10) == 25, method
    assert handle.response.remote(plain.name, 6).result(timeout_s=10) == 36
    with pytest.raises(OSError, match="of a task"):
        handle.failing_future.remote().result(timeout_s=10)
    assert httpx.get(site.at(plain), params={"n": 7}).text == "49"


class Weighted:
    def __init__(self, weights: Any, *, bias: Any = 0) -> None:
        self.weights, self.bias = weights, bias

    def __call__(self) -> Any:
        return int(sum(self.weights["w"])) + self.bias


def keys_kept(dask_scheduler: Any) -> set[str]:
    client = dask_scheduler.clients.get("daskserve-arguments")
    return set() if client is None else {ts.key for ts in client.wants_what}


def test_futures_among_the_arguments_of_a_constructor(site: Site) -> None:
    weights = site.client.submit(list, (1, 2, 3), pure=False)
    bias = site.client.submit(square, 3, pure=False)
    lazy = da.ones(4, chunks=2) * 2
    model = site.deploy(Weighted, {"w": weights}, where="near", version="1")
    call = model.get_handle()
    assert call.remote().result(timeout_s=10) == 6
    key = weights.key
    assert site.client.run_on_scheduler(keys_kept) == {key}
    del weights
    # A replica that comes later has them, too; and so has a former version.
    found = serve.get_deployment(model.name)
    found.options(num_replicas=2, workers=None).deploy()
    model.options(version="2").deploy({"w": lazy}, bias=bias)
    del bias
    assert call.remote().result(timeout_s=10) == 17
    serve.get_deployment(model.name).rollback()
    assert call.remote().result(timeout_s=10) == 6
    model.delete()
    assert site.client.run_on_scheduler(keys_kept) == set()
    poll(lambda: key not in site.client.who_has())


def test_a_future_that_fails_among_the_arguments(site: Site) -> None:
    model = site.make(Weighted)
    future = site.client.submit(fail, "no weights", pure=False)
    with pytest.raises(OSError, match="no weights"):
        model.deploy({"w": future})
    assert model.name not in serve.list_deployments()


def test_futures_among_what_is_bound(site: Site) -> None:
    weights = site.client.submit(list, (4, 5), pure=False)
    bound = serve.deployment(Weighted).bind({"w": weights}, bias=1)
    handle = serve.run(bound, name="bound", route_prefix=None)
    assert handle.remote().result(timeout_s=10) == 10
    del weights, bound
    found = serve.get_deployment(f"bound:{Weighted.__name__}")
    found.options(num_replicas=2).deploy()  # with the arguments that it has
    serve.delete("bound")


def test_clients_of_a_cluster_with_tls() -> None:
    """Workers from a command line have a worker's certificate only."""

    class Ask:
        async def both(self) -> tuple[int, int]:
            client = await serve.get_client()
            return await client.submit(square, 3), await asyncio.to_thread(self.sync)

        def sync(self) -> int:
            return int(distributed.get_client().submit(square, 4).result())

    with ProcessCluster(1, protocol="tls") as cluster, cluster.client() as client:
        serve.start(client, http_options={"location": None})
        ask = serve.deployment(name="ask")(Ask)
        ask.deploy()
        handle = ask.get_handle()
        assert handle.both.remote().result(timeout_s=20) == (9, 16)
        serve.shutdown()
