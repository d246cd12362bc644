"""A real Slurm ends jobs that serve; no request is lost."""

from __future__ import annotations

import time

import pytest

import daskserve as serve
from tests.slurm.cluster import Track, open_slurm
from tests.slurm.endings import LIMIT_S, Ending, Requeue, Scancel, run
from tests.slurm.load import loaded
from tests.slurm.site import open_site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("ending", "nanny", "track"),
    [
        pytest.param(Scancel, True, "pgid", marks=pytest.mark.long),
        pytest.param(Scancel, True, "cgroup", marks=pytest.mark.by_hand),
        pytest.param(Scancel, False, "pgid", marks=pytest.mark.by_hand),
        pytest.param(Requeue, True, "pgid", marks=pytest.mark.by_hand),
    ],
)
def test_one_of_two_jobs_ends(ending: type[Ending], nanny: bool, track: Track) -> None:
    load, _ = run(ending, of=2, requests=400, nanny=nanny, track=track)
    assert load.lost == [], load


@pytest.mark.by_hand
@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_all_jobs_end_at_once(location: str) -> None:
    load, absence = run(Scancel, count=3, location=location)
    assert load.lost == [], load
    # A worker that the scheduler knows has yet to import daskserve, three at once.
    assert load.longest_wait_s < absence.of_workers_s + 3 + 3, (load, absence)


@pytest.mark.by_hand
def test_walltime() -> None:
    """Of three jobs two run out of time, one of which has known when."""
    with open_slurm() as slurm, open_site(slurm) as site:
        ends = [site.submit("--time=1", end_known=known) for known in (True, False)]
        site.submit()
        site.wait_for_workers(3)
        site.deploy(3)
        with loaded(site.load(400)) as load:
            for job in ends:
                site.submit(f"--dependency=afterany:{job}")
            slurm.wait("TIMEOUT", *ends, timeout=LIMIT_S)
            site.wait_for_workers(3)
            site.wait_for_replicas(3)
            time.sleep(2)
        assert load.lost == [], f"{load}\n{site.logs()}"


@pytest.mark.by_hand
@pytest.mark.timeout(600)
def test_time_limits_change() -> None:
    """A job of two minutes gets more time, and then less again: it is asked about."""
    with open_slurm(2) as slurm, open_site(slurm) as site:
        job = site.submit("--time=2")
        site.wait_for_workers(1)
        began = time.monotonic()
        site.deploy(1)
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
        with loaded(site.load(400)) as load:
            time.sleep(45)  # it is asked again after 30 s
            site.submit()
            site.wait_for_workers(2)
            # Would it end when it was to, its replica would have moved.
            time.sleep(max(0.0, began + 110 - time.monotonic()))
            [replica] = serve.status().deployments["handler"].replicas
            assert replica.worker in site.workers_of(job)
            slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=6")
            slurm.wait("TIMEOUT", job, timeout=LIMIT_S + 300)
            site.wait_for_replicas(1)
            time.sleep(2)
        assert load.lost == [], f"{load}\n{site.logs()}"
        print(load)
