"""The benchmarks' command runs, and what it writes makes sense."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import __main__
from tests.benchmarks.catalog import BENCHES
from tests.benchmarks.rows import Bench, Figures, Row, Sides, measure, medians
from tests.benchmarks.table import lines
from tests.utils import ROOT


def run(tmp_path: Path, pattern: str, seconds: float) -> dict[str, Any]:
    """Run the command once; return the rows of its report by name."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--json", str(file)]
    command += ["--rows", pattern, "--seconds", str(seconds), "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert (report["seconds"], report["rounds"]) == (seconds, 1)
    assert report["versions"]["uvicorn"]
    rows = {row["name"]: row for row in report["rows"]}
    assert all(f"\n{name} " in done.stdout for name in rows)
    return rows


@pytest.mark.slow
def test_requests(tmp_path: Path) -> None:
    (row,) = run(tmp_path, "starlette/every-2/c=10$", 1).values()
    assert 0 < row["medians"]["req/s"]["ratio"]
    assert 0 < row["ours"][0]["p50 us"] < 1e6


#: A cheap one of each other kind.
OTHERS = [
    "handles/replica/coro/c=1",
    "handles/arrays/echo/1MB",
    "bodies/up/10MB/far",
    "bodies/down/10MB/far",
    "streams/100-clients/0ms/far",
    "websockets/echo/far/c=50",
    "features/token",
    "deploy/2",
    "delete/2",
    "deploy/route-update",
    "idle/proxy-and-replica",
]


@pytest.mark.slow
def test_others(tmp_path: Path) -> None:
    rows = run(tmp_path, "|".join(f"^{name}$" for name in OTHERS), 0.2)
    assert sorted(rows) == sorted(OTHERS)
    for row in rows.values():
        assert row["error"] is None
        ours = row["ours"][0]
        assert all(v > 0 for name, v in ours.items() if name != "% of a core"), row


@contextmanager
def place(log: list[str]) -> Iterator[list[str]]:
    log.append("open")
    yield log
    log.append("close")


def bench(name: str, log: list[str], error: str = "", where: Any = None) -> Bench:
    """Make a row whose second measurement fails, if it is to fail at all."""

    @contextmanager
    def sides(place: list[str], seconds: float) -> Iterator[Sides]:
        def ours() -> Figures:
            place.append(name)
            if error and place.count(name) > 1:
                raise OSError(error)
            return {"ms": seconds * len(place)}

        yield Sides(ours, lambda: {"ms": 2.0})

    return Bench(name, "nobody", where or (lambda: place(log)), sides)


def test_failed_row() -> None:
    log: list[str] = []
    where = bench("", log).place
    names = [("good", ""), ("bad", "no luck"), ("better", "")]
    benches = [bench(name, log, error, where) for name, error in names]
    good, bad, better = measure(benches, "good|b", 1.0, 2)
    assert good.error is None and better.error is None
    assert bad.error is not None and "OSError: no luck" in bad.error
    assert len(bad.ours) == 1 and len(bad.theirs) == 2
    assert "FAILED" in next(lines(bad)) and "no luck" in next(lines(bad))
    assert log == ["open", *2 * ["good"], *2 * ["bad"], *2 * ["better"], "close"]


def test_report_of_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    rows = [bench("bad", [], "no luck"), bench("good", [])]
    monkeypatch.setattr(__main__, "BENCHES", rows)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", str(file)])
    assert __main__.main() == 1
    assert "FAILED" in capsys.readouterr().out
    bad, good = json.loads(file.read_text())["rows"]
    assert "no luck" in bad["error"]
    assert good["error"] is None and len(good["ours"]) == 3
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--rows", "good"])
    assert __main__.main() == 0


def test_failed_place() -> None:
    def nowhere() -> AbstractContextManager[list[str]]:
        raise OSError("no room")

    log: list[str] = []
    benches = [bench("a", log, where=nowhere), bench("b", log, where=nowhere)]
    a, b, c = measure([*benches, bench("c", log)], "", 1.0, 1)
    assert "no room" in str(a.error) and "no room" in str(b.error)
    assert c.error is None and c.ours == [{"ms": 2.0}]


def test_ratios_are_of_pairs() -> None:
    theirs: list[Figures] = [{"ms": 1.0}, {"ms": 10.0}, {"ms": 100.0}]
    ours: list[Figures] = [{"ms": 4.0}, {"ms": 30.0}, {"ms": 200.0, "%": 1.0}]
    row = Row("row", "them", theirs, ours[:2])
    assert medians(row)["ms"] == {"ours": 17.0, "theirs": 5.5, "ratio": 3.5}
    row = Row("row", "them", theirs, ours)
    assert medians(row)["ms"] == {"ours": 30.0, "theirs": 10.0, "ratio": 3.0}
    row = Row("row", "", [], ours[:1])
    assert medians(row) == {"ms": {"ours": 4.0}}


def test_names_are_unique() -> None:
    names = [bench.name for bench in BENCHES]
    assert len(set(names)) == len(names)
