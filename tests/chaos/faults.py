"""What can be done to a cluster, each noted in its history. The harness."""

from __future__ import annotations

import os
import signal
import time

from tests.chaos.cluster import Fleet
from tests.utils import ProcessCluster, poll

#: How long a worker may take to leave in an orderly way.
LEAVE_S = 40


def kill(fleet: Fleet, pid: int, *, holds_proxy: bool) -> None:
    """Kill a worker's process, as the kernel does when there is no memory."""
    now = time.monotonic()
    fleet.history.kills[pid] = now
    if holds_proxy:
        fleet.history.proxy_kills.append(now)
    os.kill(pid, signal.SIGKILL)


def retire(fleet: Fleet, worker: str) -> None:
    """Ask Dask to retire a worker, and wait until it has gone."""
    fleet.client.retire_workers([worker])
    poll(lambda: worker not in fleet.workers(), LEAVE_S)


def terminate(cluster: ProcessCluster) -> None:
    """Ask the oldest worker's process to end, as Slurm does, and wait until it has."""
    cluster.terminate(cluster.workers[0], LEAVE_S)


def add_worker(fleet: Fleet, cluster: ProcessCluster, *args: str, nanny: bool) -> None:
    """Start another worker, so that an older one can go."""
    before = fleet.workers()
    cluster.add_worker(*args, nanny=nanny)
    poll(lambda: fleet.workers() - before, 40)


def restart(fleet: Fleet) -> None:
    """Restart all workers; return when they are back."""
    began = time.monotonic()
    fleet.history.kills |= {pid: began for pid in fleet.pids().values()}
    fleet.client.restart(timeout=60)
