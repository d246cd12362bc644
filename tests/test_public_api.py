"""What can be imported from the package's root is what `__all__` says."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import daskserve


def test_all_is_what_is_there() -> None:
    there = {
        name
        for name, value in vars(daskserve).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert there == set(daskserve.__all__)
    assert daskserve.__all__ == sorted(daskserve.__all__)


def test_public_names_are_documented() -> None:
    for name in daskserve.__all__:
        assert getattr(daskserve, name).__doc__, name


def test_importing_starts_nothing() -> None:
    code = """
import threading
before = threading.active_count()
import daskserve, dask.config
assert threading.active_count() == before, threading.enumerate()
assert dask.config.get("daskserve.http.port") == 8000
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
