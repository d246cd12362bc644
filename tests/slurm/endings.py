"""``python -m tests.slurm.endings NAME``: end jobs in one way, and count what is lost.

Three jobs with a worker each serve; then one of them ends, or all do at once, and
others come in their place. A line says what became of the requests.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tests.slurm.cluster import Slurm, Track, open_slurm
from tests.slurm.load import Load, loaded
from tests.slurm.site import LAUNCHES, Site, open_site
from tests.utils import poll, scheduler_workers

JOBS = 3
#: Slurm looks at time limits every 30 s, and signals come up to 60 s too early.
LIMIT_S = 60 + 30 + 30
#: Load before and after.
CALM_S = 5


class Ending:
    """One way to end jobs.

    Parameters
    ----------
    site
        What serves.
    jobs
        The numbers of those that are to end.
    pause_s
        How long after their end the next ones may come, where that is up to us.
    """

    #: More options for jobs that are to end.
    options: tuple[str, ...] = ()
    #: Whether nobody says when they end, so that the next ones are submitted before.
    chained = False
    #: How long they may take from their start to their end.
    timeout_s = 60.0

    def __init__(self, site: Site, jobs: Sequence[int], pause_s: float) -> None:
        self.site = site
        self.slurm = site.slurm
        self.jobs = jobs
        self.pause_s = pause_s

    def run(self) -> None:
        """End the jobs, and see to the next ones."""
        self.end()
        self.replace()

    def end(self) -> None:
        """Begin their end."""

    def replace(self) -> None:
        if self.pause_s:
            self.wait_for_end()
            time.sleep(self.pause_s)
        for job in self.jobs:
            wait = (f"--dependency=afterany:{job}",) if self.chained else ()
            self.site.submit(*wait)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Wait until nothing of the jobs runs any more, but what was requeued."""
        poll(lambda: not any(map(self._runs, self.jobs)), self.timeout_s, 0.1)

    def _runs(self, job: int) -> bool:
        facts = self.slurm.job(job)
        ends = facts["JobState"] in ("RUNNING", "COMPLETING")
        return ends and facts["Restarts"] == "0"


class Scancel(Ending):
    """Scancel."""

    def end(self) -> None:
        self.slurm.cancel(*self.jobs)


class Requeue(Ending):
    """The same jobs run again (scontrol requeue), as early as Slurm lets them."""

    def run(self) -> None:
        self.slurm.requeue(*self.jobs)
        self.wait_for_end()


class Drain(Ending):
    """The nodes are drained, and what runs there is requeued: it comes elsewhere."""

    def run(self) -> None:
        nodes = {self.slurm.job(job)["NodeList"] for job in self.jobs}
        # Of three nodes one has to take them all.
        nodes = set(sorted(nodes)[:2])
        self.slurm.drain(*nodes)
        self.slurm.requeue(*self.jobs)
        self.wait_for_end()


class Preempt(Ending):
    """A job of more importance wants the nodes; those there are requeued."""

    def run(self) -> None:
        for job in self.jobs:
            node = self.slurm.job(job)["NodeList"]
            options = ("--partition=high", "--exclusive", f"--nodelist={node}")
            self.slurm.submit("sleep 20", *options)
        self.wait_for_end()


class Walltime(Ending):
    """Time is up."""

    options = ("--time=1",)
    chained = True
    timeout_s = LIMIT_S + 30


class Signal(Ending):
    """``--signal=B:TERM@30`` some time before time is up."""

    options = ("--time=2", "--signal=B:TERM@30")
    chained = True
    timeout_s = LIMIT_S + 90


class Down(Ending):
    """The nodes are set down, so that their jobs are given up and requeued."""

    def run(self) -> None:
        # They come back by themselves when they are next heard of.
        self.slurm.down(*{self.slurm.job(job)["NodeList"] for job in self.jobs})
        self.wait_for_end()


ENDINGS: dict[str, type[Ending]] = {
    kind.__name__.lower(): kind
    for kind in (Scancel, Requeue, Drain, Preempt, Walltime, Signal, Down)
}


@dataclass
class Absence:
    """For how long there was nothing at most, in seconds."""

    #: No process of a worker on any node: that is up to Slurm.
    of_jobs_s: float = 0
    #: No worker that the scheduler knows: that is Dask's own start, too.
    of_workers_s: float = 0

    def __str__(self) -> str:
        jobs, workers = self.of_jobs_s, self.of_workers_s
        return f"no job for {jobs:.1f} s, no worker for {workers:.1f} s"


