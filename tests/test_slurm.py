"""A real Slurm ends jobs that serve; no request is lost."""

from __future__ import annotations

import time

import pytest

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
    load = run(ending, of=2, requests=400, nanny=nanny, track=track)
    assert load.lost == [], load


@pytest.mark.by_hand
@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_all_jobs_end_at_once(location: str) -> None:
    load = run(Scancel, count=3, location=location)
    assert load.lost == [], load


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
