"""Medians and ratios as a table, and everything raw as JSON."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median
from typing import Any

import psutil

from tests.benchmarks.load import client_name
from tests.benchmarks.rows import Row

_PACKAGES = ("daskserve", "distributed", "uvicorn", "starlette", "fastapi", "uvloop")
HEADER = (
    f"{'row':32} {'uvicorn/s':>10} {'ours/s':>10} {'ratio':>6}"
    f" {'uvicorn us':>11} {'ours us':>10} {'ratio':>6}"
)


def summary(row: Row) -> dict[str, float]:
    pairs = list(zip(row.plain, row.ours, strict=True))
    return {
        "plain_rate": median(f.rate for f in row.plain),
        "rate": median(f.rate for f in row.ours),
        "rate_ratio": median(b.rate / a.rate for a, b in pairs),
        "plain_p50_us": median(f.p50_us for f in row.plain),
        "p50_us": median(f.p50_us for f in row.ours),
        "p50_ratio": median(b.p50_us / a.p50_us for a, b in pairs),
    }


def line(row: Row) -> str:
    s = summary(row)
    return (
        f"{row.name:32} {s['plain_rate']:10.0f} {s['rate']:10.0f}"
        f" {s['rate_ratio']:6.2f}"
        f" {s['plain_p50_us']:11.0f} {s['p50_us']:10.0f} {s['p50_ratio']:6.2f}"
    )


def report(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _PACKAGES},
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "client": client_name(),
        "rows": [{**asdict(row), "medians": summary(row)} for row in rows],
    }
