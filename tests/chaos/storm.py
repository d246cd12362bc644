"""A random schedule of faults, the same for the same seed. The harness."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Collection

import daskserve as serve
from daskserve.exceptions import DeploymentFailedError
from tests.chaos import faults
from tests.chaos.app import Broken
from tests.chaos.cluster import NAME, Fleet
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
    """

    def __init__(
        self,
        fleet: Fleet,
        cluster: ProcessCluster,
        seed: int,
        kinds: Collection[str] = (),
    ) -> None:
        self._fleet = fleet
        self._cluster = cluster
        self._random = random.Random(seed)
        self._num_replicas = 2
        #: What was done, and how often.
        self.done = dict.fromkeys(kinds or WEIGHTS, 0)

    def step(self) -> str:
        """Do something; return what."""
        weights = [WEIGHTS[kind] for kind in self.done]
        (kind,) = self._random.choices(list(self.done), weights)
        self.done[kind] += 1
        return f"{kind} {getattr(self, f'_{kind}')() or ''}".strip()

    def _kill(self) -> str:
        fleet = self._fleet
        address, name = self._choose()
        pid = fleet.pids()[address]
        proxies = fleet.proxies()
        if len(proxies) == 1 and address in proxies:  # HeadOnly's, and it is to move
            now = time.monotonic()
            fleet.history.outages.append((now, now + 3))
        faults.kill(fleet, pid, holds_proxy=address in proxies)
        return f"{name} {address} ({pid})"

    def _stop(self) -> str:
        address, pid = self._random.choice(sorted(self._fleet.pids().items()))
        seconds = self._random.uniform(0.5, 3)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        return f"{address} ({pid}) for {seconds:.1f} s"

    def _retire(self) -> str:
        address, name = self._choose()
        process = self._process(name)
        faults.add_worker(self._fleet, self._cluster, nanny=True)
        faults.retire(self._fleet, address)
        self._cluster.workers.remove(process)
        process.wait(faults.LEAVE_S)
        return f"{name} {address}"

    def _leave(self) -> str:
        address, name = self._choose()
        faults.add_worker(self._fleet, self._cluster, nanny=True)
        self._cluster.terminate(self._process(name), faults.LEAVE_S)
        return f"{name} {address}"

    def _redeploy(self) -> str:
        self._fleet.deploy(self._num_replicas)
        return f"version {self._fleet.version}"

    def _scale(self) -> str:
        self._num_replicas = self._random.randrange(1, 5)
        self._fleet.deployment(self._num_replicas).deploy()
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
        faults.restart(self._fleet)
        self._fleet.wait_for_strength(30)
        self._fleet.history.outages.append((began, time.monotonic()))

    def _choose(self) -> tuple[str, str]:
        """Return a worker's address and name; nannies may be bringing all back."""

        def others() -> list[tuple[str, str]]:
            names = self._fleet.names().items()
            return sorted((a, n) for a, n in names if n != VETERAN)

        return self._random.choice(poll(others, 30))

    def _process(self, name: str) -> Process:
        return next(p for p in self._cluster.workers if p.name == name)
