"""How costs grow with the cluster: ``python -m tests.benchmarks.growth``.

For N workers, N deployments of ten replicas each, and a proxy on every worker. All but
`growth_real` is a simulation, in one process, of what is pure: the controller's brain
and the callers' side.

What grows with what (R replicas, W workers, D deployments, P processes with routes):

- placing k replicas: a count of all R and a sort of W workers once a step, then
  k log W. Where a deployment has replicas on a host, all workers of the host are looked
  at again for each that is placed there;
- the controller's step, ten times a second: R, to see whether each worker is still
  there, with a small factor; what it compares are deployments in which something
  happened. While a step takes long, the next one waits as long, so that no more than
  half of the scheduler's time goes there;
- a change of routes: the replicas that changed, times P. A whole snapshot has
  all R, and goes to who has just come. Each process then looks at D deployments, and
  at all replicas of those that changed;
- health: one report from each worker in a period, whatever its replicas; a look at W
  ten times a second, and at R while a worker is silent;
- queue reports: the deployments for which requests wait, times P, ten times a second;
- connections: a process has one to each worker with replicas that it has sent anything
  to; to all, if it has an HTTP server. With "EveryNode" that is the square of W over
  the cluster. Besides, it has some to the ports of replicas that it uses often, a
  bounded number.

Load is spread by each caller's own count and by what replicas tell of others' requests
with each answer: callers that each have few requests know less.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from daskserve.controller.actions import StartReplica
from daskserve.controller.health import HealthBoard
from daskserve.controller.queues import QueueBoard
from daskserve.transport import connections as transport_connections
from daskserve.transport.channel import Channel
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.router import Router, Slot
from daskserve.transport.snapshots import difference
from tests.test_state import Rig

REPLICAS = 10
EMPTY: dict[str, Any] = {"routes": {}, "deployments": {}}


def timed(function: Callable[[], Any]) -> float:
    """Return milliseconds."""
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3


class Cluster:
    """The controller's brain with N workers and deployments, and what it would send."""

    def __init__(self, size: int) -> None:
        self.rig = Rig(size)
        self.routing = EMPTY
        self.changes: dict[str, Any] | None = None
        self.ids: list[int] = []
        for n in range(size):
            name = f"deployment-{n}"
            self.rig.deploy(name=name, route_prefix=f"/{name}", num_replicas=REPLICAS)

    def step(self) -> None:
        """Do what `Instance._step` does, as far as it is pure."""
        actions = self.rig.state.reconcile(self.rig.now, self.rig.views)
        self.ids += [a.replica_id for a in actions if isinstance(a, StartReplica)]
        routing = self.rig.state.routing()
        self.changes = difference(self.routing, routing)
        self.routing = routing

    def start_replicas(self) -> None:
        for replica_id in self.ids:
            direct = ["10.11.12.13", 40000 + replica_id % 10000, b"s" * 22]
            self.rig.state.replica_started(
                replica_id, now=self.rig.now, pid=1, direct=direct
            )
        self.ids.clear()

    def lose_replica(self) -> None:
        replica_id = self.routing["deployments"]["deployment-0"]["replicas"][0][0]
        self.rig.state.replica_lost(replica_id, "lost", now=self.rig.now)

    def lose_worker(self) -> None:
        worker = next(iter(self.rig.views))
        del self.rig.views[worker]
        self.rig.state.worker_lost(worker, "lost", now=self.rig.now)


def packed(snapshot: dict[str, Any] | None, base: int | None) -> bytes:
    """Pack what `Publisher` sends, as Dask does for each process."""
    message = {"op": "serve-routes", "version": 1, "snapshot": snapshot, "base": base}
    data: bytes = msgpack.packb(message)
    return data


def controller_costs(size: int) -> dict[str, float]:
    """Time the controller's steps, in ms, and count what it would send, in bytes."""
    cluster = Cluster(size)
    costs = {"ms: place all replicas at once": timed(cluster.step)}
    cluster.start_replicas()
    costs["ms: all replicas have started"] = timed(cluster.step)
    cluster.step()
    costs["ms: nothing to do"] = timed(cluster.step)
    whole = packed(cluster.routing, None)
    cluster.lose_replica()
    costs["ms: one replica lost"] = timed(cluster.step)
    change = packed(cluster.changes, 0)
    costs["ms: packing that for all processes"] = timed(
        lambda: [packed(cluster.changes, 0) for _ in range(size)]
    )
    cluster.start_replicas()
    cluster.step()
    cluster.lose_worker()
    costs["ms: one worker lost"] = timed(cluster.step)
    costs |= {
        "bytes: whole snapshot": len(whole),
        "bytes: change of one replica": len(change),
        "bytes: that to all processes": len(change) * size,
    }
    return costs


