"""``Deployment.map``: a Dask collection through a deployment, partition by partition.

Made where users call; each partition's task runs in a worker, calls a replica (its own
worker's, if there is one with room), and holds its thread until the answer is there. So
Dask's scheduler sees to back-pressure, progress and lost workers as ever.
"""

from __future__ import annotations

import contextlib
import math
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
        shaped = {"chunks", "drop_axis", "new_axis"} & kwargs.keys()
        typed = {"dtype", "meta"} & kwargs.keys()
        if not (shaped and typed):
            outcome = _outcome(score, collection, args)
            if shaped:
                outcome = {"dtype": outcome["dtype"]}
            if typed:
                del outcome["dtype"]
            kwargs = {**outcome, **kwargs}
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


def _outcome(score: Score, array: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Ask the deployment what comes out, by a block of zeros: two rows, or one.

    Dask itself would ask by blocks that are empty, which few models take. Sizes that
    are those of the block are taken for the blocks' own, others for the same in all;
    how many rows come out is not known if they are others than went in.
    """
    import numpy as np

    sample = [size[0] for size in array.chunks]
    if any(math.isnan(size) for size in sample[1:]):
        raise TypeError(
            f"map() needs dtype= and chunks= for an array of unknown chunks, as "
            f"{array.chunks}"
        )
    for sizes in array.chunks[:1]:
        sample[0] = min(2, max((n for n in sizes if not math.isnan(n)), default=2))
    result = np.asarray(score(np.zeros(sample, array.dtype), *args))
    if result.ndim == 0 and array.npartitions > 1:
        raise TypeError(
            f"map() got {result!r} for a block of shape {tuple(sample)}: a deployment "
            f"has to return an array, with an entry for each row"
        )
    chunks = []
    for axis, size in enumerate(result.shape):
        if axis < array.ndim and size == sample[axis]:
            chunks.append(array.chunks[axis])
        else:
            count = array.numblocks[axis] if axis < array.ndim else 1
            chunks.append((size if axis else math.nan,) * count)
    return {
        "dtype": result.dtype,
        "chunks": tuple(chunks),
        "drop_axis": list(range(result.ndim, array.ndim)),
        "new_axis": list(range(array.ndim, result.ndim)),
    }
