"""How long calls take."""

from __future__ import annotations

import pytest

from daskserve.replica.times import Times


def test_means_follow_what_calls_take() -> None:
    times = Times()
    assert (times.mean_s, times.typical_s, times.steady) == (0.0, 0.0, False)
    for seconds in [0.02] * 50 + [0.08] * 100:
        times.add(seconds)
    assert times.mean_s == pytest.approx(0.08, rel=0.01)
    assert times.typical_s == pytest.approx(0.08, rel=0.02)
    assert times.steady


def test_one_that_takes_long_changes_little_of_what_is_typical() -> None:
    times = Times()
    for _ in range(20):
        times.add(0.001)
    assert times.steady
    times.add(1.0)
    assert times.mean_s > 0.1 and times.typical_s < 0.0015
    for _ in range(100):
        times.add(0.001)
    assert not times.steady  # another one may come
    for _ in range(700):
        times.add(0.001)
    assert times.steady


def test_no_time_at_all() -> None:
    times = Times()
    times.add(0.0)
    times.add(-1.0)
    assert 0 < times.mean_s < 1e-5 and 0 < times.typical_s < 1e-5
