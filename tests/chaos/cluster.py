"""A cluster with one deployment on it, and what is known of both. The harness."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Client

import daskserve as serve
from daskserve.status import DeploymentStatus, ReplicaStatus
from tests.chaos.app import Echo
from tests.chaos.contract import History
from tests.utils import free_port, poll, scheduler_workers

NAME = "Echo"


class Fleet:
    """A cluster that serves one deployment.

    Parameters
    ----------
    client
        Of the cluster.
    directory
        For diaries and fates.
    workers
        Where replicas may run; None: anywhere.
    """

    def __init__(
        self,
        client: Client,
        instance: serve.ServeInstance,
        directory: Path,
        workers: list[str] | None = None,
    ) -> None:
        self.client = client
        self.instance = instance
        self.directory = directory
        self.history = History()
        self.version = 0
        self.diaries = directory / "diaries"
        self.diaries.mkdir()
        self._workers = workers

    @property
    def url(self) -> str:
        return f"{self.instance.http_urls[0]}/{NAME}"

    def deploy(self, num_replicas: int) -> None:
        """Deploy the next version; from when that returns, it has to answer."""
        self.version += 1
        self.deployment(num_replicas).deploy()
        self.history.versions.append((time.monotonic(), self.version))

    def deployment(self, num_replicas: int) -> serve.Deployment:
        """Return the present version with so many replicas."""
        return serve.deployment(
            name=NAME,
            num_replicas=num_replicas,
            version=str(self.version),
            init_args=(str(self.diaries), self.version),
            workers=self._workers,
            deploy_timeout_s=60,
        )(Echo)

    def status(self) -> DeploymentStatus:
        return serve.status().deployments[NAME]

    def replicas(self) -> list[ReplicaStatus]:
        """Return the replicas that run, and were not killed."""
        return [
            replica
            for replica in self.status().replicas
            if replica.state == "RUNNING" and replica.pid not in self.history.kills
        ]

    def proxies(self) -> dict[str, int]:
        """Return the workers with a proxy, and their processes."""
        proxies = [p.worker for p in serve.status().proxies if p.url is not None]
        pids = self.pids()
        return {address: pids[address] for address in proxies if address in pids}

    def pids(self) -> dict[str, int]:
        """Return the processes of all workers, by address."""
        found: dict[str, Any] = self.client.run(os.getpid, on_error="return")
        return {a: pid for a, pid in found.items() if isinstance(pid, int)}

    def workers(self) -> set[str]:
        """Return the addresses of all workers."""
        return set(self.names())

    def names(self) -> dict[str, str]:
        """Return the names of all workers, by address."""
        workers = scheduler_workers(self.client)
        return {address: str(facts["name"]) for address, facts in workers.items()}

    def wait_for_strength(self, timeout_s: float) -> float:
        """Wait until all replicas run that should; return the seconds."""
        began = time.monotonic()
        poll(self._is_strong, timeout_s)
        return time.monotonic() - began

    def _is_strong(self) -> bool:
        return len(self.replicas()) == self.status().target_replicas


@contextmanager
def open_fleet(
    client: Client,
    directory: Path,
    location: str,
    workers: list[str] | None = None,
    before_deploy: Callable[[], None] = lambda: None,
    num_replicas: int = 2,
    host: str = "127.0.0.1",
) -> Iterator[Fleet]:
    """Serve from a cluster, until the end."""
    http = {"host": host, "port": free_port(), "location": location}
    with serve.start(client, detached=True, http_options=http) as instance:
        fleet = Fleet(client, instance, directory, workers)
        before_deploy()
        fleet.deploy(num_replicas)
        yield fleet
