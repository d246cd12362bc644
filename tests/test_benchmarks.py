"""The benchmarks' command runs, and what it writes makes sense."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import __main__, scores
from tests.benchmarks.calls import Done, Load
from tests.benchmarks.catalog import BENCHES
from tests.benchmarks.generator import Target, generate
from tests.benchmarks.load import parse_wrk
from tests.benchmarks.peer_apps import working
from tests.benchmarks.rows import Bench, Figures, Row, Sides, measure, medians
from tests.benchmarks.table import lines
from tests.utils import ROOT, run_uvicorn


def run(tmp_path: Path, pattern: str, seconds: float) -> dict[str, Any]:
    """Run the command once; return the rows of its report by name."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--json", str(file)]
    command += ["--rows", pattern, "--seconds", str(seconds), "--rounds", "1"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert (report["seconds"], report["rounds"]) == (seconds, 1)
    assert report["versions"]["uvicorn"]
    rows = {row["name"]: row for row in report["rows"]}
    assert all(f"\n{name} " in done.stdout for name in rows)
    return rows


@pytest.mark.slow
@pytest.mark.long
def test_requests(tmp_path: Path) -> None:
    # With few connections, the kernel may well give one of two proxies none.
    (row,) = run(tmp_path, "starlette/every-2/c=100$", 1).values()
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
WORK = [
    "work/numpy/2/head/c=10",
    "work/sync-20ms/2/every/c=n",
    "work/sync-20ms/2/replica/c=n",
    "work/sync-20ms/2/task/c=n",
    "work/sync-20ms/2/client/c=n",
    "places/near/c=200",
]
MAY_BE_0 = ("% of a core", "share off by", "doubled")


@pytest.mark.long
@pytest.mark.parametrize("names", [OTHERS, WORK], ids=["others", "work"])
def test_rows(tmp_path: Path, names: list[str]) -> None:
    rows = run(tmp_path, "|".join(f"^{name}$" for name in names), 0.2)
    assert sorted(rows) == sorted(names)
    for row in rows.values():
        assert row["error"] is None
        ours = row["ours"][0]
        assert all(v > 0 for name, v in ours.items() if name not in MAY_BE_0), row


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


WRK = """Running 1s test @ http://127.0.0.1:8000/
  1 threads and 10 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.02ms  399.00us  9.99ms   96.99%
    Req/Sec     9.91k   599.50    10.50k    80.00%
  Latency Distribution
     50%  950.00us
     75%    1.10ms
     90%    1.20ms
     99%    2.34ms
  9999 requests in 1.00s, 1.00MB read
Requests/sec:   9912.34
Transfer/sec:      1.00MB
"""


def test_parse_wrk() -> None:
    expected = {"req/s": 9912.34, "p50 us": 950.0, "p99 us": pytest.approx(2340.0)}
    assert parse_wrk(WRK) == expected
    assert parse_wrk(WRK.replace("2.34ms", "1.50s"))["p99 us"] == 1.5e6
    with pytest.raises(AssertionError, match="Non-2xx"):
        parse_wrk(WRK + "  Non-2xx or 3xx responses: 7\n")


class Stalling:
    """An app that answers with its path, and the first time stands still before."""

    def __init__(self, stall_s: float, chunked: bool = False) -> None:
        self._stall_s = stall_s
        self._chunked = chunked

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        time.sleep(self._stall_s)  # noqa: ASYNC251 - as code that blocks does
        self._stall_s = 0
        body = scope["path"].encode() + scope["query_string"]
        length = (b"content-length", str(len(body)).encode())
        start = {"status": 200, "headers": [] if self._chunked else [length]}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": body})


def test_open_loop_counts_stalls() -> None:
    load = Load(mix=((1, 5), (3, 1)), seconds=1, seed=3, rate=200, even=True)
    with run_uvicorn(Stalling(0.3)) as url:
        done = generate(Target("pool", [f"{url}/a", f"{url}/b"]), load)
    scores.check(done)
    assert sorted((d.at, d.ms) for d in done) == sorted(load.calls())
    answers = {"/ams=5", "/ams=1", "/bms=5", "/bms=1"}
    assert {d.who for d in done} == answers
    # All that were due while the server stood still have waited for it.
    late = [d for d in done if d.seconds > 0.1]
    assert 30 <= len(late) <= 100
    assert all(d.at < 0.5 for d in late)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("via", ["pool", "httpx"])
def test_closed_loop(via: str, chunked: bool) -> None:
    load = Load(mix=((1, 1),), seconds=0.3, seed=0, clients=4)
    with run_uvicorn(Stalling(0.1, chunked)) as url:
        done = generate(Target(via, [f"{url}/a", f"{url}/b"]), load)
    scores.check(done)
    assert {d.who for d in done} == {"/ams=1", "/bms=1"}
    assert len(done) > 4  # each client more than once
    assert scores.share_off_by(done, 2, lambda who: 1.0) < 0.5
    assert max(d.at for d in done) < 0.3


def test_failed_calls() -> None:
    load = Load(mix=((1, 1),), seconds=0, seed=0, burst=2)
    done = generate(Target("pool", ["http://127.0.0.1:9"]), load)
    with pytest.raises(AssertionError, match="2 calls, of which failed: .*Refused"):
        scores.check(done)


def test_loads() -> None:
    load = Load(mix=((1, 200), (19, 10)), seconds=10, seed=5, rate=100)
    calls = load.calls()
    assert load.calls() == calls
    assert len(calls) == pytest.approx(1000, rel=0.1)
    assert sum(call.ms == 200 for call in calls[:200]) == 10
    assert calls == sorted(calls) and calls[-1].at < 10


def test_scores() -> None:
    done = [
        Done(0.0, 20, 0.02, 200, "a"),
        Done(0.0, 20, 0.02, 200, "b"),
        Done(0.02, 20, 0.02, 200, "a"),
        Done(0.03, 20, 0.03, 200, "a"),  # for 10 ms beside the one before; b is idle
        Done(0.07, 10, 0.02, 200, "a"),
    ]
    assert scores.throughput(done) == pytest.approx(5 / 0.09)
    assert scores.share_off_by(done, 2, lambda who: 1.0) == pytest.approx(0.6)
    assert scores.share_off_by(done, 2, {"a": 4.0, "b": 1.0}.__getitem__) == 0
    assert scores.share_off_by(done, 3, lambda who: 1.0) == 1.0
    assert scores.doubled(done, 2, 0.002) == pytest.approx(1 / 3)
    figures = scores.latencies(done, [d.seconds for d in done], ((4, 20), (1, 10)))
    assert figures["20ms: p99 ms"] == pytest.approx(30)
    assert figures["10ms: p50 ms"] == pytest.approx(20)


def test_working() -> None:
    assert working.work("python:10")["ok"] is True
    assert working.work("sleep:1")["ok"] is True
    assert working.spin(4) == 0 + 1 + 4 + 9
    with pytest.raises(ValueError, match="'none' is neither"):
        working.work("none")
