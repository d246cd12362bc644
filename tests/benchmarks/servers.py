"""What is loaded: plain uvicorn, and daskserve on a cluster of processes."""

from __future__ import annotations

import io
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import daskserve as serve
from tests.benchmarks import apps
from tests.test_http import Site
from tests.utils import ROOT, Process, ProcessCluster, free_port, poll


@contextmanager
def plain_uvicorn(app: str) -> Iterator[str]:
    """Serve an app of `apps` by uvicorn alone; give its URL."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"tests.benchmarks.apps:{app}"]
    command += ["--port", str(port), "--loop", "uvloop", "--http", "httptools"]
    command += ["--no-access-log", "--workers", "1"]
    with tempfile.TemporaryDirectory(prefix="daskserve-bench-") as directory:
        log = Path(directory) / "uvicorn.log"
        process = Process("uvicorn", command, log, {}, ROOT)
        url = f"http://127.0.0.1:{port}/"
        try:
            poll(lambda: _answers(url), 30)
            yield url
        finally:
            process.end_group()


def _answers(url: str, headers: Sequence[str] = ()) -> bool:
    request = urllib.request.Request(
        url, headers=dict(header.split(": ", 1) for header in headers)
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


class QuietCluster(ProcessCluster):
    """A cluster that keeps its logs out of the table."""

    def __exit__(self, *error: Any) -> None:
        with redirect_stdout(io.StringIO()):
            super().__exit__(*error)


def daskserve(variant: str) -> AbstractContextManager[Site]:
    """Start an instance as a variant wants it; the access log is off by default."""
    workers = 1 if variant == "every-1" else 2
    return start_site(workers, "HeadOnly" if "head" in variant else "EveryNode")


@contextmanager
def start_site(
    workers: int = 2,
    location: str = "HeadOnly",
    *,
    own_ports: bool = False,
    server_first: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[Site]:
    """Start a cluster with an instance on it.

    Parameters
    ----------
    workers
        How many.
    location
        Of the HTTP servers.
    own_ports
        Whether the servers of EveryNode take a port each instead of sharing one.
    server_first
        Whether there is an instance before there are workers: the server of HeadOnly is
        in the scheduler's process then, and stays there.
    env
        More environment variables for the cluster.
    """
    http = {"port": 0 if own_ports else free_port(), "location": location}
    started = QuietCluster(0 if server_first else workers, nanny=False, env=env)
    with started as cluster, cluster.client() as client:
        instance = serve.start(http_options=http)
        try:
            if server_first:
                for _ in range(workers):
                    cluster.add_worker()
                cluster.wait_for_workers(workers)
            yield Site(cluster, client, instance)
        finally:
            instance.shutdown()


def deploy(site: Site, app: str, variant: str, headers: Sequence[str] = ()) -> str:
    """Deploy an app where the variant wants its replicas; give its URL."""
    where = {"head-far": "far", "head-near": "near"}.get(variant)
    replicas = 2 if variant == "every-2" else 1
    target = apps.function if app == "function" else served(apps.PLAIN.get(app, app))
    deployment = site.deploy(target, where=where, num_replicas=replicas)
    check_placement(site, deployment.name, replicas)
    url = site.at(deployment) + ("" if app == "function" else "/")
    poll(lambda: _answers(url, headers), 30)
    return url


def check_placement(site: Site, name: str, replicas: int) -> None:
    """Fail if replicas share a worker."""
    status = site.instance.status().deployments[name]
    assert len({replica.worker for replica in status.replicas}) == replicas, status


def served(app: str) -> Any:
    """Return a class that serves an app of `apps`."""

    @serve.ingress(getattr(apps, app))
    class Noop:
        pass

    return Noop


@contextmanager
def both(site: Site, app: str, variant: str) -> Iterator[tuple[str, str]]:
    """Serve an app of `apps` by daskserve and by uvicorn; give both URLs, in order."""
    try:
        ours = deploy(site, app, variant)
        with plain_uvicorn(apps.PLAIN.get(app, app)) as plain:
            yield ours, plain
    finally:
        site.clean()
