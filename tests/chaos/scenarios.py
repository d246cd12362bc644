"""What is done to clusters under load, a function for each command. The harness."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from distributed import LocalCluster

import daskserve as serve
from tests.chaos import faults, invariants
from tests.chaos.app import ConfiguredEcho, read_diaries
from tests.chaos.cluster import Fleet, open_fleet
from tests.chaos.contract import judge_all
from tests.chaos.invariants import Memory
from tests.chaos.load import Load
from tests.chaos.report import Report
from tests.chaos.storm import Storm
from tests.hosts import Host, HostCluster, open_hosts
from tests.utils import ProcessCluster, free_port, poll

#: Workers hold more replicas than one while others come and go.
THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    seed: int = 0
    seconds: float | None = None
    locations: tuple[str, ...] = ("HeadOnly", "EveryNode")
    logs: Path | None = None
    faults: tuple[str, ...] = ()
    pause: float = 5

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
    with (
        open_logs(options),
        ProcessCluster(n_workers, nthreads=THREADS, **kwargs) as cluster,
    ):
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
            try:
                yield clients
            except AssertionError as err:  # what was waited for has not come
                report.breaches.append(str(err))
    judged = judge_all(clients.fates(), read_diaries(fleet.diaries), fleet.history)
    report.count(judged, may_fail=may_fail)


@contextmanager
def fleet_on_hosts(
    options: Options, n_workers: int
) -> Iterator[tuple[Fleet, HostCluster, list[Host]]]:
    """Give a fleet whose workers are on hosts of their own; its server is on another.

    Silence is noticed sooner than by default, so that cables need not be out for long.
    """
    env = {
        "DASK_DASKSERVE__TRANSPORT__SILENCE_TIMEOUT": "1.5s",
        "DASK_DASKSERVE__TRANSPORT__CONNECT_TIMEOUT": "1s",
    }
    with (
        open_hosts(n_workers + 1) as (head, *hosts),
        open_logs(options),
        HostCluster(head, hosts, nthreads=THREADS, nanny=True, env=env) as cluster,
        cluster.client() as client,
        open_fleet(client, cluster.directory, "HeadOnly", host="0.0.0.0") as fleet,
    ):
        yield fleet, cluster, hosts


@contextmanager
def fleet_of(
    options: Options,
    n_workers: int,
    location: str,
    num_replicas: int = 2,
    **kwargs: Any,
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


def spread(times: list[float]) -> str:
    if not times:
        return "never"
    median, most = statistics.median(times), max(times)
    return f"median {median:.2f} s, max {most:.2f} s of {len(times)}"


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
            report.note(f"deploy(): {spread(times)}")
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
        is_soon = statistics.median(times or [0]) <= 5
        report.check(is_soon, f"back to full strength: {spread(times)}")
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
                fleet.wait_for_strength(60)
                poll(fleet.proxies, 20)
                sleep_until(killed + 8)
                times.append(served_again(load, killed) - killed)
        report.check(fleet.url == url, f"the URL is {fleet.url}, was {url}")
        report.check(
            max(times, default=0) <= 3, f"no failure any more: {spread(times)}"
        )
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
                    strong = back + fleet.wait_for_strength(60)
                    fleet.history.outages.append((began, max(strong, back + 5)))
                    fleet.history.proxy_kills.append(began)
                    sleep_until(began + 12)
                    times.append(served_again(load, began) - back)
            # Below 0: some are back before `restart()` has seen all of them.
            text = f"no failure any more, after the workers' return: {spread(times)}"
            report.check(max(times, default=0) <= 5, text)
        yield report


Step = Callable[[Fleet, int], None]


def without_loss(
    fleet: Fleet, report: Report, options: Options, seconds: float, step: Step
) -> None:
    """Do something again and again, every 3 s at most; no request may fail."""
    times = []
    with loaded(fleet, report, options, may_fail=False) as load:
        end = time.monotonic() + options.lasts(seconds)
        for number in itertools.count():
            began = time.monotonic()
            if began > end:
                break
            step(fleet, number)
            times.append(time.monotonic() - began)
            sleep_until(began + 3)
        if options.seconds is None:
            load.wait(10_000, 60)
        strong = fleet.wait_for_strength(20)
        report.note(f"in full strength {strong:.2f} s after the last")
    report.note(f"took {spread(times)}")


@scenario
def retire(options: Options) -> Iterator[Report]:
    """`Client.retire_workers()`, one by one, as new ones come: none may fail."""
    for location in options.locations:
        report = Report(f"retire, {location}")
        with fleet_of(options, 3, location) as (fleet, cluster):

            def step(fleet: Fleet, number: int) -> None:
                faults.add_worker(fleet, cluster, nanny=True)
                replica = fleet.replicas()[0].worker
                faults.retire(fleet, [replica, *fleet.proxies()][number % 2])

            without_loss(fleet, report, options, 36, step)
        yield report


@scenario
def sigterm(options: Options) -> Iterator[Report]:
    """SIGTERM for workers, with and without nanny, one by one: none may fail."""
    for location in options.locations:
        report = Report(f"sigterm, {location}")
        with fleet_of(options, 3, location, nanny=[True, False, True]) as (fleet, c):

            def step(fleet: Fleet, number: int) -> None:
                faults.add_worker(fleet, c, nanny=bool(number % 2))
                faults.terminate(c)

            without_loss(fleet, report, options, 36, step)
        yield report


@scenario
def lifetime(options: Options) -> Iterator[Report]:
    """`--lifetime 20s` on every worker, one more every 5 s: none may fail."""
    for location in options.locations:
        report = Report(f"lifetime, {location}")
        args = ("--lifetime", "20s")
        with fleet_of(options, 1, location, worker_args=args) as (fleet, cluster):

            def step(fleet: Fleet, number: int) -> None:
                began = time.monotonic()
                cluster.add_worker(nanny=True)
                sleep_until(began + 5)

            without_loss(fleet, report, options, 60, step)
        yield report


@contextmanager
def local_fleet(location: str) -> Iterator[tuple[Fleet, LocalCluster]]:
    """Give a fleet on a `LocalCluster`, whose scheduler is in this process."""
    with (
        tempfile.TemporaryDirectory(prefix="daskserve-chaos-") as name,
        LocalCluster(
            n_workers=4, threads_per_worker=THREADS, dashboard_address=":0"
        ) as cluster,
        cluster.get_client() as client,
    ):
        client.wait_for_workers(4)
        with open_fleet(client, Path(name), location) as fleet:
            yield fleet, cluster


@scenario
def scale_down(options: Options) -> Iterator[Report]:
    """`cluster.scale()` from 4 workers to 2 and back: none may fail."""
    for location in options.locations:
        report = Report(f"scale-down, {location}")
        with local_fleet(location) as (fleet, cluster):

            def step(fleet: Fleet, number: int) -> None:
                count = 4 if number % 2 else 2
                cluster.scale(count)
                poll(lambda: len(fleet.workers()) == count, faults.LEAVE_S)

            without_loss(fleet, report, options, 36, step)
        yield report


@scenario
def adapt(options: Options) -> Iterator[Report]:
    """`cluster.adapt()`, to 4 workers for tasks and back to 2: none may fail."""
    for location in options.locations:
        report = Report(f"adapt, {location}")
        with local_fleet(location) as (fleet, cluster):
            cluster.adapt(minimum=2, maximum=4, interval="300ms", wait_count=2)

            def step(fleet: Fleet, number: int) -> None:
                poll(lambda: len(fleet.workers()) == 2, faults.LEAVE_S)
                # Dask wants to be through with them in 5 s, on 2 threads a worker.
                tasks = fleet.client.map(time.sleep, [0.2] * 300, pure=False)
                poll(lambda: len(fleet.workers()) == 4, 40)
                fleet.client.gather(tasks)

            without_loss(fleet, report, options, 36, step)
        yield report


@scenario
def storm(options: Options) -> Iterator[Report]:
    """10 minutes of faults by chance, by `--seed`; at the end nothing may be left."""
    location = random.Random(options.seed).choice(options.locations)
    report = Report(f"storm, {location}, seed {options.seed}")
    with fleet_of(options, 4, location) as (fleet, cluster):
        rage(Storm(fleet, cluster, options.seed, options.faults), report, options)
    yield report


@scenario
def storm_on_hosts(options: Options) -> Iterator[Report]:
    """As `storm`, with workers on hosts whose cables are pulled, too; for root only."""
    report = Report(f"storm on hosts, HeadOnly, seed {options.seed}")
    with fleet_on_hosts(options, 4) as (fleet, cluster, hosts):
        storm = Storm(fleet, cluster, options.seed, options.faults, hosts)
        rage(storm, report, options)
    yield report


def rage(storm: Storm, report: Report, options: Options) -> None:
    """Let a storm rage for 10 minutes, under load; then look for what it has left."""
    fleet, cluster, memory = storm.fleet, storm.cluster, Memory()
    with loaded(fleet, report, options, may_fail=True, vanishing=0.02):
        began = time.monotonic()
        while time.monotonic() < began + options.lasts(600):
            # Not after a step: to one just killed Dask would connect for long.
            memory.look(fleet)
            step = time.monotonic()
            what = storm.step()
            print(f"{step - began:7.2f} s: {what}", file=sys.stderr)
            sleep_until(step + options.pause)
    report.note(", ".join(f"{kind} {n}" for kind, n in storm.done.items()))
    invariants.check(fleet, cluster, report)
    memory.look(fleet)
    memory.check(report)


@scenario
def idle(options: Options) -> Iterator[Report]:
    """`--idle-timeout 2s` and a deployment, which nobody asks: alive after 30 s."""
    report = Report("idle")
    args = ("--idle-timeout", "2s")
    with fleet_of(options, 2, "HeadOnly", scheduler_args=args) as (fleet, cluster):
        seconds = options.lasts(30)
        time.sleep(seconds)
        alive = cluster.scheduler.poll() is None
        report.check(alive, f"the scheduler is alive after {seconds:g} s: {alive}")
        if alive:
            with loaded(fleet, report, options, may_fail=False):
                pass
    yield report


@scenario
def scheduler(options: Options) -> Iterator[Report]:
    """kill -9 of a scheduler with a state file: the next one brings all 20 back."""
    report = Report("scheduler")
    with tempfile.TemporaryDirectory(prefix="daskserve-chaos-") as name:
        diaries = Path(name) / "diaries"
        diaries.mkdir()
        args = ("--preload", "daskserve", "--state", f"{name}/state")
        with processes(options, 2, scheduler_args=args) as cluster:
            with cluster.client() as client:
                http = {"port": free_port(), "location": "HeadOnly"}
                serve.start(client, detached=True, http_options=http)
                for deployment in many_deployments(diaries):
                    deployment.deploy()
                before = serve.list_deployments()
                urls = [deployment.url for deployment in before.values()]
                report.check(answering(urls) == 20, f"{answering(urls)} answer before")
            cluster.kill_scheduler()
            killed = time.monotonic()
            cluster.start_scheduler()
            for _ in range(2):
                cluster.add_worker(nanny=True)
            with contextlib.suppress(AssertionError):
                poll(lambda: answering(urls) == 20, 60, 0.2)
            seconds = time.monotonic() - killed
            text = f"{answering(urls)} answer {seconds:.1f} s after the scheduler's end"
            report.check(answering(urls) == 20, text)
            with cluster.client() as client:
                serve.connect(client)
                after = serve.list_deployments()
                same = sum(after.get(name) == d for name, d in before.items())
                report.check(same == 20, f"{same} have their options")
    yield report


def many_deployments(diaries: Path) -> Iterator[serve.Deployment]:
    """Make 20 deployments, no two of which have the same options."""
    for number in range(20):
        yield serve.deployment(
            name=f"Echo{number}",
            route_prefix=f"/echo/{number}",
            num_replicas=1 + number % 2,
            version=str(number),
            user_config={"number": number},
            max_ongoing_requests=10 + number,
            request_timeout_s=20 + number,
            init_args=(str(diaries), number),
        )(ConfiguredEcho)


def answering(urls: list[str]) -> int:
    """Count the deployments that answer, each for itself and with its config."""
    count = 0
    for url in urls:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(url, params={"sleep": 0}, timeout=5).json()
            number = int(url.rpartition("/")[2])
            count += (answer["version"], answer["config"]) == (
                number,
                {"number": number},
            )
    return count


def served_again(load: Load, since: float) -> float:
    """Return when the first request was answered after the last failure since then."""
    fates = [fate for fate in load.fates() if fate.began > since]
    failed = max((f.began for f in fates if f.outcome != "200"), default=since)
    answered = (f.ended for f in fates if f.began > failed and f.outcome == "200")
    return min(answered, default=time.monotonic())
