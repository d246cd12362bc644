"""``Deployment.map``: a Dask collection through a deployment, partition by partition.

Made where users call; each partition's task runs in a worker, calls a replica (its own
worker's, if there is one with room), and holds its thread until the answer is there. So
Dask's scheduler sees to back-pressure, progress and lost workers as ever.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from distributed import Reschedule, get_worker

from daskserve.exceptions import QueueFullError, ReplicaDiedError, RequestTimeoutError
from daskserve.handle import DeploymentHandle
from daskserve.session import current_session

#: How long a task waits before it looks whether there are replicas at all.
LOOK_S = 1.0
#: Between two attempts of one partition.
PAUSE_S = 0.1


class Score:
    """The function of a partition's task.

    Parameters
    ----------
    handle
        Calls the deployment's method.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __call__(self, partition: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a replica with a partition.

        Raises
        ------
        distributed.Reschedule
            There is no replica now, or the one that had the partition is lost: this
            thread may be the one that a new replica needs in order to start.
        """
        if isinstance(partition, Iterator):
            partition = list(partition)  # of a bag
        while True:
            response = self._handle.remote(partition, *args, **kwargs)
            try:
                return self._result(response)
            except QueueFullError:
                time.sleep(PAUSE_S)
            except ReplicaDiedError:
                raise self._reschedule() from None

    def _result(self, response: Any) -> Any:
        while True:
            try:
                return response.result(timeout=LOOK_S)
            except RequestTimeoutError:
                if response.done():
                    raise
                name = self._handle.deployment_name
                if not current_session().dispatcher.has_replicas(name):
                    response.cancel()
                    raise self._reschedule() from None

    def _reschedule(self) -> Exception:
        with contextlib.suppress(ValueError):
            get_worker()
            time.sleep(PAUSE_S)
            return Reschedule()
        return ReplicaDiedError("the replica was lost, and this is not a Dask task")


def map_collection(
    handle: DeploymentHandle, collection: Any, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Return a collection of what a deployment makes of the partitions of another.

    Parameters
    ----------
    handle
        Calls the deployment's method.
    collection
        A Dask bag, array, dataframe or series.
    args
        More arguments of the method.
    kwargs
        Options of Dask's own ``map_partitions`` or ``map_blocks``.

    Raises
    ------
    TypeError
        It is none of these.
    """
    score = Score(handle)
    kind = type(collection).__module__.partition(".")[2].partition(".")[0]
    if kind == "bag" and hasattr(collection, "map_partitions"):
        return collection.map_partitions(score, *args, **kwargs)
    if hasattr(collection, "map_blocks"):
        if not {"dtype", "meta"} & kwargs.keys():
            kwargs["dtype"] = _dtype(score, collection, args)
        return collection.map_blocks(score, *args, **kwargs)
    if hasattr(collection, "map_partitions") and hasattr(collection, "_meta_nonempty"):
        if "meta" not in kwargs:
            result = score(collection._meta_nonempty, *args)
            kwargs["meta"] = result[:0] if hasattr(result, "iloc") else type(result)
        return collection.map_partitions(score, *args, **kwargs)
    raise TypeError(
        f"map() takes a Dask bag, array, dataframe or series, and not "
        f"{type(collection).__module__}.{type(collection).__qualname__}"
    )


def _dtype(score: Score, array: Any, args: tuple[Any, ...]) -> Any:
    """Ask the deployment, by a block of zeros: one row, and the rest as in the first.

    Dask itself would ask by blocks that are empty, which few models take.
    """
    import numpy as np

    shape = [size[0] for size in array.chunks]
    if any(size != size for size in shape):
        raise TypeError("map() needs dtype= or meta= for an array of unknown chunks")
    shape[:1] = [min(1, size) for size in shape[:1]]
    return np.asarray(score(np.zeros(shape, array.dtype), *args)).dtype
