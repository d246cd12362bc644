"""The chaos harness finds what the contract does not allow, and runs."""

from __future__ import annotations

import itertools
import re
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.contract import History, Verdict, judge, judge_all
from tests.chaos.load import CONNECTIONS, Fate, Load
from tests.chaos.report import Report
from tests.hosts import need_hosts
from tests.utils import ROOT, free_port

#: Processes: one that lives, and two that are killed at 10 s.
ALIVE, DEAD, DEAD_TOO = 1, 2, 3


def fate(outcome: str = "200", method: str = "POST", **changes: Any) -> Fate:
    facts = {"began": 9.5, "ended": 10.2, "pid": ALIVE, "version": 1}
    return Fate(id="x", method=method, outcome=outcome, **{**facts, **changes})


def history(**changes: Any) -> History:
    return History(kills={DEAD: 10.0, DEAD_TOO: 10.0}, **changes)


@pytest.mark.parametrize(
    ("what", "begun", "verdict"),
    [
        (fate(), [ALIVE], Verdict.OK),
        (fate(), [], Verdict.BREACH),
        (fate(), [DEAD], Verdict.BREACH),
        (fate(), [ALIVE, DEAD], Verdict.BREACH),
        (fate(method="GET"), [ALIVE, DEAD], Verdict.OK),
        (fate(method="GET"), [ALIVE, DEAD, DEAD_TOO], Verdict.BREACH),
        (fate(method="GET", sent=2), [ALIVE, DEAD, DEAD_TOO], Verdict.OK),
        (fate("502"), [DEAD], Verdict.FAILED),
        (fate("502"), [], Verdict.FAILED),
        (fate("502"), [ALIVE], Verdict.BREACH),
        (fate("502", began=11.5, ended=12), [], Verdict.BREACH),
        (fate("502", ended=9.9), [DEAD], Verdict.BREACH),
        (fate("502", "GET"), [DEAD], Verdict.BREACH),
        (fate("502", "GET"), [], Verdict.BREACH),
        (fate("502", "GET"), [DEAD, DEAD_TOO], Verdict.FAILED),
        (fate("503"), [], Verdict.BREACH),
        (fate("500"), [ALIVE], Verdict.BREACH),
        (fate("refused"), [], Verdict.BREACH),
        (fate("closed"), [DEAD], Verdict.BREACH),
        (fate("hung"), [DEAD], Verdict.BREACH),
        (fate("wrong"), [ALIVE], Verdict.BREACH),
        (fate("vanished"), [ALIVE], Verdict.OK),
        (fate("vanished"), [ALIVE, ALIVE], Verdict.BREACH),
    ],
)
def test_killed_replicas(what: Fate, begun: list[int], verdict: Verdict) -> None:
    assert judge(what, begun, history()).verdict == verdict


@pytest.mark.parametrize("outcome", ["refused", "closed", "cut", "503", "hung"])
def test_killed_proxies_and_outages(outcome: str) -> None:
    def verdict(**changes: Any) -> Verdict:
        return judge(fate(outcome), [ALIVE], history(**changes)).verdict

    in_a_connection = outcome in ("refused", "closed", "cut")
    excused = Verdict.FAILED if in_a_connection else Verdict.BREACH
    assert verdict(proxy_kills=[10.0]) == excused
    assert verdict(proxy_kills=[9.0, 10.3]) == Verdict.BREACH
    excused = Verdict.BREACH if outcome == "hung" else Verdict.FAILED
    assert verdict(outages=[(9.8, 9.9)]) == excused
    assert verdict(outages=[(8.0, 9.0), (10.3, 11.0)]) == Verdict.BREACH


