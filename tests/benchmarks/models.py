"""What is deployed in the rows of work; in workers, which import it from here.

Each answers with the name of its replica, over HTTP and through a handle (`work`).
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request

import daskserve as serve
from tests.benchmarks.calls import Done, Load, make
from tests.benchmarks.generator import through

#: How the names of slow replicas begin, and how many times longer they take.
SLOW, SLOWER = "slow ", 4
#: A perceptron of two layers, some milliseconds on one core.
ITEMS, WIDTH = 64, 1024


def _milliseconds(request: Request) -> float:
    return float(request.query_params["ms"])


def _tag() -> str:
    return serve.get_replica_context().replica_tag


class Sleep:
    """Sleeps on the replica's thread.

    Parameters
    ----------
    slow_file
        If it is given, the first replica, which finds no such file, is slow.
    """

    def __init__(self, slow_file: str | None = None) -> None:
        self._who, self._factor = _tag(), 1
        if slow_file is not None and _is_first(slow_file):
            self._who, self._factor = f"{SLOW}{self._who}", SLOWER

    def __call__(self, request: Request) -> str:
        return self.work(_milliseconds(request))

    def work(self, ms: float) -> str:
        time.sleep(self._factor * ms / 1000)
        return self._who


def _is_first(file: str) -> bool:
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class AsyncSleep:
    """Sleeps on the replica's loop."""

    def __init__(self) -> None:
        self._who = _tag()

    async def __call__(self, request: Request) -> str:
        return await self.work(_milliseconds(request))

    async def work(self, ms: float) -> str:
        await asyncio.sleep(ms / 1000)
        return self._who


class Perceptron:
    """Multiplies matrices of numpy's, and takes the time that this takes."""

    def __init__(self) -> None:
        self._who = _tag()
        self._predict = perceptron()

    def __call__(self, request: Request) -> str:
        return self.work(0)

    def work(self, ms: float) -> str:
        self._predict()
        return self._who


def perceptron() -> Any:
    """Return a model without arguments, for it makes its input itself."""
    rng = np.random.default_rng(0)
    items = rng.random((ITEMS, WIDTH), dtype=np.float32)
    first, second = rng.random((2, WIDTH, WIDTH), dtype=np.float32)
    return lambda: np.maximum(items @ first, 0) @ second


def perceptron_ms() -> float:
    """Measure the model alone: the best of some calls."""
    predict = perceptron()
    times = []
    for _ in range(50):
        began = time.perf_counter()
        predict()
        times.append(time.perf_counter() - began)
    return min(times) * 1000


class Relay:
    """Calls from a replica."""

    def __call__(self) -> None:
        """Deployments have one."""

    async def make(self, deployment: str, load: Load) -> list[Done]:
        return await make(through(deployment), load)


def call_in_task(deployment: str, load: Load) -> list[Done]:
    """Call from a Dask task, on a loop of its own in the task's thread."""
    return asyncio.run(make(through(deployment), load))
