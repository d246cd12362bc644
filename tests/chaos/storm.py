"""A random schedule of faults, the same for the same seed. The harness."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Collection, Sequence

import daskserve as serve
from daskserve.exceptions import DeploymentFailedError
from tests.chaos import faults
from tests.chaos.app import Broken
from tests.chaos.cluster import NAME, Fleet
from tests.hosts import Host
from tests.utils import Process, ProcessCluster, poll

#: What may happen, and how often beside the others.
WEIGHTS = {
    "kill": 5,
    "stop": 3,
    "retire": 3,
    "leave": 3,
    "redeploy": 4,
    "scale": 3,
    "break": 2,
    "restart": 1,
}
#: Where workers have hosts of their own, their cables are pulled, too.
WEIGHTS_ON_HOSTS = {**WEIGHTS, "cut": 4}
#: It is stopped at times, but neither killed nor sent away: memory is watched there.
VETERAN = "w0"


class Storm:
    """Does one thing after the other to a fleet on a cluster of processes.

    Parameters
    ----------
    fleet, cluster
        What it is done to; workers have nannies.
    seed
        Of what is done, and to whom.
    kinds
        What is done at all; none: everything.
    hosts
        Of the workers, if they have their own.
    """

    def __init__(
        self,
        fleet: Fleet,
        cluster: ProcessCluster,
        seed: int,
        kinds: Collection[str] = (),
        hosts: Sequence[Host] = (),
    ) -> None:
        self.fleet = fleet
        self.cluster = cluster
        self._random = random.Random(seed)
        self._num_replicas = 2
        self._hosts = hosts
        self._weights = WEIGHTS_ON_HOSTS if hosts else WEIGHTS
        #: What was done, and how often.
        self.done = dict.fromkeys(kinds or self._weights, 0)

    def step(self) -> str:
        """Do something; return what."""
        weights = [self._weights[kind] for kind in self.done]
        (kind,) = self._random.choices(list(self.done), weights)
        self.done[kind] += 1
        return f"{kind} {getattr(self, f'_{kind}')() or ''}".strip()

    def _kill(self) -> str:
        fleet = self.fleet
        address, name = self._choose()
        pid = fleet.pids()[address]
        proxies = fleet.proxies()
        if len(proxies) == 1 and address in proxies:  # HeadOnly's, and it is to move
            now = time.monotonic()
            fleet.history.outages.append((now, now + 3))
        faults.kill(fleet, pid, holds_proxy=address in proxies)
        return f"{name} {address} ({pid})"

    def _stop(self) -> str:
        address, pid = self._random.choice(sorted(self.fleet.pids().items()))
        seconds = self._random.uniform(0.5, 3)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        return f"{address} ({pid}) for {seconds:.1f} s"

    def _cut(self) -> str:
        host = self._random.choice(self._hosts)
        seconds = self._random.uniform(0.3, 4)
        pids = self.fleet.pids().items()
        there = frozenset(pid for address, pid in pids if f"{host.address}:" in address)
        began = time.monotonic()
        host.cut()
        try:
            time.sleep(seconds)
        finally:
            host.restore()
            self.fleet.history.cuts.append((there, began, time.monotonic()))
        return f"{host.address} ({len(there)} workers) for {seconds:.1f} s"

    def _retire(self) -> str:
        address, name = self._choose()
        process = self._process(name)
        faults.add_worker(self.fleet, self.cluster, nanny=True)
        faults.retire(self.fleet, address)
        self.cluster.workers.remove(process)
        process.wait(faults.LEAVE_S)
        return f"{name} {address}"

    def _leave(self) -> str:
        address, name = self._choose()
        faults.add_worker(self.fleet, self.cluster, nanny=True)
        self.cluster.terminate(self._process(name), faults.LEAVE_S)
        return f"{name} {address}"

    def _redeploy(self) -> str:
        self.fleet.deploy(self._num_replicas)
        return f"version {self.fleet.version}"

    def _scale(self) -> str:
        self._num_replicas = self._random.randrange(1, 5)
        self.fleet.deployment(self._num_replicas).deploy()
        return str(self._num_replicas)

    def _break(self) -> None:
        broken = serve.deployment(name=NAME, version="broken", deploy_timeout_s=20)
        try:
            broken(Broken).deploy()
        except DeploymentFailedError:
            return
        raise AssertionError("what cannot start was deployed")

    def _restart(self) -> None:
        began = time.monotonic()
        faults.restart(self.fleet)
        self.fleet.wait_for_strength(30)
        self.fleet.history.outages.append((began, time.monotonic()))

    def _choose(self) -> tuple[str, str]:
        """Return a worker's address and name; nannies may be bringing all back."""

        def others() -> list[tuple[str, str]]:
            names = self.fleet.names().items()
            return sorted((a, n) for a, n in names if n != VETERAN)

        return self._random.choice(poll(others, 30))

    def _process(self, name: str) -> Process:
        return next(p for p in self.cluster.workers if p.name == name)
