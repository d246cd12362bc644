"""Rows of calls that take time, from wherever one calls; in the command's process.

The figures of a closed loop say what part of the ideal was reached, and have nothing
beside them. An open loop is beside a simulated single queue that gets the same calls.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tests.benchmarks import models, scores
from tests.benchmarks.callers import Caller, MakeCalls, by_http, by_httpx, places
from tests.benchmarks.calls import Done, Load, Mix
from tests.benchmarks.queueing import single_queue
from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import check_placement
from tests.test_http import Site

#: Calls that overlap by more than this share of one have waited for one another.
SLACK = 0.1
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Parameters
    ----------
    model
        A class of `models`.
    mix
        Of calls, as of a `Load`; empty if their time is to be measured.
    at_once
        How many calls a replica works on at a time.
    slow
        Whether the first replica is `models.SLOWER` times slower.
    computes
        Whether there is no more to be had than the machine has cores.
    """

    model: type
    mix: Mix = ()
    at_once: int = 1
    slow: bool = False
    computes: bool = False

    @property
    def mean_s(self) -> float:
        """What a call takes in the mean."""
        weights = sum(weight for weight, _ in self.mix)
        return sum(weight * ms for weight, ms in self.mix) / weights / 1000

    def speeds(self, replicas: int) -> list[float]:
        """Return the speed of all that can work at the same time."""
        first = 1 / models.SLOWER if self.slow else 1.0
        return [first, *[1.0] * (replicas - 1)] * self.at_once

    def capacity(self, replicas: int) -> float:
        """Return the calls a second that replicas can do."""
        most = min(replicas, CORES) if self.computes else replicas
        return sum(self.speeds(most)) / self.mean_s


@dataclass(frozen=True)
class Shape:
    """How calls come; one of these.

    Parameters
    ----------
    clients
        So many clients, each of which waits for its answer.
    percent
        In an open loop, at this part of what the replicas can do.
    burst
        So many at once, of a deployment that nobody has called before.
    """

    clients: int = 0
    percent: int = 0
    burst: int = 0


@dataclass(frozen=True)
class Trial:
    """A row: what is called, by whom and how."""

    kind: Kind
    replicas: int
    caller: Caller
    shape: Shape

    @contextmanager
    def sides(self, site: Site, seconds: float) -> Iterator[Sides]:
        if self.shape.burst:
            yield Sides(lambda: self._first_calls(site))
            return
        with self._running(site) as (kind, make):
            # Each round has calls of its own: both of a pair get the same.
            rounds = iter(self._loads(kind, seconds))
            if self.shape.clients:
                yield Sides(lambda: self._closed(kind, make(next(rounds))))
                return
            pairs: list[Load] = []

            def theirs() -> Figures:
                pairs.append(next(rounds))
                return _simulated(pairs[-1], kind.speeds(self.replicas))

            yield Sides(lambda: _quantiles(make(pairs[-1]), kind.mix), theirs)

    def _loads(self, kind: Kind, seconds: float) -> Iterator[Load]:
        rate = self.shape.percent / 100 * kind.capacity(self.replicas)
        load = Load(
            mix=kind.mix,
            seconds=seconds,
            seed=0,
            clients=self.shape.clients,
            rate=rate,
            burst=self.shape.burst,
        )
        while True:
            yield load
            load = replace(load, seed=load.seed + 1)

    @contextmanager
    def _running(self, site: Site) -> Iterator[tuple[Kind, MakeCalls]]:
        """Deploy, a replica a worker; give the work and what makes calls."""
        kind, n = self.kind, self.replicas
        try:
            with tempfile.TemporaryDirectory(prefix="daskserve-bench-") as directory:
                args = [f"{directory}/slow"] if kind.slow else []
                deployment = site.deploy(kind.model, *args, num_replicas=n)
                check_placement(site, deployment.name, n)
                with self.caller(site, deployment) as make:
                    yield _measured(kind, site), make
        finally:
            site.clean()

    def _first_calls(self, site: Site) -> Figures:
        with self._running(site) as (kind, make):
            return self._closed(kind, make(next(self._loads(kind, 0))))

    def _closed(self, kind: Kind, done: Sequence[Done]) -> Figures:
        n, clients = self.replicas, self.shape.clients
        scores.check(done)
        rate = scores.throughput(done)
        ideal = kind.capacity(n)
        if clients:
            ideal = min(ideal, clients / kind.mean_s)
        figures = {
            "req/s": rate,
            "of ideal": rate / ideal,
            "share off by": scores.share_off_by(done, n, _fair_weight),
            **_quantiles(done, kind.mix),
        }
        if clients == n:
            slack_s = SLACK * kind.mean_s
            figures["doubled"] = scores.doubled(done, n, slack_s)
        return figures


