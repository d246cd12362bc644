"""The benchmarks' command runs, and what it writes makes sense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.utils import ROOT


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--json", str(file)]
    command += ["--rows", "starlette/head-far/c=10$", "--seconds", "1", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "starlette/head-far/c=10 " in done.stdout
    report = json.loads(file.read_text())
    (row,) = report["rows"]
    assert report["versions"]["uvicorn"]
    assert 0 < row["medians"]["rate_ratio"]
    assert 0 < row["ours"][0]["p50_us"] < 1e6
