"""A service on Slurm: a Dask scheduler on this machine, and workers that are jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from distributed import Client

import daskserve as serve
from tests.slurm.cluster import Slurm, open_slurm
from tests.slurm.load import Load, handler
from tests.utils import ROOT, ProcessCluster, poll, scheduler_workers

#: How the batch script runs `dask worker`. Where bash waits for it, a signal for the
#: whole job ends bash, and Slurm then kills what is left of the script at once.
Launch = Literal["plain", "exec", "trap", "srun", "srun-wait"]
LAUNCHES: dict[str, str] = {
    "plain": "{command}",
    "exec": "exec {command}",
    "trap": "{command} & worker=$!\n"
    "trap 'kill -TERM $worker' TERM\n"
    "while kill -0 $worker 2>/dev/null; do wait $worker; done",
    "srun": "exec srun {command}",
    "srun-wait": "srun {command} &\nwait",
}
#: What newer versions of Slurm export by themselves.
END_KNOWN = (
    'export SLURM_JOB_END_TIME=$(date +%s -d "$(squeue -h -j $SLURM_JOB_ID -o %e)")\n'
)
HTTP_PORT = 8000
ROUTE = "/handler"


class Head(ProcessCluster):
    """A scheduler without workers, at the address that nodes know."""

    def __init__(self, slurm: Slurm) -> None:
        super().__init__(0, env={"DASK_LOGGING__DASKSERVE": "debug"})
        self._slurm = slurm

    def _place(self, name: str) -> tuple[list[str], list[str]]:
        return [], ["--host", self._slurm.address]


@dataclass
class Site:
    """One service.

    Parameters
    ----------
    slurm, head, client
        What it runs on.
    location
        Of its HTTP servers.
    nanny
        Whether workers have one.
    launch
        How jobs run them.
    end_known
        Whether they are told when their jobs end.
    """

    slurm: Slurm
    head: Head
    client: Client
    location: str = "HeadOnly"
    nanny: bool = True
    launch: Launch = "exec"
    end_known: bool = False
    urls: list[str] = field(default_factory=list)

    def submit(self, *options: str, end_known: bool | None = None) -> int:
        """Submit a job with one worker; return its number."""
        known = self.end_known if end_known is None else end_known
        return self.slurm.submit(self.script(known), *options)

    def script(self, end_known: bool) -> str:
        command = (
            f"{sys.executable} -m dask worker {self.head.address} --nthreads 2 "
            f"--{'' if self.nanny else 'no-'}nanny --no-dashboard --memory-limit 0 "
            "--death-timeout 60"
        )
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return (
            f"export PYTHONPATH={path} PYTHONUNBUFFERED=1\n"
            "export DASK_LOGGING__DASKSERVE=debug\n"
            f"export DASK_TEMPORARY_DIRECTORY={self.slurm.folder}\n"
            f"{END_KNOWN if end_known else ''}"
            f"{LAUNCHES[self.launch].format(command=command)}"
        )

    def wait_for_workers(self, count: int, timeout: float = 60) -> None:
        self.head.wait_for_workers(count, timeout)

    def workers_of(self, job: int) -> set[str]:
        """Return the addresses of the workers on a job's node."""
        node = self.slurm.nodes[self.slurm.job(job)["NodeList"]]
        return {a for a in scheduler_workers(self.client) if f"/{node.address}:" in a}

    def deploy(self, num_replicas: int) -> None:
        """Start the service, once its workers are there."""
        servers = (
            {"host": "127.0.0.1", "port": 0}
            if self.location == "HeadOnly"
            else {"host": "0.0.0.0", "port": HTTP_PORT}
        )
        options = {**servers, "location": self.location}
        instance = serve.start(self.client, detached=True, http_options=options)
        deployment = serve.deployment(
            name="handler", route_prefix=ROUTE, num_replicas=num_replicas
        )(handler)
        deployment.deploy()
        self.urls = instance.http_urls
        if self.location != "HeadOnly":
            hosts = self.slurm.nodes.values()
            self.urls = [f"http://{host.address}:{HTTP_PORT}" for host in hosts]

    def load(self, requests: int) -> Load:
        return Load([url + ROUTE for url in self.urls], requests)

    def wait_for_replicas(self, count: int, timeout: float = 60) -> None:
        """Wait until so many run, each where it can stay."""

        def states() -> list[tuple[str, str]]:
            replicas = serve.status().deployments["handler"].replicas
            return [(r.state, r.reason) for r in replicas]

        try:
            poll(lambda: states() == [("RUNNING", "")] * count, timeout, 0.2)
        except AssertionError:
            raise AssertionError(f"after {timeout} s: {states()}") from None

    def logs(self) -> str:
        return f"{self.head.logs()}\n{self.slurm.logs()}"


@contextmanager
def open_site(slurm: Slurm, **options: object) -> Iterator[Site]:
    """Run a scheduler; jobs and the service are up to the block."""
    with Head(slurm) as head, head.client() as client:
        site = Site(slurm, head, client, **options)  # type: ignore[arg-type]
        yield site


__all__ = ["Site", "open_site", "open_slurm"]
