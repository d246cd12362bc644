"""Our part of nannies: it ends workers gently, and holds nobody up."""

from __future__ import annotations

import os
import signal
import time

import pytest

import daskserve as serve
from tests.utils import ProcessCluster, poll

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_one_that_hangs_keeps_no_others_out() -> None:
    with ProcessCluster(1, nanny=True) as cluster, cluster.client() as client:
        (hanging,) = cluster.workers
        time.sleep(2)  # what it tells the scheduler first is over by then
        os.kill(hanging.pid, signal.SIGSTOP)
        try:
            serve.start(http_options={"location": "NoServer"})
            cluster.add_worker(nanny=True)

            def arrived() -> bool:
                return client.run_on_scheduler(_count_workers) == 2

            poll(arrived, 20)
        finally:
            os.kill(hanging.pid, signal.SIGCONT)


def test_a_worker_that_ends_first_is_not_started_anew() -> None:
    """Nanny and worker get SIGTERM at once, and nothing keeps the worker."""
    with ProcessCluster(1, nanny=True) as cluster, cluster.client() as client:
        serve.start(detached=True, http_options={"location": "NoServer"})
        worker = cluster.workers.pop()
        poll(lambda: "Nanny plugin daskserve" in worker.log.read_text())
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGTERM)
        worker.terminate()
        worker.wait(15)
        assert worker.poll() == 0
        assert "Restarting worker" not in worker.log.read_text()


def _count_workers(dask_scheduler: object) -> int:
    return len(dask_scheduler.workers)  # type: ignore[attr-defined]