async def _never_connected(address: str) -> Any:
    await asyncio.Event().wait()


class _Comm:
    """A connection to a worker on which nothing comes."""

    async def read(self) -> Any:
        await asyncio.Event().wait()

    async def write(self, message: Any) -> None:
        pass

    def abort(self) -> None:
        pass


class _Direct(Channel):
    """A connection to a replica on which nothing comes."""

    greeted = is_open = True
    broke = False
    worker = ""

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def send(self, message: Any) -> None:
        pass

    def close(self, reason: str) -> None:
        pass


async def _connections(workers: int, replicas: int) -> int:
    async def connect(address: str) -> _Comm:
        return _Comm()

    entries = [
        [i, f"D#{i}", f"tcp://10.0.0.{i % workers}:1", ["10.0.0.1", 1, b"s"], None]
        for i in range(replicas)
    ]
    info = {"replicas": entries, "max_ongoing": 100, "max_queued": None}
    info |= {"max_websockets": 10, "timeout_s": None, "hopeless": False}
    dispatcher = Dispatcher(asyncio.get_running_loop(), connect)
    dispatcher.connect_ahead()
    dispatcher.update(1, {"routes": {}, "deployments": {"D": info}})
    await dispatcher.connected()
    made = dispatcher.connections
    for slot in [*dispatcher.groups["D"].router.slots.values()] * 3:
        made.channel(slot)  # as if all were asked again and again
    count = len(made.channels) + len(made.direct)
    made.direct.clear()
    await dispatcher.close()
    return count


def connections(workers: int, replicas: int) -> int:
    """Return how many connections a process has that uses all replicas often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport_connections, "DirectChannel", _Direct)
        patch.setattr(transport_connections, "share_of_files", lambda _: 10**6)
        return asyncio.run(_connections(workers, replicas))


async def _caller_costs(size: int) -> dict[str, float]:
    cluster = Cluster(size)
    cluster.step()
    cluster.start_replicas()
    cluster.step()
    for entry in cluster.routing["deployments"].values():
        for replica in entry["replicas"]:
            replica[3] = None  # no connections: that is not what is measured
    dispatcher = Dispatcher(asyncio.get_running_loop(), _never_connected)
    whole = cluster.routing
    costs = {
        "ms: a process takes a snapshot": timed(lambda: dispatcher.update(1, whole))
    }
    cluster.lose_replica()
    cluster.step()
    changes = cluster.changes
    assert changes is not None
    costs["ms: a process takes a change"] = timed(
        lambda: dispatcher.update(2, changes, base=1)
    )
    await dispatcher.close()
    return costs


def caller_costs(size: int) -> dict[str, float]:
    """Time what a proxy or handle does with news."""
    return asyncio.run(_caller_costs(size))


def queue_costs(size: int) -> dict[str, float]:
    """Count and time reports, with all processes having ten deployments' queues."""
    board = QueueBoard()

    def report() -> None:
        for n in range(size):
            queued = {f"deployment-{(n + i) % size}": 1000 for i in range(10)}
            board.report(f"tcp://10.0.0.{n}:4000", queued)

    costs = {"ms: reports of all processes": timed(report)}
    costs["ms: their sum"] = timed(lambda: board.due(1.0))
    one = {f"deployment-{i}": 1000 for i in range(10)}
    costs["bytes: one report"] = len(msgpack.packb(one))
    costs["bytes: the sum"] = len(msgpack.packb(board.totals()))
    return costs