@contextmanager
def watched(site: Site) -> Iterator[Absence]:
    """Watch a site while the block runs."""
    absence = Absence()
    ended = threading.Event()

    def watch() -> None:
        job = worker = time.monotonic()
        while not ended.wait(0.1):
            now = time.monotonic()
            absence.of_jobs_s = max(absence.of_jobs_s, now - job)
            absence.of_workers_s = max(absence.of_workers_s, now - worker)
            job = now if _runs_workers(site.slurm) else job
            worker = now if scheduler_workers(site.client) else worker

    with ThreadPoolExecutor(1, "watch") as pool:
        watching = pool.submit(watch)
        try:
            yield absence
        finally:
            ended.set()
        watching.result()


def _runs_workers(slurm: Slurm) -> bool:
    for host in slurm.nodes.values():
        for pid in host.processes():
            with suppress(OSError):  # it has ended
                if b"dask\0worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
    return False


def run(
    ending: type[Ending],
    *,
    count: int = 1,
    of: int = JOBS,
    pause_s: float = 0,
    requests: int = 600,
    track: Track = "pgid",
    log: Callable[[str], object] = lambda text: None,
    **options: object,
) -> tuple[Load, Absence]:
    """Run one ending; return what became of requests, and what was missing how long.

    Parameters
    ----------
    ending
        Which.
    count
        How many of the jobs end.
    of
        How many there are.
    pause_s
        See `Ending`.
    requests
        How many there are at least.
    track
        See `open_slurm`.
    log
        Takes what all processes have printed.
    **options
        Of the `Site`.
    """
    with open_slurm(track=track) as slurm, open_site(slurm, **options) as site:
        try:
            jobs = [site.submit(*ending.options) for _ in range(count)]
            stays = [site.submit() for _ in range(of - count)]
            slurm.wait("RUNNING", *jobs, *stays)
            site.wait_for_workers(of)
            site.deploy(of)
            with loaded(site.load(requests)) as load, watched(site) as absence:
                time.sleep(CALM_S)
                ending(site, jobs, pause_s).run()
                site.wait_for_workers(of)
                site.wait_for_replicas(of)
                time.sleep(CALM_S)
            return load, absence
        finally:
            log(site.logs())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.endings")
    parser.add_argument("name", nargs="?", choices=["all", *ENDINGS])
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--requests", type=int, default=600, help="at least, 20/s")
    parser.add_argument("--jobs", type=int, default=1, help=f"of {JOBS} that end")
    parser.add_argument("--pause", type=float, default=0, help="s, until others come")
    parser.add_argument("--location", default="HeadOnly", help="or EveryNode")
    parser.add_argument("--launch", default="exec", choices=LAUNCHES)
    parser.add_argument("--no-nanny", dest="nanny", action="store_false")
    parser.add_argument("--end-known", action="store_true", help="jobs know their end")
    parser.add_argument("--track", default="pgid", choices=get_args(Track))
    parser.add_argument("--logs", type=Path, help="a file for the logs")
    parser.add_argument("--lost", action="store_true", help="show each lost request")
    args = parser.parse_args()
    if args.list or args.name is None:
        for name, kind in ENDINGS.items():
            print(f"{name:10} {inspect.getdoc(kind)}")
        return 0
    lost = 0
    for name in ENDINGS if args.name == "all" else [args.name]:
        parts = [f"{name}, {args.jobs} of {JOBS}", args.location, args.launch]
        parts += ["nanny" if args.nanny else "no nanny"]
        parts += [args.track]
        parts += [f"pause {args.pause:g} s"] * bool(args.pause)
        parts += ["end known"] * args.end_known
        with redirect_stdout(sys.stderr):
            load, absence = run(
                ENDINGS[name],
                count=args.jobs,
                pause_s=args.pause,
                requests=args.requests,
                track=args.track,
                log=args.logs.write_text if args.logs else lambda text: None,
                location=args.location,
                launch=args.launch,
                nanny=args.nanny,
                end_known=args.end_known,
            )
        print(f"{', '.join(parts)}: {load}\n  {absence}", flush=True)
        if args.lost:
            print(*load.lost, sep="\n")
        lost += len(load.lost)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
