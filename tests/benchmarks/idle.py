"""Rows of what daskserve adds to a worker that has nothing to do.

In the process of the command. The opponent is a worker of a cluster without daskserve,
started by distributed's own function: ``dask worker`` imports what adds commands to
`dask`, so daskserve too. Nothing here is sent to workers by name, as they would import
this module, and all that it imports.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import psutil

from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import QuietCluster, start_site
from tests.utils import Process

MIB = 1 << 20
#: Times the seconds of other measurements: there is little to see.
LONGER = 2


@dataclass(frozen=True)
class Workers:
    """Process ids."""

    bare: int
    #: As the bare one, but for ``import daskserve``.
    imported: int
    #: With a proxy and a replica.
    serving: int


@contextmanager
def _place() -> Iterator[Workers]:
    class Empty:
        def __call__(self) -> str:
            return "here"

    def pid() -> int:
        return os.getpid()

    with start_site() as site, QuietCluster(0) as cluster, ExitStack() as stack:
        bare, imported = _start_worker(cluster), _start_worker(cluster, "daskserve")
        stack.callback(bare.end_group)
        stack.callback(imported.end_group)
        cluster.wait_for_workers(2)
        site.deploy(Empty, where="near")
        serving = site.client.run(pid, workers=[site.near])[site.near]
        time.sleep(1)  # until what was just started is done
        yield Workers(bare.pid, imported.pid, serving)


def _start_worker(cluster: QuietCluster, imports: str = "os") -> Process:
    """Start one with the options of those of a `ProcessCluster`."""
    script = f"import {imports}; from distributed.cli.dask_worker import main; main()"
    command = [sys.executable, "-c", script, cluster.address]
    command += ["--no-nanny", "--nthreads", "1", "--memory-limit", "0"]
    command += ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    command += ["--local-directory", str(cluster.directory)]
    log = cluster.directory / f"{imports}.log"
    return Process(imports, command, log, {}, cluster.directory)


def _measure(pid: int, seconds: float) -> Figures:
    process = psutil.Process(pid)
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    memory = process.memory_full_info()
    used = after.user + after.system - before.user - before.system
    return {
        "% of a core": used / seconds * 100,
        "USS MiB": memory.uss / MIB,
        "RSS MiB": memory.rss / MIB,
    }


def _sides(
    which: Callable[[Workers], int],
) -> Callable[[Workers, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(workers: Workers, seconds: float) -> Iterator[Sides]:
        long = seconds * LONGER
        yield Sides(
            lambda: _measure(which(workers), long),
            lambda: _measure(workers.bare, long),
        )

    return sides


BENCHES = [
    Bench("idle/import", "bare worker", _place, _sides(lambda w: w.imported)),
    Bench("idle/proxy-and-replica", "bare worker", _place, _sides(lambda w: w.serving)),
]