@pytest.mark.parametrize(
    ("what", "begun", "verdict"),
    [
        (fate("502"), [DEAD], Verdict.FAILED),
        (fate("502"), [], Verdict.FAILED),  # it did not get there
        (fate("502", began=13, ended=14.5), [DEAD], Verdict.FAILED),
        (fate("502", began=15.5, ended=16), [DEAD], Verdict.BREACH),
        (fate("502", ended=9.9), [DEAD], Verdict.BREACH),
        (fate("502"), [ALIVE], Verdict.BREACH),
        (fate("502", "GET"), [DEAD], Verdict.BREACH),
        (fate("502", "GET"), [DEAD, DEAD_TOO], Verdict.FAILED),
        (fate("hung"), [DEAD], Verdict.BREACH),
        (fate("refused"), [], Verdict.BREACH),
    ],
)
def test_hosts_cut_off(what: Fate, begun: list[int], verdict: Verdict) -> None:
    cut_off = History(cuts=[(frozenset({DEAD, DEAD_TOO}), 10.0, 14.0)])
    assert judge(what, begun, cut_off).verdict == verdict


def test_answers_of_old_versions() -> None:
    def verdict(*versions: tuple[float, int]) -> Verdict:
        return judge(fate(), [ALIVE], history(versions=list(versions))).verdict

    assert verdict((9.0, 1)) == Verdict.OK
    assert verdict((9.0, 1), (9.6, 2)) == Verdict.OK  # while it was on its way
    assert verdict((9.0, 1), (9.4, 2)) == Verdict.BREACH


def test_reports() -> None:
    fates = [fate("502", "GET"), fate("502"), *[fate("200", "PUT")] * 5]
    judged = judge_all(fates, {"x": [ALIVE]}, history())
    report = Report("some")
    report.count(judged, may_fail=True)
    assert "idempotent: 1 failed of 6" in report.lines
    assert "not idempotent: 1 failed of 1" in report.lines
    assert [text.split(": ")[1] for text in report.breaches] == [
        "GET 502, begun in [1] (breach)",
        "POST 502, begun in [1] (breach)",
    ]
    strict, lenient = Report("strict"), Report("lenient")
    judged = judge_all([fate("502")], {"x": [DEAD]}, history())
    strict.count(judged, may_fail=False)
    lenient.count(judged, may_fail=True)
    assert strict.breaches and not lenient.breaches
    assert "BREACHES" in str(strict) and "! " in str(strict)


#: What a bad server answers, in turn: nothing, a part, another's answer, an error.
ANSWERS = [
    b"",
    b"HTTP/1.1 200 OK\r\ncontent-le",
    b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\ncontent-length: 45\r\n\r\n"
    b'{"id": "y", "pid": 1, "version":1, "bytes":0}',
    b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n",
]


class BadServer(socketserver.BaseRequestHandler):
    """Answers one request and closes the connection."""

    answers = itertools.cycle(ANSWERS)

    def handle(self) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self.request.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        missing = int(length[1]) - len(body) if length else 0
        while missing > 0:
            missing -= len(self.request.recv(65536))
        self.request.sendall(next(self.answers))


def test_clients_see_what_a_server_does(tmp_path: Path) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), BadServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/x"
            with Load(url, tmp_path / "fates", connections=1, rate=200) as load:
                load.wait(8 * len(ANSWERS), 20)
        finally:
            server.shutdown()
            thread.join()
    outcomes = ["closed", "cut", "cut", "wrong", "502"]
    found = [f.outcome for f in load.fates()]
    assert found == (outcomes * len(found))[: len(found)]
    assert {f.method for f in load.fates()} == {"GET", "POST", "PUT"}
    assert load.fates()[0].began <= load.fates()[0].ended <= time.monotonic()


def test_refused_connections(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/x"
    with Load(url, tmp_path / "fates", connections=2, rate=200) as load:
        load.wait(4, 20)
    assert {(f.outcome, f.sent) for f in load.fates()} == {("refused", 1)}


@pytest.mark.long
def test_short_storm() -> None:
    need_hosts()
    command = [sys.executable, "-m", "tests.chaos", "storm-on-hosts", "--seconds", "4"]
    command += ["--faults", "kill,stop,redeploy,scale,break,cut", "--pause", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"idempotent: (\d+) failed of (\d+)", done.stdout)
    (failed, asked), (others_failed, others_asked) = (map(int, n) for n in counts)
    losses = sum(map(int, re.findall(r"(?:kill|cut) (\d+)", done.stdout)))
    # The server is on another host than those that are lost: what may be sent again is.
    assert failed == 0, done.stdout
    assert others_failed <= CONNECTIONS * losses, done.stdout
    assert asked + others_asked > 300
