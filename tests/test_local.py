"""Apps in this process: no cluster, no HTTP, the same handles."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import daskserve as serve
from daskserve.exceptions import (
    DeploymentFailedError,
    DeploymentUnavailableError,
    ServeError,
    ServeNotRunningError,
)
from tests.utils import leftover_threads

#: What replicas note; they are in this process.
seen: list[Any] = []


@serve.deployment(num_replicas=2, user_config={"factor": 2})
class Model:
    def __init__(self, weights: int) -> None:
        self.weights = weights
        self.factor = 1

    def reconfigure(self, config: dict[str, int]) -> None:
        self.factor = config["factor"]

    def __call__(self, x: int) -> int:
        seen.append(threading.current_thread().name)
        return self.weights * self.factor + x

    def fail(self) -> None:
        raise LookupError("not here")

    async def wait(self) -> None:
        await asyncio.sleep(0.2)
        seen.append("waited")

    def __del__(self) -> None:
        seen.append("deleted")


@serve.deployment
class Ingress:
    def __init__(self, models: dict[str, serve.DeploymentHandle]) -> None:
        self.models = models
        self.first = models["a"].remote(1).result()  # callees serve already

    async def __call__(self, x: int) -> list[int]:
        answers = [model.remote(x) for model in self.models.values()]
        return [await answer for answer in answers]

    def sync(self, x: int) -> int:
        return int(self.models["a"].remote(x).result())

    def context(self) -> tuple[str, bool]:
        context = serve.get_replica_context()
        return context.deployment, context.servable_object is self

    def whole_cluster(self) -> Any:
        return serve.status()

    def dask(self) -> Any:
        return serve.get_client()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    seen.clear()
    yield
    for name in ("default", "other"):
        try:
            serve.delete(name)
        except ServeError:
            pass
    assert leftover_threads() == []


def app(a: int = 1, b: int = 2) -> serve.Application:
    return Ingress.bind({"a": Model.bind(a), "b": Model.bind(b)})


def test_an_app_in_this_process() -> None:
    handle = serve.run(app(10, 20), local=True)
    assert handle.remote(1).result(10) == [21, 41]
    assert handle.sync.remote(2).result(10) == 22
    assert asyncio.run(_await(handle, 3)) == [23, 43]
    assert handle.context.remote().result(10) == ("Ingress", True)
    assert any(name.startswith("daskserve-sync-Model") for name in seen)
    assert serve.get_app_handle() == handle
    model = serve.get_deployment_handle("Model_1", "default")
    assert model.remote(0).result(10) == 40
    with pytest.raises(KeyError, match="Model_1"):
        serve.get_deployment_handle("Modell", "default")


async def _await(handle: serve.DeploymentHandle, x: int) -> Any:
    return await handle.remote(x)


def test_errors_are_as_on_a_cluster() -> None:
    handle = serve.run(app(), local=True)
    model = serve.get_deployment_handle("Model", "default")
    with pytest.raises(LookupError, match="not here"):
        model.fail.remote().result(10)
    with pytest.raises(AttributeError, match=r"no method 'nope'; it has .*'sync'"):
        handle.nope.remote().result(10)
    with pytest.raises(ServeNotRunningError, match="local=True has no cluster"):
        handle.whole_cluster.remote().result(10)
    with pytest.raises(ServeError, match="local=True has no cluster"):
        handle.dask.remote().result(10)


def test_classes_are_the_ones_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model.func_or_class, "__call__", lambda self, x: -x)
    assert serve.run(app(), local=True).remote(3).result(10) == [-3, -3]


def test_what_does_not_start_is_an_error_and_leaves_nothing() -> None:
    @serve.deployment
    class Broken:
        def __init__(self, model: serve.DeploymentHandle) -> None:
            raise OSError("no weights here")

    first = serve.run(app(1, 1), local=True)
    with pytest.raises(DeploymentFailedError, match="no weights here") as caught:
        serve.run(Broken.bind(Model.bind(1)), local=True)
    assert isinstance(caught.value.__cause__, OSError)
    assert first.remote(0).result(10) == [2, 2]  # it goes on


def test_delete_drains_and_ends() -> None:
    serve.run(Model.options(num_replicas=1).bind(1), name="other", local=True)
    handle = serve.get_app_handle("other")
    answer = handle.wait.remote()
    time.sleep(0.05)
    serve.delete("other")
    assert answer.result(1) is None
    assert seen == ["waited", "deleted"]
    with pytest.raises(DeploymentUnavailableError):
        handle.remote(1).result(10)


def test_shutdown_ends_local_apps_too() -> None:
    serve.run(app(), local=True)
    serve.run(Model.bind(1), name="other", local=True)
    serve.shutdown()
    with pytest.raises(ServeNotRunningError):
        serve.shutdown()


def test_running_again_replaces() -> None:
    first = serve.run(Model.bind(1), local=True)
    second = serve.run(Model.bind(5), local=True)
    assert second.remote(0).result(10) == 10
    with pytest.raises(DeploymentUnavailableError):
        first.remote(0).result(10)
