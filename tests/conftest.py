"""Fixtures of all tests; what is not a fixture is in `tests.utils`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.utils import (
    ProcessCluster,
    child_processes,
    leftover_processes,
    leftover_threads,
    write_certificate,
)


@pytest.fixture
def process_cluster() -> Iterator[ProcessCluster]:
    """Give a cluster of two workers, one with and one without a nanny."""
    with ProcessCluster(2, nanny=[True, False]) as cluster:
        yield cluster


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Fail a test that leaves our threads or any process behind."""
    known = child_processes()
    yield
    assert leftover_threads() == []
    assert leftover_processes(known) == []


@pytest.fixture(params=["http", "https"])
def certificate(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Give a file with certificate and key, or None: a test with and without TLS."""
    return None if request.param == "http" else write_certificate(tmp_path)
