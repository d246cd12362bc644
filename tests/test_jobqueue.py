"""dask-jobqueue on a real Slurm: jobs that end are replaced before they do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from distributed import Client

import daskserve as serve
from tests.slurm.cluster import Slurm, open_slurm
from tests.slurm.load import Load, handler, loaded
from tests.utils import ROOT, poll, scheduler_workers

dask_jobqueue = pytest.importorskip("dask_jobqueue")
pytestmark = [pytest.mark.slow, pytest.mark.by_hand, pytest.mark.timeout(500)]

#: How long jobs wait until Slurm may start them.
QUEUE_S = 40.0


@contextmanager
def released_late(slurm: Slurm) -> Iterator[None]:
    """Let jobs, which are submitted as held, start some time later."""
    over = threading.Event()
    seen: dict[str, float] = {}

    def run() -> None:
        while not over.wait(0.5):
            for job in slurm.run("squeue", "-h", "-t", "PD", "-o", "%i").split():
                since = seen.setdefault(job, time.monotonic())
                first = len(seen) <= 2  # they are there before there is any load
                if first or time.monotonic() >= since + QUEUE_S:
                    slurm.run("scontrol", "release", job)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_the_next_job_is_asked_for_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of three minutes, a queue of 40 s: no request is lost, none waits."""
    with open_slurm(2) as slurm, released_late(slurm):
        monkeypatch.setenv("SLURM_CONF", str(slurm.folder / "slurm.conf"))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with (
            dask_jobqueue.SLURMCluster(
                cores=1,
                memory="500 MB",
                walltime="00:03:00",
                log_directory=str(slurm.folder),
                local_directory=str(slurm.folder),
                job_script_prologue=[
                    f"export PYTHONPATH={path}",
                    f"export SLURM_CONF={slurm.folder / 'slurm.conf'}",
                ],
                job_extra_directives=["--hold"],
                job_directives_skip=["--mem"],
                scheduler_options={"host": slurm.address, "dashboard_address": ":0"},
            ) as cluster,
            Client(cluster) as client,
        ):
            cluster.adapt(minimum_jobs=2, maximum_jobs=4)
            client.wait_for_workers(2, timeout=60)
            first = set(scheduler_workers(client))
            instance = serve.start(client, http_options={"port": 0})
            deployment = serve.deployment(
                name="handler", route_prefix="/handler", num_replicas=2
            )(handler)
            deployment.deploy()

            def on_others() -> bool:
                replicas = serve.status().deployments["handler"].replicas
                at = {r.worker for r in replicas if r.state == "RUNNING"}
                return len(replicas) == 2 and bool(at) and at.isdisjoint(first)

            with loaded(Load([f"{instance.http_urls[0]}/handler"], 400)) as load:
                poll(on_others, 300, 0.5)
                poll(lambda: _gone(client, first), 120, 0.5)
                time.sleep(3)
        assert load.lost == [], str(load)
        assert load.longest_wait_s < 2, str(load)


def _gone(client: Client, workers: set[str]) -> bool:
    return workers.isdisjoint(scheduler_workers(client))