def health_costs(size: int) -> dict[str, float]:
    """Count and time what workers report of their replicas' health, and the look at it.

    Each does once in a period, of ten seconds if nobody wants another.
    """
    cluster, board = Cluster(size), HealthBoard()
    cluster.step()
    cluster.start_replicas()
    cluster.step()
    workers = list(cluster.rig.views)
    report = {
        "op": "serve-health",
        "worker": workers[0],
        "period_s": 10.0,
        "patience_s": 40.0,
        "troubles": [],
    }
    data: bytes = msgpack.packb(report)

    def take() -> None:
        for worker in workers:
            msgpack.unpackb(data)
            board.report(worker, 10.0, 40.0, [])

    def lose() -> None:
        for number in range(50):
            for worker in workers[1:]:
                board.heard(worker)
            board.look(1000.0 + number)
        assert cluster.rig.state.workers_silent(board.silent, now=cluster.rig.now)

    costs = {"ms: health reports of all workers": timed(take)}
    board.look(999.0)
    costs["ms: a look at who is silent"] = timed(lambda: board.look(1000.0))
    lose()
    costs["ms: a look while one is"] = timed(
        lambda: cluster.rig.state.workers_silent(board.look(1050.0), now=0.0)
    )
    costs["bytes: one health report"] = len(data)
    return costs


def measure(size: int, runs: int = 1) -> dict[str, float]:
    """Return all costs of a size: of several runs the least, which has least noise."""
    found: dict[str, float] = {}
    for _ in range(runs):
        for costs in (
            controller_costs(size),
            caller_costs(size),
            queue_costs(size),
            health_costs(size),
        ):
            for name, value in costs.items():
                found[name] = min(value, found.get(name, math.inf))
    return found


def variation(counts: list[int]) -> float:
    """Return the coefficient of variation."""
    return statistics.pstdev(counts) / statistics.fmean(counts)


def spread(
    callers: int, *, replicas: int = 10, in_flight: int = 400, by_chance: bool = False
) -> float:
    """Return how unevenly replicas are loaded, with requests that end at random.

    Parameters
    ----------
    callers
        Processes that send requests; none knows what the others have sent.
    replicas
        Replicas of the deployment.
    in_flight
        Requests that are in them at a time.
    by_chance
        Whether each request goes anywhere, for comparison.
    """
    chance = random.Random(callers)
    routers = [Router(chance) for _ in range(callers)]
    for router in routers:
        slots = [Slot(i, f"D#{i}", f"tcp://w{i}") for i in range(replicas)]
        router.update(slots, in_flight)
    held: list[tuple[Router, Slot]] = []
    load: Counter[int] = Counter(dict.fromkeys(range(replicas), 0))
    found = []
    for number in range(1, 20 * in_flight + 1):
        if len(held) == in_flight:
            i = chance.randrange(in_flight)
            held[i], held[-1] = held[-1], held[i]
            asked, ended = held.pop()
            asked.end(ended)
            load[ended.replica_id] -= 1
            others = load[ended.replica_id] - ended.in_flight
            asked.report(ended, others, in_flight, 0.01, 0.01, False, 0.0)
        router = chance.choice(routers)
        slot = router.choose(0)
        if by_chance:
            slot = chance.choice(list(router.slots.values()))
        assert slot is not None
        router.begin(slot)
        load[slot.replica_id] += 1
        held.append((router, slot))
        if number % in_flight == 0 and number > 5 * in_flight:
            found.append(variation(list(load.values())))
    return statistics.fmean(found)


def print_costs(sizes: list[int]) -> None:
    columns = [measure(size, runs=3) for size in sizes]
    print(
        f"{'workers = deployments = proxies':40}" + "".join(f"{n:>12}" for n in sizes)
    )
    for name in columns[0]:
        values = (f"{column[name]:12,.2f}" for column in columns)
        if name.startswith("bytes"):
            values = (f"{column[name]:12,.0f}" for column in columns)
        print(f"{name:40}" + "".join(values))


def print_spread() -> None:
    print("\nvariation of load, 400 requests in 10 replicas (0: all have the same)")
    print(f"{'callers':>10} {'daskserve':>10} {'by chance':>10} {'best':>6}")
    for callers in (1, 10, 100, 1000):
        ours, chance = spread(callers), spread(callers, by_chance=True)
        print(f"{callers:>10} {ours:10.3f} {chance:10.3f} {0:6.3f}")


def print_connections() -> None:
    print("\nconnections of a process that uses all replicas often")
    for workers, replicas in ((10, 100), (100, 1000), (1000, 10_000)):
        count = connections(workers, replicas)
        print(f"{workers:>6} workers {replicas:>7} replicas {count:>6}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--real", type=int, default=64, help="workers; 0: none")
    args = parser.parse_args()
    print_costs(args.sizes)
    print_spread()
    print_connections()
    if args.real:
        from tests.benchmarks.growth_real import print_times

        print()
        print_times(args.real)


if __name__ == "__main__":
    main()
