"""Large values through handles, by every way that there is; end to end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import default_client

import daskserve as serve
from tests.utils import ProcessCluster, leftover_threads, poll

pytestmark = pytest.mark.slow

SIZE = 5_000_000


@serve.deployment(route_prefix=None, version="1")
class Store:
    """Has a state that its methods change in place, and hand out."""

    def __init__(self) -> None:
        self.state = np.zeros(SIZE // 8)

    async def echo(self, value: Any) -> Any:
        return value

    def step(self) -> Any:
        self.state += 1
        return self.state

    def double(self, array: np.ndarray) -> Any:
        array *= 2  # an argument is the callee's own
        return array

    def facts(self, *values: Any) -> list[Any]:
        return [(type(v).__name__, float(np.sum(v))) for v in values]

    async def many(self, n: int) -> Any:
        for i in range(n):
            yield np.full(SIZE // 8, i)


@serve.deployment(route_prefix=None, version="1")
class Front:
    """Calls the other one from the worker where it is."""

    def __init__(self, store: serve.DeploymentHandle) -> None:
        self.store = store

    async def check(self) -> str:
        array = np.arange(SIZE // 8)
        before = array.copy()
        doubled = await self.store.double.remote(array)
        assert np.array_equal(array, before)
        assert np.array_equal(doubled, 2 * before)
        steps = await asyncio.gather(*(self.store.step.remote() for _ in range(5)))
        assert sorted(step[-1] - step[0] for step in steps) == [0] * 5
        assert len({step[0] for step in steps}) == 5
        return "right"


@pytest.fixture(scope="module", params=["tcp", "tls", "comm"])
def cluster(request: pytest.FixtureRequest) -> Iterator[ProcessCluster]:
    is_comm = request.param == "comm"
    env = {"DASK_DASKSERVE__TRANSPORT__DIRECT": str(not is_comm).lower()}
    protocol = "tcp" if is_comm else request.param
    with (
        ProcessCluster(1, nanny=False, protocol=protocol, env=env) as cluster,
        cluster.client(),
        serve.start(http_options={"location": None}),
    ):
        Store.deploy()
        yield cluster
    assert leftover_threads() == []


@pytest.fixture
def handle(cluster: ProcessCluster) -> serve.DeploymentHandle:
    return serve.get_deployment_handle("Store")


@pytest.mark.parametrize(
    "value",
    [
        bytes(range(256)) * (SIZE // 256),
        np.random.default_rng(0).random((5, SIZE // 40)),
        pd.DataFrame({"x": np.arange(SIZE // 8), "y": "text"}),
        {"weights": [np.ones(SIZE // 8), np.ones(3)], "blob": bytes(SIZE)},
    ],
    ids=["bytes", "array", "frame", "nested"],
)
def test_there_and_back(handle: serve.DeploymentHandle, value: Any) -> None:
    back = handle.echo.remote(value).result(20)
    assert type(back) is type(value)
    if isinstance(value, pd.DataFrame):
        pd.testing.assert_frame_equal(back, value)
    else:
        np.testing.assert_equal(back, value)


def test_nobody_changes_anothers_memory(handle: serve.DeploymentHandle) -> None:
    array = np.arange(SIZE // 8)
    responses = []
    for _ in range(5):  # the buffer is used again at once
        responses.append(handle.facts.remote(array))
        array += 1
    sums = [response.result(20)[0][1] for response in responses]
    assert np.diff(sums).tolist() == [SIZE // 8] * 4
    steps = [handle.step.remote() for _ in range(5)]  # its state likewise
    found = [response.result(20) for response in steps]
    assert all(step[0] == step[-1] for step in found)
    assert np.diff([step[0] for step in found]).tolist() == [1] * 4


def test_one_response_for_many(handle: serve.DeploymentHandle) -> None:
    response = handle.double.remote(np.ones(SIZE // 8))
    mine = response.result(20)
    mine[:] = 0
    twice = handle.facts.remote(response, response)  # as they are passed on now
    other = response.result(20)
    assert not np.shares_memory(mine, other)
    assert [kind for kind, _ in twice.result(20)] == ["ndarray", "ndarray"]
    passed = handle.double.remote(np.ones(SIZE // 8))
    again = [handle.double.remote(passed) for _ in range(3)]
    assert [response.result(20).max() for response in again] == [4, 4, 4]
    assert passed.result(20).max() == 2


def test_streams(handle: serve.DeploymentHandle) -> None:
    items = list(handle.options(stream=True).many.remote(7))
    assert [int(item[0]) for item in items] == [int(item[-1]) for item in items]
    assert [int(item[0]) for item in items] == list(range(7))
    assert all(item.flags.writeable for item in items)


def test_within_one_process(handle: serve.DeploymentHandle) -> None:
    front = serve.run(Front.bind(handle), name="fronts", route_prefix=None)
    assert front.check.remote().result(30) == "right"
    serve.delete("fronts")


def test_a_worker_lost_in_the_middle(cluster: ProcessCluster) -> None:
    handle = serve.get_deployment_handle("Store")
    response = handle.echo.remote(np.ones(40 * SIZE // 8))
    cluster.kill(cluster.workers[0])
    with pytest.raises(serve.ServeError, match=r"was lost|left the cluster"):
        response.result(20)
    cluster.add_worker(nanny=False)
    default_client().wait_for_workers(1)
    poll(lambda: serve.status().deployments["Store"].running_replicas == 1)
    assert handle.facts.remote(np.ones(SIZE // 8)).result(20)[0][1] == SIZE // 8
