"""What has to be so when all is over: nothing left behind, nothing grown. The harness.

Functions whose names begin with ``_in`` run inside the cluster's processes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil
from distributed import Scheduler, Worker

from tests.chaos.cluster import Fleet
from tests.chaos.report import Report
from tests.inside import idle_inside
from tests.utils import ProcessCluster, child_processes, poll

#: Listeners that each worker has of Dask's: its own and its dashboard's.
DASK_LISTENERS = 2
#: Memory counts from so long after a process has begun ...
WARM_S = 60.0
#: ... and only if it is seen for so long after that.
SEEN_S = 60.0
MAY_GROW = 0.05


def _in_scheduler(dask_scheduler: Scheduler) -> list[str]:
    return [str(key) for key, task in dask_scheduler.tasks.items() if task.actor]


def _in_worker(dask_worker: Worker) -> dict[str, Any]:
    process = psutil.Process()
    plugin: Any = dask_worker.plugins["daskserve"]
    listening = (
        connection.laddr.port  # in both families, it may be
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )
    return {
        "pid": process.pid,
        "replicas": sorted(plugin.runners),
        "listeners": len(set(listening)),
    }


def _in_process() -> tuple[int, float, int]:
    """Return who it is, since when, and what it needs of memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process(os.getpid())
    return process.pid, process.create_time(), process.memory_info().rss


def check(fleet: Fleet, cluster: ProcessCluster, report: Report) -> None:
    """Look for anything that is missing, and anything that is left."""
    try:
        fleet.wait_for_strength(30)
        poll(lambda: not _surplus(fleet, cluster), 30, 0.2)
        idle_inside(fleet)  # type: ignore[arg-type]
    except AssertionError:
        pass
    status = fleet.status()
    running = len(fleet.replicas())
    text = f"{running} replicas of {status.target_replicas}, {status.state}"
    settled = status.state in ("HEALTHY", "DEPLOY_FAILED")
    in_order = running == status.target_replicas and settled
    report.check(in_order, f"{text} {status.reason}".rstrip())
    surplus = _surplus(fleet, cluster)
    report.check(not surplus, "; ".join(surplus) or "no actor, process or port is left")
    try:
        idle_inside(fleet)  # type: ignore[arg-type]
        report.note("nothing is in flight anywhere")
    except AssertionError as err:
        report.breaches.append(f"in flight: {err}")


def _surplus(fleet: Fleet, cluster: ProcessCluster) -> list[str]:
    """Say what differs from what the status says."""
    replicas = fleet.status().replicas
    wanted = {f"daskserve-{r.replica_tag}-{r.replica_id}" for r in replicas}
    actors = set(fleet.client.run_on_scheduler(_in_scheduler))
    found = [f"actor {key} is left" for key in actors - wanted]
    found += [f"replica {key} has no actor" for key in wanted - actors]
    inside = fleet.client.run(_in_worker)
    proxies = fleet.proxies()
    for address, facts in inside.items():
        here = sorted(r.replica_id for r in replicas if r.worker == address)
        if facts["replicas"] != here:
            found.append(f"{address} runs {facts['replicas']}, should {here}")
        listeners = DASK_LISTENERS + len(here) + (address in proxies)
        if facts["listeners"] != listeners:
            found.append(f"{address} listens {facts['listeners']} times, {listeners=}")
    known = {facts["pid"] for facts in inside.values()}
    known |= {process.pid for process in [cluster.scheduler, *cluster.workers]}
    orphans = {p: text for p, text in child_processes().items() if p not in known}
    return found + [f"process {pid} is left: {text}" for pid, text in orphans.items()]


@dataclass(slots=True)
class Memory:
    """What processes need, from a minute after their start."""

    #: By process: its name, and when it was seen with how many bytes.
    seen: dict[int, tuple[str, list[tuple[float, int]]]] = field(default_factory=dict)

    def look(self, fleet: Fleet) -> None:
        """Look once more."""
        found: dict[str, Any] = fleet.client.run(_in_process, on_error="return")
        found = {"scheduler": fleet.client.run_on_scheduler(_in_process), **found}
        for name, answer in found.items():
            if isinstance(answer, tuple):  # it may be on its way out
                pid, began, rss = answer
                if time.time() - began >= WARM_S:
                    _, times = self.seen.setdefault(pid, (name, []))
                    times.append((time.monotonic(), rss))

    def check(self, report: Report) -> None:
        """Make a table of those that were seen for long enough."""
        kinds: Counter[bool] = Counter()
        for pid, (name, times) in self.seen.items():
            (began, first), (ended, last) = times[0], times[-1]
            if ended - began < SEEN_S:
                continue
            kinds[name == "scheduler"] += 1
            growth = last / first - 1
            report.check(
                growth <= MAY_GROW,
                f"memory of {name} ({pid}): {first / 2**20:.1f} MiB, "
                f"{ended - began:.0f} s later {last / 2**20:.1f} ({growth:+.1%})",
            )
        report.note(f"memory seen: scheduler {kinds[True]}, workers {kinds[False]}")
