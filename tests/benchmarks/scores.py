"""Figures of calls that were made; plain functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tests.benchmarks.calls import Call, Done, Mix
from tests.benchmarks.queueing import quantile
from tests.benchmarks.rows import Figures

QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


def check(done: Sequence[Done]) -> None:
    """Fail if any answer is not a 200."""
    bad = Counter((d.status, d.who[:200]) for d in done if d.status != 200)
    assert done and not bad, f"{len(done)} calls, of which failed: {dict(bad)}"


def throughput(done: Sequence[Done]) -> float:
    """Return calls a second, until the last has ended."""
    return len(done) / max(d.at + d.seconds for d in done)


def share_off_by(
    done: Sequence[Done], replicas: int, weight: Callable[[str], float]
) -> float:
    """Return how far the share of a replica is from its fair one, over the fair one.

    Of the worst one. Replicas that never answered have no name, and no weight: they
    have a share of nothing, which is off by 1.
    """
    counts = Counter(d.who for d in done)
    if len(counts) < replicas:
        return 1.0
    weights = {who: weight(who) for who in counts}
    total = sum(weights.values())
    fair = {who: len(done) * weights[who] / total for who in counts}
    return max(abs(counts[who] / fair[who] - 1) for who in counts)


def doubled(done: Sequence[Done], replicas: int, slack_s: float) -> float:
    """Return the share of calls that shared a replica while another one was idle.

    As one caller sees it: for longer than `slack_s`, there was another call of its in
    the same replica. Of as many clients as replicas, none need be. The first calls,
    until each replica could have answered, are not counted.
    """
    last_end: dict[str, float] = {}
    found = 0
    calls = sorted(done)
    for number, call in enumerate(calls):
        end = call.at + call.seconds
        busy = sum(until > call.at for until in last_end.values())
        overlap = min(last_end.get(call.who, 0.0), end) - call.at
        if number >= replicas and overlap > slack_s and busy < replicas:
            found += 1
        last_end[call.who] = max(last_end.get(call.who, 0.0), end)
    return found / max(1, len(calls) - replicas)


def latencies(
    calls: Sequence[Call | Done], seconds: Iterable[float], mix: Mix
) -> Figures:
    """Return quantiles of latencies, of each class of calls if there are several."""
    of: dict[float, list[float]] = {ms: [] for _, ms in mix}
    for call, passed in zip(calls, seconds, strict=True):
        of[call.ms].append(passed * 1000)
    figures = {}
    for ms, values in of.items():
        before = f"{ms:g}ms: " if len(of) > 1 else ""
        for name, q in QUANTILES.items():
            figures[f"{before}{name} ms"] = quantile(values, q)
    return figures
