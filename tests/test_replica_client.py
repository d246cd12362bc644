"""Dask inside a replica: clients for sync and async code, tasks that end with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import daskserve as serve
from tests.test_http import Site, open_site
from tests.utils import poll

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
