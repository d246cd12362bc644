"""Medians and ratios as a table, and everything raw as JSON."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import psutil

from tests.benchmarks.load import client_name
from tests.benchmarks.rows import Row, medians

_PACKAGES = ("daskserve", "distributed", "uvicorn", "starlette", "fastapi", "uvloop")
_ROW = "{:34} {:11} {:>10} {:>10} {:>6}  {}"
HEADER = _ROW.format("row", "against", "theirs", "ours", "ratio", "figure")


def lines(row: Row) -> Iterator[str]:
    """Give a line for each figure, or the error."""
    start = (row.name, row.against or "-")
    if row.error is not None:
        yield f"{_ROW.format(*start, '-', '-', '-', 'FAILED')}\n{row.error}"
        return
    for figure, of in medians(row).items():
        cells = [_cell(of.get(key)) for key in ("theirs", "ours", "ratio")]
        yield _ROW.format(*start, *cells, figure)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


def report(rows: Sequence[Row], seconds: float, rounds: int) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "rounds": rounds,
        "versions": {name: version(name) for name in _PACKAGES},
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "client": client_name(),
        "rows": [{**asdict(row), "medians": medians(row)} for row in rows],
    }
