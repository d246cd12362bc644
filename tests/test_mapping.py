"""Dask collections through the replicas of a deployment, one partition at a time."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import dask.array as da
import dask.bag as db
import numpy as np
import pytest

import daskserve as serve
from tests.test_http import Site, open_site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site(3) as made:  # with one thread each
        yield made


class Model:
    def __call__(self, values: Any) -> Any:
        return [(2 * value, os.getpid()) for value in values]

    def slowly(self, values: list[int]) -> list[Any]:
        time.sleep(0.005)
        return [(2 * value, os.getpid()) for value in values]

    async def double(self, block: Any, more: int = 0) -> Any:
        assert len(block) > 0
        return block * 2.0 + more

    def fail(self, block: Any) -> Any:
        raise OSError("bad block")


@pytest.mark.long
def test_a_bag_uses_every_replica(site: Site) -> None:
    model = site.deploy(Model, num_replicas=3)
    bag = db.from_sequence(range(3000), npartitions=1000)
    scored = model.map(bag)
    assert scored.npartitions == 1000
    found = scored.compute()
    assert [value for value, _ in found] == [2 * n for n in range(3000)]
    used = Counter(pid for _, pid in found)
    status = serve.status().deployments[model.name]
    assert set(used) == {replica.pid for replica in status.replicas}


def test_a_replica_that_is_lost_loses_nothing(site: Site) -> None:
    model = site.deploy(Model, num_replicas=2, where="far")  # one process of two
    bag = db.from_sequence(range(300), npartitions=300)
    future = site.client.compute(model.map(bag, method_name="slowly"))
    pids = {replica.pid for replica in serve.status().deployments[model.name].replicas}
    time.sleep(0.3)
    assert not future.done()
    # Their worker dies, and with it some tasks and results; others have to start.
    other = sorted(set(site.client.scheduler_info(n_workers=-1)["workers"]))
    model = model.options(workers=[site.near, *other])
    (pid,) = pids
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    model.deploy()
    found = future.result(timeout=40)
    assert [value for value, _ in found] == [2 * n for n in range(300)]


def test_arrays_and_dataframes_keep_their_kind(site: Site) -> None:
    dd = pytest.importorskip("dask.dataframe")
    pd = pytest.importorskip("pandas")
    model = site.deploy(Model, num_replicas=2)
    array = da.arange(100, chunks=7).reshape((50, 2))
    scored = model.map(array, 1, method_name="double")
    assert scored.dtype == np.float64 and scored.shape == (50, 2)
    np.testing.assert_array_equal(scored.compute(), array.compute() * 2.0 + 1)
    frame = pd.DataFrame({"a": range(20), "b": range(20)})
    scored = model.map(dd.from_pandas(frame, npartitions=4), method_name="double")
    assert list(scored.columns) == ["a", "b"] and scored.dtypes["a"] == np.float64
    pd.testing.assert_frame_equal(scored.compute(), frame * 2.0)
    series = model.map(dd.from_pandas(frame.a, npartitions=3), method_name="double")
    pd.testing.assert_series_equal(series.compute(), frame.a * 2.0)


def test_what_goes_wrong_is_said(site: Site) -> None:
    model = site.deploy(Model)
    with pytest.raises(TypeError, match="bag, array, dataframe.* not builtins.list"):
        model.map([1, 2])
    with pytest.raises(OSError, match="bad block"):
        model.map(da.ones(10, chunks=5), method_name="fail", dtype=float).compute()
    with pytest.raises(AttributeError, match="has no method 'nope'"):
        model.map(db.from_sequence([1]), method_name="nope").compute()
