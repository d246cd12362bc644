"""In the benchmarks' process: rows of work beside other systems, as many replicas each.

A closed loop of some clients, and open loops at parts of the load that saturates the
better of the two, which is measured before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from tests.benchmarks import scores
from tests.benchmarks.callers import ENV
from tests.benchmarks.calls import Done, Load
from tests.benchmarks.generator import Target, generate
from tests.benchmarks.peer_apps.working import spin, work
from tests.benchmarks.peers import Peer, answers, installed, serve
from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import check_placement, start_site

REPLICAS, CLIENTS = 2, 10
PERCENTS = (50, 90)
SLEEP_MS, PYTHON_MS = 20, 5
WORKS = (f"sleep-{SLEEP_MS}ms", f"python-{PYTHON_MS}ms")
#: The time is in the work, not in the request.
MIX = ((1, 0),)


@dataclass
class Beside:
    """Two systems that serve the same work."""

    theirs: Target
    ours: Target
    #: Requests a second that saturate the better one; 0 until it is known.
    saturating: float = field(default=0.0)


class Work:
    """What daskserve serves."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __call__(self) -> dict[str, object]:
        return work(self._text)


def benches(venv: Path) -> Iterator[Bench]:
    """Return the rows of all systems that are installed and have replicas."""
    for system, peer in installed(venv):
        if peer is None or "fastapi" in peer.flags:
            continue
        for name in WORKS:
            place = partial(_beside, peer, venv, name)
            yield Bench(f"peers/{system}/{name}/c={CLIENTS}", system, place, _closed)
            for percent in PERCENTS:
                row = f"peers/{system}/{name}/open={percent}"
                yield Bench(row, system, place, _open(percent))


@contextmanager
def _beside(peer: Peer, venv: Path, name: str) -> Iterator[Beside]:
    sleeps = name.startswith("sleep")
    text = f"sleep:{SLEEP_MS}" if sleeps else f"python:{_rounds(PYTHON_MS)}"
    with serve(peer, venv, text, REPLICAS) as theirs:
        with start_site(REPLICAS, env=ENV) as site:
            deployment = site.deploy(Work, text, num_replicas=REPLICAS)
            check_placement(site, deployment.name, REPLICAS)
            ours = site.at(deployment)
            assert answers(ours, peer.body)
            yield Beside(_target(theirs, peer), _target(ours, peer))


def _target(url: str, peer: Peer) -> Target:
    return Target("pool", [url], peer.body)


def _rounds(ms: float) -> int:
    """Return the rounds of `spin` that take so long on a core of this machine."""
    rounds, times = 20_000, []
    for _ in range(50):
        began = time.perf_counter()
        spin(rounds)
        times.append(time.perf_counter() - began)
    return round(rounds * ms / 1000 / min(times))


@contextmanager
def _closed(beside: Beside, seconds: float) -> Iterator[Sides]:
    yield Sides(
        lambda: _clients(beside.ours, seconds),
        lambda: _clients(beside.theirs, seconds),
    )


def _clients(target: Target, seconds: float) -> Figures:
    done = generate(target, Load(mix=MIX, seconds=seconds, seed=0, clients=CLIENTS))
    return {"req/s": scores.throughput(done), **_latencies(done)}


def _latencies(done: Sequence[Done]) -> Figures:
    scores.check(done)
    return scores.latencies(done, [d.seconds for d in done], MIX)


def _open(percent: int) -> Callable[[Beside, float], AbstractContextManager[Sides]]:
    @contextmanager
    def sides(beside: Beside, seconds: float) -> Iterator[Sides]:
        if not beside.saturating:
            both = (beside.theirs, beside.ours)
            beside.saturating = max(_clients(t, seconds)["req/s"] for t in both)
        rate = beside.saturating * percent / 100
        # Each round has calls of its own, the same for both.
        our_seeds, their_seeds = count(), count()

        def measure(target: Target, seed: int) -> Figures:
            load = Load(mix=MIX, seconds=seconds, seed=seed, rate=rate)
            return _latencies(generate(target, load))

        yield Sides(
            lambda: measure(beside.ours, next(our_seeds)),
            lambda: measure(beside.theirs, next(their_seeds)),
        )

    return sides
