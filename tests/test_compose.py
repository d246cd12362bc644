"""Apps of several deployments on a cluster; end to end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import daskserve as serve
from daskserve.exceptions import (
    DeploymentFailedError,
    DeploymentUnavailableError,
    PicklingError,
)
from tests.utils import ProcessCluster, leftover_threads

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
