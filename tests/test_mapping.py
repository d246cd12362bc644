"""Dask collections through the replicas of a deployment, one partition at a time."""

from __future__ import annotations

import math
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
from tests.utils import scheduler_workers

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
    other = sorted(set(scheduler_workers(site.client)))
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


class Shapes:
    """From blocks of rows to other shapes."""

    def wider(self, rows: Any) -> Any:
        return np.full((len(rows), 3), 7.0)

    def best(self, rows: Any) -> Any:
        return rows.argmax(axis=1)

    def squeezed(self, rows: Any) -> Any:
        return np.squeeze(rows.sum(axis=1, keepdims=True))

    def deeper(self, rows: Any) -> Any:
        return np.stack([rows, rows, rows], axis=-1).astype("float32")

    def selected(self, rows: Any) -> Any:
        return rows[rows[:, 0] > 0]

    def mean(self, rows: Any) -> Any:
        return rows.mean(axis=0, keepdims=True)

    def total(self, rows: Any) -> Any:
        return rows.sum()


@pytest.mark.parametrize(
    ("method", "shape", "dtype"),
    [
        ("wider", (10, 3), "float64"),
        ("best", (10,), "int64"),
        ("squeezed", (10,), "float64"),
        ("deeper", (10, 4, 3), "float32"),
        ("selected", (math.nan, 4), "float64"),
        ("mean", (math.nan, 4), "float64"),
    ],
)
def test_an_array_of_another_shape(
    site: Site, method: str, shape: tuple[float, ...], dtype: str
) -> None:
    model = site.deploy(Shapes)
    values = np.random.default_rng(0).random((10, 4))
    for chunks in ((5, 4), (4, 4)):
        array = da.from_array(values, chunks=chunks)
        lazy = model.map(array, method_name=method)
        np.testing.assert_equal(lazy.shape, shape)
        assert lazy.dtype == dtype
        blocks = np.split(values, np.cumsum(array.chunks[0])[:-1])
        expected = np.concatenate([getattr(Shapes(), method)(b) for b in blocks])
        np.testing.assert_array_equal(lazy.compute(), expected)
        np.testing.assert_allclose(lazy.max(axis=0), expected.max(axis=0))
        assert lazy.T.compute().shape == expected.T.shape


def test_an_array_of_unknown_rows_or_shape(site: Site) -> None:
    model = site.deploy(Shapes)
    array = da.ones((10, 4), chunks=(5, 4))
    unknown = array[array[:, 0] > 0]
    assert model.map(unknown, method_name="wider").compute().shape == (10, 3)
    columns = array[:, array[0] > 0]
    with pytest.raises(TypeError, match="dtype= and chunks="):
        model.map(columns, method_name="wider")
    with pytest.raises(TypeError, match="an entry for each row"):
        model.map(array, method_name="total")
    lazy = model.map(array.rechunk((10, 4)), method_name="total")
    assert (lazy.shape, lazy.compute()) == ((), 40)
    lazy = model.map(array, method_name="wider", dtype="float32")
    assert (lazy.shape, lazy.dtype) == ((10, 3), "float32")
    lazy = model.map(array, method_name="best", drop_axis=1)
    assert (lazy.shape, lazy.dtype) == ((10,), "int64")