def _measured(kind: Kind, site: Site) -> Kind:
    if kind.mix:
        return kind
    # In a worker, which has no more threads for it than the replicas have.
    ms = site.client.submit(models.perceptron_ms, pure=False).result(timeout=30)
    return replace(kind, mix=((1, ms),))


def _fair_weight(who: str) -> float:
    return 1 / models.SLOWER if who.startswith(models.SLOW) else 1.0


def _quantiles(done: Sequence[Done], mix: Mix) -> Figures:
    scores.check(done)
    return scores.latencies(done, [d.seconds for d in done], mix)


def _simulated(load: Load, speeds: Sequence[float]) -> Figures:
    calls = load.calls()
    services = [call.ms / 1000 for call in calls]
    responses = single_queue([call.at for call in calls], services, speeds)
    return scores.latencies(calls, responses, load.mix)


KINDS = {
    "sync-20ms": Kind(models.Sleep, ((1, 20),)),
    "sync-2ms": Kind(models.Sleep, ((1, 2),)),
    "async-100ms": Kind(models.AsyncSleep, ((1, 100),), at_once=100),
    "numpy": Kind(models.Perceptron, computes=True),
    "mixed": Kind(models.Sleep, ((1, 200), (19, 10))),
    "slow-replica": Kind(models.Sleep, ((1, 20),), slow=True),
}
#: By the number of replicas, what is measured from wherever one calls.
EVERYWHERE = {
    1: [],
    2: [("sync-20ms", "c=10"), ("sync-20ms", "c=n")],
    3: [
        ("sync-20ms", "c=10"),
        ("sync-20ms", "c=n"),
        ("sync-20ms", "burst=60"),
        ("async-100ms", "c=50"),
        ("mixed", "open=70"),
        ("slow-replica", "c=12"),
        ("slow-replica", "open=70"),
    ],
}
#: What is measured from one place besides.
_SMALL = [("sync-20ms", "c=10"), ("sync-2ms", "c=10"), ("numpy", "c=10")]
_OPEN = [
    (kind, f"open={percent}")
    for kind in ("sync-20ms", "mixed", "slow-replica")
    for percent in (50, 70, 90)
]
BY_HEAD = {1: [*_SMALL, ("sync-20ms", "c=n")], 2: _SMALL, 3: [*_SMALL, *_OPEN]}


def _shape(text: str, replicas: int) -> Shape:
    field, _, number = text.partition("=")
    value = replicas if number == "n" else int(number)
    names = {"c": "clients", "open": "percent", "burst": "burst"}
    return Shape(**{names[field]: value})


def _benches() -> Iterator[Bench]:
    for n in EVERYWHERE:
        for place, callers in places(n):
            for where, caller in callers.items():
                more = BY_HEAD[n] if where == "head" else []
                for kind, shape in dict.fromkeys([*EVERYWHERE[n], *more]):
                    name = f"work/{kind}/{n}/{where}/{shape}"
                    users = by_httpx if caller is by_http else caller
                    calls = users if shape == "c=n" else caller
                    trial = Trial(KINDS[kind], n, calls, _shape(shape, n))
                    against = "one queue" if "open" in shape else ""
                    yield Bench(name, against, place, trial.sides)


BENCHES = list(_benches())
