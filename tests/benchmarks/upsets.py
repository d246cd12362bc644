"""Rows of replicas that come, go, or are of no use; in the command's process.

Work is 20 ms of sleep, or 1 ms beside a replica that is stuck; HeadOnly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import daskserve as serve
from tests.benchmarks import models, scores
from tests.benchmarks.callers import ENV
from tests.benchmarks.calls import Done, Load
from tests.benchmarks.generator import Target, generate, with_ms
from tests.benchmarks.rows import Bench, Figures, Sides
from tests.benchmarks.servers import start_site
from tests.benchmarks.wire import connected
from tests.test_http import Site
from tests.utils import poll

CLIENTS, MOST, WORK = 10, 3, ((1, 20),)
SCALING = {
    "min_replicas": 1,
    "max_replicas": MOST,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0.5,
    # Longer than it takes to start the process that measures.
    "downscale_delay_s": 6,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1,
}
SETTLE_S = 6
#: How long the call takes for which nobody waits, and how long somebody does.
STUCK_MS, PATIENCE_S = 20_000, 1.0
QUICK = Load(mix=((1, 1),), seconds=4.01, seed=0, rate=50, even=True)
#: A quick call that takes longer has waited for the one that is stuck.
SLOW_S = 1.0


@contextmanager
def _autoscaled(site: Site, seconds: float) -> Iterator[Sides]:
    """Load what has scaled from one replica to three, beside one that has one."""

    def ours() -> Figures:
        _load(url, SETTLE_S)
        poll(lambda: _running(scaled) == MOST, 20)
        done = _load(url, seconds)
        began = time.perf_counter()
        # On its way back to one it serves what little comes, without a failure.
        few = Load(mix=WORK, seconds=12, seed=0, rate=10, even=True)
        scores.check(generate(Target("pool", [url]), few))
        poll(lambda: _running(scaled) == 1, 30)
        return {
            "req/s": scores.throughput(done),
            "share off by": scores.share_off_by(done, MOST, lambda who: 1.0),
            "s back to 1": time.perf_counter() - began,
        }

    try:
        single = site.at(site.deploy(models.Sleep))
        scaled = site.deploy(models.Sleep, autoscaling_config=SCALING)
        url = site.at(scaled)
        yield Sides(ours, lambda: {"req/s": scores.throughput(_load(single, seconds))})
    finally:
        site.clean()


def _load(url: str, seconds: float) -> list[Done]:
    load = Load(mix=WORK, seconds=seconds, seed=0, clients=CLIENTS)
    done = generate(Target("pool", [url]), load)
    scores.check(done)
    return done


def _running(deployment: serve.Deployment) -> int:
    replicas = serve.status().deployments[deployment.name].replicas
    return sum(replica.state == "RUNNING" for replica in replicas)


@contextmanager
def _stuck(site: Site, seconds: float) -> Iterator[Sides]:
    """Call quickly while one of two replicas is in a call that its client has left."""

    def ours() -> Figures:
        try:
            url = site.at(site.deploy(models.Sleep, num_replicas=2))
            with connected(with_ms(url, STUCK_MS)):
                time.sleep(PATIENCE_S)
            done = generate(Target("pool", [url]), QUICK)
        finally:
            site.clean()
        # Not `scores.check`: those that fail are counted, for they waited too long.
        return {
            "calls": len(done),
            "failed or > 1 s": sum(d.status != 200 or d.seconds > SLOW_S for d in done),
            "slowest ms": max(d.seconds for d in done) * 1000,
        }

    yield Sides(ours)


_three, _two = partial(start_site, MOST, env=ENV), partial(start_site, 2, env=ENV)
BENCHES = [
    Bench("work/autoscaled/1-3", "1 replica", _three, _autoscaled),
    Bench("work/stuck/1-of-2", "", _two, _stuck),
]
