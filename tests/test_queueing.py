"""The simulated queue behaves as queueing theory says."""

from __future__ import annotations

from math import log
from random import Random
from statistics import fmean

import pytest

from tests.benchmarks.calls import Load
from tests.benchmarks.queueing import quantile, single_queue

CALLS = 100_000


def poisson(rate: float) -> list[float]:
    calls = Load(mix=((1, 1),), seconds=CALLS / rate, seed=1, rate=rate).calls()
    return [call.at for call in calls]


def exponential(arrivals: list[float], mean: float) -> list[float]:
    rng = Random(2)
    return [rng.expovariate(1 / mean) for _ in arrivals]


def test_m_m_1() -> None:
    arrivals = poisson(0.5)
    responses = single_queue(arrivals, exponential(arrivals, 1.0), [1.0])
    # Responses are exponential, with the rate that is left.
    assert fmean(responses) == pytest.approx(2.0, rel=0.05)
    assert quantile(responses, 0.99) == pytest.approx(-log(0.01) / 0.5, rel=0.1)


def test_m_d_1() -> None:
    arrivals = poisson(0.8)
    responses = single_queue(arrivals, [1.0] * len(arrivals), [1.0])
    assert fmean(responses) == pytest.approx(1.0 + 0.8 / (2 * 0.2), rel=0.05)


def test_m_m_2() -> None:
    arrivals = poisson(1.0)
    responses = single_queue(arrivals, exponential(arrivals, 1.0), [1.0, 1.0])
    # Erlang's C is 1/3 for two servers that are busy half of the time.
    assert fmean(responses) == pytest.approx(1.0 + 1 / 3 / (2 - 1), rel=0.05)


def test_speeds() -> None:
    arrivals = [0.0, 0.0, 0.0, 10.0]
    # The slow one takes the second, the fast one the third when it is free again.
    responses = single_queue(arrivals, [1.0] * 4, [0.25, 1.0])
    assert responses == [1.0, 4.0, 2.0, 1.0]


def test_quantile() -> None:
    values = list(range(1, 101))
    assert [quantile(values, q) for q in (0.5, 0.99, 0.999)] == [50, 99, 100]
    assert quantile([7.0], 0.5) == 7.0
