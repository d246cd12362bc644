"""What is done to clusters under load, a function for each command. The harness."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import faults
from tests.chaos.app import read_diaries
from tests.chaos.cluster import Fleet, open_fleet
from tests.chaos.contract import judge_all
from tests.chaos.load import Load
from tests.chaos.report import Report
from tests.utils import ProcessCluster, poll

#: Workers hold more replicas than one while others come and go.
THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    seed: int = 0
    seconds: float | None = None
    locations: tuple[str, ...] = ("HeadOnly", "EveryNode")
    logs: Path | None = None

    def lasts(self, seconds: float) -> float:
        """Return how long the load lasts, if it is `seconds` by default."""
        return seconds if self.seconds is None else self.seconds


Scenario = Callable[[Options], Iterator[Report]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


@contextmanager
def processes(
    options: Options, n_workers: int, **kwargs: Any
) -> Iterator[ProcessCluster]:
    """Start a cluster; keep what it has logged, if that is asked for."""
    with open_logs(options), ProcessCluster(
        n_workers, nthreads=THREADS, **kwargs
    ) as cluster:
        yield cluster


@contextmanager
def open_logs(options: Options) -> Iterator[None]:
    """Put what clusters print at their end, their logs, into a file or nowhere."""
    path = options.logs or Path("/dev/null")
    with path.open("a") as file, contextlib.redirect_stdout(file):
        yield


@contextmanager
def loaded(
    fleet: Fleet, report: Report, options: Options, *, may_fail: bool, **load: Any
) -> Iterator[Load]:
    """Load a fleet while something is done to it; then count and judge."""
    with tempfile.TemporaryDirectory(prefix="daskserve-chaos-") as name:
        file = Path(name) / "fates"
        with Load(fleet.url, file, seed=options.seed, **load) as clients:
            clients.wait(100, 20)
            yield clients
    judged = judge_all(clients.fates(), read_diaries(fleet.diaries), fleet.history)
    report.count(judged, may_fail=may_fail)


@contextmanager
def fleet_of(
    options: Options, n_workers: int, location: str, num_replicas: int = 2, **kwargs: Any
) -> Iterator[tuple[Fleet, ProcessCluster]]:
    """Give a fleet on a cluster of processes."""
    with processes(options, n_workers, **kwargs) as cluster, cluster.client() as client:
        place = cluster.directory
        with open_fleet(client, place, location, num_replicas=num_replicas) as fleet:
            yield fleet, cluster


@contextmanager
def fleet_beside_proxy(
    options: Options, n_workers: int, num_replicas: int = 2
) -> Iterator[tuple[Fleet, ProcessCluster]]:
    """Give a fleet whose replicas are on workers of their own, without the proxy.

    It is on the first worker, which no fault is meant for.
    """
    with processes(options, 1) as cluster, cluster.client() as client:
        workers = [f"w{number}" for number in range(1, n_workers + 1)]

        def add_workers() -> None:
            for _ in workers:
                cluster.add_worker(nanny=True)
            cluster.wait_for_workers(n_workers + 1)

        with open_fleet(
            client, cluster.directory, "HeadOnly", workers, add_workers, num_replicas
        ) as fleet:
            yield fleet, cluster


def sleep_until(moment: float) -> None:
    time.sleep(max(0, moment - time.monotonic()))


@scenario
def redeploys(options: Options) -> Iterator[Report]:
    """20 rolling redeploys in a row, of 1 and of 4 replicas: none may fail."""
    for location, num_replicas in itertools.product(options.locations, (1, 4)):
        report = Report(f"redeploys, {location}, {num_replicas} replicas")
        seconds = options.lasts(55)
        with fleet_of(options, 3, location, num_replicas) as (fleet, _):
            times = []
            with loaded(fleet, report, options, may_fail=False) as load:
                began = time.monotonic()
                for number in range(20):
                    sleep_until(began + number * seconds / 20)
                    start = time.monotonic()
                    fleet.deploy(num_replicas)
                    times.append(time.monotonic() - start)
                if options.seconds is None:
                    load.wait(20_000, 60)
            report.note(f"deploy(): median {statistics.median(times):.2f} s")
        yield report


@scenario
def kill(options: Options) -> Iterator[Report]:
    """kill -9 of a replica's worker every 5 s for 2 minutes; 2 replicas, 3 workers."""
    report = Report("kill")
    chance = random.Random(options.seed)
    with fleet_beside_proxy(options, 3) as (fleet, _):
        times = []
        with loaded(fleet, report, options, may_fail=True):
            began = time.monotonic()
            for number in range(int(options.lasts(120) / 5)):
                sleep_until(began + 5 * number)
                victim = chance.choice(fleet.replicas()).pid
                assert victim is not None
                faults.kill(fleet, victim, holds_proxy=False)
                times.append(fleet.wait_for_strength(60))
        median = statistics.median(times)
        text = f"back to full strength: median {median:.2f} s, max {max(times):.2f} s"
        report.check(median <= 5, f"{text}, of {len(times)} kills")
    yield report


@scenario
def kill_proxy(options: Options) -> Iterator[Report]:
    """kill -9 of HeadOnly's proxy: another answers on the same port within 3 s."""
    report = Report("kill-proxy")
    times = []
    with fleet_of(options, 3, "HeadOnly") as (fleet, _):
        url = fleet.url
        with loaded(fleet, report, options, may_fail=True) as load:
            for _ in range(int(options.lasts(40) / 8)):
                (pid,) = fleet.proxies().values()
                killed = time.monotonic()
                faults.kill(fleet, pid, holds_proxy=True)
                fleet.history.outages.append((killed, killed + 3))
                times.append(time_to_answer(load, killed))
                fleet.wait_for_strength(60)
                poll(fleet.proxies, 20)
                sleep_until(killed + 8)
        report.check(fleet.url == url, f"the URL is {fleet.url}, was {url}")
        text = f"answers again: median {statistics.median(times):.2f} s"
        report.check(max(times) <= 3, f"{text}, max {max(times):.2f} s")
    yield report


@scenario
def restart(options: Options) -> Iterator[Report]:
    """`client.restart()`: serves again within 5 s of the workers' return."""
    for location in options.locations:
        report = Report(f"restart, {location}")
        times = []
        with fleet_of(options, 3, location) as (fleet, _):
            with loaded(fleet, report, options, may_fail=True) as load:
                for _ in range(int(options.lasts(36) / 12)):
                    began = time.monotonic()
                    faults.restart(fleet)
                    back = time.monotonic()
                    answered = began + time_to_answer(load, began)
                    strong = back + fleet.wait_for_strength(60)
                    times.append(max(0, answered - back))
                    fleet.history.outages.append((began, max(strong, back + 5)))
                    fleet.history.proxy_kills.append(began)
                    sleep_until(began + 12)
            text = f"answers after the workers' return: max {max(times):.2f} s"
            report.check(max(times) <= 5, text)
        yield report


def time_to_answer(load: Load, since: float) -> float:
    """Return how long it was until a request that began later was answered."""

    def answered() -> float | None:
        later = (f.ended for f in reversed(load.fates()) if f.began > since
                 and f.outcome == "200")  # fmt: skip
        return min(later, default=None)

    return poll(answered, 60, 0.1) - since
