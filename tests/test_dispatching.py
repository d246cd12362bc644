"""How work is shared, in simulated time: exact, and quicker than the work itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.benchmarks.queueing import quantile, single_queue
from tests.simulation import Caller, Loop, Replica, poisson


def as_sent(seconds: float) -> float:
    return seconds


def make(
    seconds: list[float], threads: int = 1, callers: int = 1
) -> tuple[Loop, list[Replica], list[Caller]]:
    """Make replicas that take so long for each call; 0: as long as it says."""
    loop = Loop()
    replicas = [
        Replica(loop, i + 1, (lambda _, s=s: s) if s else as_sent, threads)  # type: ignore[misc]
        for i, s in enumerate(seconds)
    ]
    limit = threads or None
    made = [
        Caller(loop, f"c{i}", replicas, random.Random(i), first_limit=limit)
        for i in range(callers)
    ]
    return loop, replicas, made


def ideally(arrivals: list[tuple[float, float]], servers: int) -> list[float]:
    """Return the seconds that requests take that wait in one queue for all servers."""
    at, seconds = zip(*arrivals, strict=True)
    return single_queue(at, seconds, [1.0] * servers)


def keep_busy(caller: Caller, clients: int, what: float = 0.0) -> None:
    """Let so many clients ask again as soon as they are answered."""

    def ask() -> None:
        caller.request(what, ask)

    for _ in range(clients):
        ask()


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("callers", [1, 3])
def test_sync_calls_use_all_replicas(number: int, callers: int) -> None:
    loop, replicas, made = make([0.02] * number, callers=callers)
    for caller in made:
        keep_busy(caller, 12 // callers)
    loop.run(20)
    served = [r.served for r in replicas]
    assert sum(served) > 0.95 * number * 50 * 20, served
    assert max(served) - min(served) < 0.1 * sum(served) / number, served


def test_as_many_clients_as_replicas_have_one_each() -> None:
    loop, replicas, (caller,) = make([0.02] * 3)
    keep_busy(caller, 3)
    loop.run(10)
    assert sum(r.served for r in replicas) > 0.95 * 3 * 50 * 10


def test_a_first_burst_is_shared() -> None:
    loop, replicas, (caller,) = make([0.2] * 3)
    for _ in range(60):
        caller.request(0.0)
    loop.run(10)
    assert [r.served for r in replicas] == [20, 20, 20]


def test_a_slow_replica_does_what_it_can() -> None:
    speeds = [0.02, 0.02, 0.08]
    loop, replicas, (caller,) = make(speeds)
    keep_busy(caller, 12)
    loop.run(20)
    assert sum(r.served for r in replicas) > 0.9 * sum(20 / s for s in speeds)


def test_async_calls_are_spread_evenly() -> None:
    loop, replicas, (caller,) = make([0.1] * 3, threads=0)
    keep_busy(caller, 50)
    loop.run(10)
    served = [r.served for r in replicas]
    assert max(served) - min(served) < 0.1 * sum(served) / 3, served


@pytest.mark.parametrize("callers", [1, 3])
def test_short_calls_do_not_wait_behind_long_ones(callers: int) -> None:
    """One in 20 takes 200 ms, others 10; the best that can be is a single queue."""
    loop, replicas, made = make([0.0] * 3, callers=callers)
    rng = random.Random(3)
    mean = (0.2 + 19 * 0.01) / 20
    arrivals = [
        (at, 0.2 if rng.random() < 1 / 20 else 0.01)
        for at in poisson(0.7 * 3 / mean, 60, rng)
    ]
    for at, seconds in arrivals:
        loop.call_at(at, rng.choice(made).request, seconds)
    loop.run(70)
    ideal = ideally(arrivals, 3)
    short = [s for s, (_, long) in zip(ideal, arrivals, strict=True) if long < 0.1]
    took = [s for caller in made for what, s in caller.took if what < 0.1]
    assert len(took) == len(short)
    assert quantile(took, 0.99) < 1.3 * quantile(short, 0.99)


def test_no_caller_is_left_behind_when_all_is_full() -> None:
    loop, replicas, made = make([0.001], threads=0, callers=3)
    for caller in made:
        keep_busy(caller, 200)
    loop.run(0.5)
    served = [len(caller.took) for caller in made]
    assert min(served) > 0.9 * sum(served) / 3, served
    # The replica's 100 slots are in use but for what travels.
    assert sum(served) > 0.6 * 100 * 0.5 / 0.001


@pytest.mark.parametrize("service", ["exponential", "constant"])
def test_a_hundred_callers_and_a_thousand_replicas(service: str) -> None:
    """At 80% load, and with reports 0.2 s old."""
    loop, rng, mean = Loop(), random.Random(1), 0.1
    replicas = [Replica(loop, i + 1, as_sent) for i in range(1000)]
    callers = [
        Caller(loop, f"c{i}", replicas, random.Random(i), report_s=0.2)
        for i in range(100)
    ]
    draw: Callable[[], float] = lambda: mean  # noqa: E731
    if service == "exponential":
        draw = lambda: rng.expovariate(1 / mean)  # noqa: E731
    arrivals = [(at, draw()) for at in poisson(0.8 * 1000 / mean, 0.5, rng)]
    for at, seconds in arrivals:
        loop.call_at(at, rng.choice(callers).request, seconds)
    loop.run(10)
    took = [seconds for caller in callers for _, seconds in caller.took]
    assert len(took) == len(arrivals)
    ratio = quantile(took, 0.99) / quantile(ideally(arrivals, 1000), 0.99)
    print(f"p99 over the ideal's: {ratio:.2f}")
    assert ratio < 2
