"""No cost grows faster than the cluster; the figures are in `benchmarks.growth`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.benchmarks.growth import connections, measure, spread
from tests.utils import ROOT

#: In place of 4, for noise; what grows with the square comes to 16.
LIMIT = 8


def test_costs_are_linear() -> None:
    small, large = measure(40, runs=5), measure(160, runs=5)
    ratios = {name: large[name] / small[name] for name in small}
    assert {name: ratio for name, ratio in ratios.items() if ratio > LIMIT} == {}
    assert ratios["bytes: change of one replica"] == 1


def test_a_change_is_small() -> None:
    costs = measure(40)
    assert costs["bytes: change of one replica"] < 200
    assert costs["bytes: whole snapshot"] > 100 * costs["bytes: change of one replica"]


def test_load_is_spread_better_than_by_chance() -> None:
    assert spread(1) < 0.5 * spread(1, by_chance=True)
    assert spread(10) < 0.8 * spread(10, by_chance=True)
    assert spread(100) < spread(100, by_chance=True)


def test_connections_grow_with_workers_and_not_with_replicas() -> None:
    few, many = connections(50, 1000), connections(50, 4000)
    assert few == many <= 50 + 256
    assert connections(10, 20) == 30


@pytest.mark.by_hand
def test_command_with_a_cluster_of_64_workers() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.growth", "--sizes", "5", "10"]
    done = subprocess.run(
        [*command, "--real", "64"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout
    assert "ms: nothing to do" in done.stdout and "shut down" in done.stdout
    assert "No answer within" not in done.stdout, done.stdout
