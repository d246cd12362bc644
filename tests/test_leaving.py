"""Workers that leave in an orderly way: nothing is lost, whoever asked for it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from distributed import Client, LocalCluster

import daskserve as serve
from daskserve import job_end
from daskserve import leaving as worker_leaving
from daskserve.config import Settings
from daskserve.controller import leaving
from daskserve.controller.actions import StopReplica
from daskserve.controller.leaving import (
    LINGER_S,
    NEAR_END_S,
    LeaveBoard,
    addresses_of,
    needed_workers,
)
from daskserve.controller.placement import LASTS, Leaving, WorkerView
from daskserve.controller.proxies import SCHEDULER, desired_proxies
from daskserve.job_end import (
    JobEnd,
    ask_for_end,
    earlier,
    end_by_environment,
    kill_wait_s,
)
from daskserve.leaving import Farewell
from daskserve.proxy import steering
from tests.test_state import SPEC, Rig, address, started, view
from tests.utils import ProcessCluster, free_port, poll

# The board of those that leave.

RETIRED = Leaving(reason="is retired", since=1000, deadline=1100)


def test_announced_and_called_off() -> None:
    board = LeaveBoard()
    assert not board
    board.announce("a", RETIRED)
    assert board.get("a", 1000) == RETIRED
    assert board.get("b", 1000) is None
    board.sweep(5000, {"a"})
    assert board.get("a", 1000) == RETIRED  # somebody waits for it
    board.let_be("a", 5000)
    board.sweep(5000 + LINGER_S - 1, {"a"})
    assert board.get("a", 1000) == RETIRED
    board.sweep(5000 + LINGER_S, set())
    assert board.get("a", 1000) == RETIRED  # Dask does not let it run
    board.sweep(5000 + LINGER_S, {"a"})
    assert board.get("a", 1000) is None


def test_the_earliest_deadline_holds() -> None:
    board = LeaveBoard()
    sooner = replace(RETIRED, reason="got SIGTERM", deadline=1010)
    board.announce("a", RETIRED)
    board.announce("a", sooner)
    board.announce("a", RETIRED)
    assert board.get("a", 1000) == sooner
    for _ in range(2):
        board.let_be("a", 1000)
    board.sweep(2000, {"a"})
    assert board.get("a", 1000) == sooner  # one more call waits
    board.gone("a")
    board.let_be("a", 1000)
    assert board.get("a", 1000) is None
    # One of its address comes while a call for the one before still waits.
    board.announce("a", RETIRED)
    board.let_be("a", 1000)
    board.let_be("a", 1000)
    board.sweep(2000, {"a"})
    assert board.get("a", 2000) is None


def test_what_ran_out_counts_no_more() -> None:
    board = LeaveBoard()
    board.announce("a", RETIRED)
    board.let_be("a", 1100)
    later = replace(RETIRED, since=1101, deadline=1200)
    board.announce("a", later)
    assert board.get("a", 1101) == later


def ends(
    board: LeaveBoard, worker: str, in_s: float, killed_in_s: float, now: float
) -> None:
    board.ends(worker, in_s=in_s, killed_in_s=killed_in_s, clock="12:00:00", now=now)


def test_near_end() -> None:
    board = LeaveBoard()
    ends(board, "a", 5000, 5028, 0)
    assert board.lasts("a", 5000 - NEAR_END_S - 1) >= 0
    assert board.lasts("a", 5000 - NEAR_END_S) < 0
    assert board.lasts("b", 5000) == LASTS
    board.gone("a")
    assert board.lasts("a", 5000) == LASTS


def test_a_job_that_ends() -> None:
    board = LeaveBoard(margin_s=60, lead_s=300)
    ends(board, "a", 5000, 5028, 0)
    assert board.get("a", 4939) is None
    why = board.get("a", 4940)
    assert why is not None and why.killed and why.deadline == 5028
    assert why.reason == "ends with its job at 12:00:00"
    assert not board.is_to_be_replaced("a", 4699)
    assert board.is_to_be_replaced("a", 4700)
    assert not board.is_to_be_replaced("b", 4700)
    # A signal has a shorter time; a retired worker is nothing that is replaced.
    board.announce("a", replace(RETIRED, deadline=5010, killed=True))
    assert board.get("a", 4940) == replace(RETIRED, deadline=5010, killed=True)
    board.announce("b", RETIRED)
    assert not board.is_to_be_replaced("b", 1000)
    # Its time limit is raised.
    board.gone("a")
    ends(board, "a", 1000, 1028, 0)
    ends(board, "a", 8100, 8128, 900)
    assert board.get("a", 990) is None
    assert board.get("a", 8950) is not None
    board.never_ends("a")
    assert board.get("a", 8950) is None


def test_short_jobs_serve_for_most_of_their_time() -> None:
    board = LeaveBoard(margin_s=60, lead_s=300)
    ends(board, "a", 80, 108, 0)
    assert board.get("a", 59) is None
    assert board.get("a", 61) is not None
    assert not board.is_to_be_replaced("a", 59)


def test_how_long_jobs_last() -> None:
    board = LeaveBoard()
    for name, at in ("short", 700), ("day", 86400), ("more", 90000):
        ends(board, name, at, at, 0)
    assert board.lasts("short", 0) < board.lasts("day", 0) == board.lasts("more", 0)
    assert board.lasts("day", 0) <= board.lasts("forever", 0)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["tcp://1", "tcp://9"], ["tcp://1"]),
        ([0], ["tcp://0"]),  # as SpecCluster does
        (["job-1"], ["tcp://1", "tcp://2"]),  # a job with two workers
        (["job"], []),
        ([], []),
    ],
)
def test_who_is_meant(wanted: list[object], found: list[str]) -> None:
    names = {"tcp://0": "0", "tcp://1": "job-1-0", "tcp://2": "job-1-1", "tcp://3": "x"}
    assert addresses_of(wanted, names) == found


def test_an_exact_name_is_no_group() -> None:
    names = {"tcp://1": "w", "tcp://2": "w-1"}
    assert addresses_of(["w"], names) == ["tcp://1"]


def needed(*demands: tuple[Any, list[int]], workers: int = 4) -> set[str]:
    views = {address(n): view(n, gpus=n % 2) for n in range(1, workers + 1)}
    return needed_workers(
        [(spec, Counter(map(address, there))) for spec, there in demands], views, ()
    )


def test_workers_that_a_smaller_cluster_needs() -> None:
    one, three = replace(SPEC, num_replicas=1), replace(SPEC, num_replicas=3)
    assert needed() == set()
    assert needed((one, [3])) == {address(3)}
    assert needed((one, [3]), (three, [4, 2])) == {address(n) for n in (2, 3, 4)}
    assert len(needed((three, [1]))) == 3
    assert len(needed((replace(SPEC, num_replicas=9), [1]))) == 4
    gpu = replace(SPEC, num_replicas=1, resources={"GPU": 1})
    assert needed((gpu, [3]), (one, [2])) == {address(3)}
    assert needed((replace(one, workers=("w4",)), [])) == {address(4)}


# What replicas do; by a clock made by hand.


class Leavers(Rig):
    def away(
        self,
        *numbers: int,
        after: float = 100,
        **changes: Any,
    ) -> list[Any]:
        """Let workers be about to leave; return the actions."""
        for number in numbers:
            why = replace(RETIRED, since=self.now, deadline=self.now + after, **changes)
            old = self.views[address(number)]
            self.views[address(number)] = replace(old, leaving=why)
        return self.reconcile()

    def back(self, number: int) -> list[Any]:
        old = self.views[address(number)]
        self.views[address(number)] = replace(old, leaving=None)
        return self.reconcile()

    def told(self) -> list[Any]:
        """Let all proxies and handles know what was last to be told."""
        self.state.routing()
        self.state.routing_known()
        return self.reconcile()

    def on(self, number: int) -> list[int]:
        return [
            r["replica_id"]
            for r in self.status()["replicas"]
            if r["worker"] == address(number)
        ]


def stops(actions: list[Any]) -> list[int]:
    return [a.replica_id for a in actions if isinstance(a, StopReplica)]


def test_another_serves_before_the_old_one_stops() -> None:
    rig = Leavers(2)
    (old,) = rig.healthy(num_replicas=1)
    assert rig.on(1) == [old]
    (new,) = started(rig.away(1))
    assert rig.on(2) == [new]
    assert rig.routed() == [old]
    reason = f"worker {address(1)} is retired; serves until another replica does"
    assert rig.replica(old)["reason"] == reason
    assert stops(rig.start(new)) == []
    assert rig.routed() == [old, new]
    (stop,) = rig.told()
    assert (stop.replica_id, stop.grace_s) == (old, 20)
    assert rig.routed() == [new]
    text = f"draining: worker {address(1)} is retired"
    assert rig.replica(old)["reason"] == text
    rig.stop(old)
    assert rig.on(1) == []
    assert rig.status()["state"] == "HEALTHY"
    assert rig.wait(1000) == []
    assert rig.status()["deaths"] == []


def test_they_stop_one_by_one_as_others_start() -> None:
    rig = Leavers(3)
    ids = rig.healthy(num_replicas=4)
    there = rig.on(1)
    assert len(there) == 2
    new = started(rig.away(1))
    assert len(new) == 2
    rig.start(new[0])
    assert stops(rig.told()) == there[:1]
    rig.start(new[1])
    assert stops(rig.told()) == there[1:]
    assert sorted(rig.routed()) == sorted({*ids, *new} - set(there))


def test_nothing_new_is_placed_there() -> None:
    rig = Leavers(2)
    rig.away(1)
    rig.healthy(num_replicas=2)
    assert rig.on(1) == []


def test_a_worker_that_ends_soon_is_a_last_choice() -> None:
    rig = Leavers(2)
    for number in (1, 2):
        rig.views[address(number)] = replace(
            view(number, free=0 if number == 2 else 4), lasts=-(number == 1)
        )
    rig.healthy(num_replicas=1)
    assert rig.on(2) != []


def test_called_off() -> None:
    rig = Leavers(2)
    (old,) = rig.healthy(num_replicas=1)
    (new,) = started(rig.away(1))
    assert stops(rig.back(1)) == [new]  # it does not run yet
    assert rig.routed() == [old]
    assert rig.replica(old)["reason"] == ""


def test_nowhere_to_go_until_a_worker_comes() -> None:
    rig = Leavers(1)
    (old,) = rig.healthy(num_replicas=1)
    assert rig.away(1) == []
    expected = f"worker {address(1)} is retired; no other worker will do"
    assert rig.replica(old)["reason"] == expected
    rig.wait(70)
    rig.join(view(2))
    (new,) = started(rig.reconcile())
    rig.start(new)
    assert stops(rig.told()) == [old]


def test_nowhere_to_go_until_the_end() -> None:
    rig = Leavers(1)
    (old,) = rig.healthy(num_replicas=1)
    rig.away(1, after=100)
    assert rig.wait(79) == []
    (stop,) = (a for a in rig.wait(2) if isinstance(a, StopReplica))
    assert (stop.replica_id, stop.grace_s) == (old, pytest.approx(19))
    rig.stop(old)
    reason = rig.status()["reason"]
    assert f"about to leave: {address(1)}, and no other worker will do" in reason


def test_little_time_is_shared() -> None:
    rig = Leavers(1)
    (old,) = rig.healthy(num_replicas=1)
    rig.away(1, after=6)
    assert stops(rig.wait(2.9)) == []
    assert stops(rig.wait(0.2)) == [old]


def test_at_once() -> None:
    rig = Leavers(2)
    ids = rig.healthy(num_replicas=2)
    assert sorted(stops(rig.away(1, 2, after=3, at_once=True))) == ids


def test_all_leave_and_the_last_one_waits() -> None:
    rig = Leavers(3)
    ids = rig.healthy(num_replicas=2)
    new = started(rig.away(1, 2, 3))  # the third is the last of equals
    assert rig.on(3) == new
    rig.start(*new)
    assert sorted(stops(rig.told())) == ids
    rig.stop(*ids)
    rig.leave(1, 2)
    assert rig.routed() == new
    assert "no other worker will do" in rig.replica(new[0])["reason"]
    rig.join(view(4))  # the first one is back
    again = started(rig.reconcile())
    rig.start(*again)
    assert sorted(stops(rig.told())) == new
    assert rig.on(4) == again


def test_all_are_killed_together_and_stay() -> None:
    rig = Leavers(3)
    ids = rig.healthy(num_replicas=3)
    needs_s = dict.fromkeys(ids, 2.0)
    assert started(rig.away(1, 2, after=40, killed=True, needs_s=needs_s)) != []
    rig = Leavers(3)
    ids = rig.healthy(num_replicas=3)
    needs_s = dict.fromkeys(ids, 2.0)
    assert rig.away(1, 2, 3, after=40, killed=True, needs_s=needs_s) == []
    assert sorted(rig.routed()) == ids
    reasons = {rig.replica(n)["reason"] for n in ids}
    assert all("no other worker will do" in reason for reason in reasons)
    # Until what is in progress can just end; then there is nowhere to go either.
    assert stops(rig.wait(37.9)) == []
    assert sorted(rig.routed()) == ids
    assert sorted(stops(rig.wait(0.2))) == ids


@pytest.mark.parametrize(("later_s", "moves"), [(62, True), (20, False)])
def test_one_that_is_killed_much_later_is_worth_moving_to(
    later_s: float, moves: bool
) -> None:
    rig = Leavers(2)
    rig.healthy(num_replicas=2)
    for number, after in (1, 28), (2, 28 + later_s):
        why = replace(RETIRED, since=rig.now, deadline=rig.now + after, killed=True)
        old = rig.views[address(number)]
        rig.views[address(number)] = replace(old, leaving=why)
    new = started(rig.reconcile())
    assert len(new) == moves
    assert set(new) <= set(rig.on(2))


def test_replicas_prefer_jobs_that_last() -> None:
    rig = Leavers(3)
    for number, lasts in (1, 0), (2, 5), (3, 3):
        rig.views[address(number)] = replace(view(number), lasts=lasts)
    rig.healthy(num_replicas=1)
    assert rig.on(2) != []


def test_a_constructor_that_fails_meanwhile_waits_for_its_next_try() -> None:
    rig = Leavers(2)
    (old,) = rig.healthy(num_replicas=1)
    (new,) = started(rig.away(1))
    assert started(rig.fail(new)) == []
    assert rig.routed() == [old]
    (again,) = started(rig.wait(1))
    rig.start(again)
    assert stops(rig.told()) == [old]


def test_the_worker_goes_before_all_is_done() -> None:
    rig = Leavers(2)
    rig.healthy(num_replicas=1)
    (new,) = started(rig.away(1))
    assert rig.leave(1) != []
    rig.start(new)
    assert rig.routed() == [new]


def test_deploy_while_a_worker_leaves() -> None:
    rig = Leavers(2)
    (old,) = rig.healthy(num_replicas=1, version="1")
    (moved,) = started(rig.away(1))
    rig.start(moved)
    rig.told()
    rig.stop(old)
    (new,) = rig.healthy(num_replicas=1, version="2")
    assert rig.on(2) == [moved, new]
    assert rig.routed() == [new]


# Where HTTP servers go.


def proxies(
    *views: WorkerView, location: str, current: Collection[str], now: float = 1000
) -> set[str]:
    return desired_proxies(
        location=location,
        enabled=True,
        scheduler_hosts=frozenset({"10.0.0.1"}),
        views={v.address: v for v in views},
        current=current,
        now=now,
    )


def local(number: int, **why: Any) -> WorkerView:
    new = replace(view(1), address=f"tcp://10.0.0.1:400{number}")
    if why:
        return replace(new, leaving=replace(RETIRED, **why))
    return new


def test_head_moves() -> None:
    a, b = local(1), local(2)
    gone = local(1, since=1000)
    assert proxies(a, b, location="HeadOnly", current=[b.address]) == {b.address}
    assert proxies(gone, b, location="HeadOnly", current=[a.address]) == {b.address}
    assert proxies(gone, location="HeadOnly", current=[a.address]) == {SCHEDULER}


def test_every_node_leaves_the_port_to_others() -> None:
    a, b = local(1, since=1000), local(2)
    both = [a.address, b.address]
    assert proxies(a, b, location="EveryNode", current=both) == {b.address}
    # Nobody else serves yet, and another will.
    back = replace(a, leaving=replace(RETIRED, may_return=True))
    assert proxies(back, b, location="EveryNode", current=[a.address]) == set(both)
    assert proxies(back, b, location="EveryNode", current=both) == {b.address}
    # Both go: the last one holds the port.
    late = local(2, may_return=True, since=1001)
    assert proxies(back, late, location="EveryNode", current=both) == {late.address}
    assert proxies(late, location="EveryNode", current=[late.address]) == {late.address}
    ended = proxies(late, location="EveryNode", current=[late.address], now=1096)
    assert ended == set()


def test_cluster_that_closes() -> None:
    a, b = local(1, at_once=True), local(2, at_once=True)
    for location in ("EveryNode", "HeadOnly"):
        assert proxies(a, b, location=location, current=[a.address]) == set()


# The end of a batch job.


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_END_TIME": "1764000000"}, JobEnd(1764000000, 1764000000)),
        (
            {"SLURM_JOB_END_TIME": "1764000000", "SLURM_JOB_ID": "7"},
            JobEnd(1764000000, 1764000028),
        ),
        ({"SLURM_JOB_END_TIME": "never"}, None),
    ],
)
def test_end_of_job(environ: dict[str, str], expected: JobEnd | None) -> None:
    assert end_by_environment(Settings.load(), environ) == expected


def test_end_of_job_by_its_limit() -> None:
    end = end_by_environment(Settings.load(), {"PBS_WALLTIME": "3600"})
    assert end is not None
    assert time.time() - 10 * 24 * 3600 < end.at <= time.time() + 3600


@pytest.mark.parametrize("value", [1764000000, "2025-11-24T17:00:00+01:00"])
def test_end_of_job_by_configuration(value: object) -> None:
    settings = Settings(ends_at=value)  # type: ignore[arg-type]
    environ = {"SLURM_JOB_END_TIME": "1", "SLURM_JOB_ID": "7"}
    end = JobEnd(1764000000, 1764000000)
    assert end_by_environment(settings, environ) == end


#: What their commands print, as their manuals and users have it.
SAID = {
    "SLURM_JOB_ID": ("squeue", "6 0:10\n7 1-02:03:04\n", 93784),
    "PBS_JOBID": (
        "qstat",
        # More than the process of the tests has run, which counts as well.
        "Job Id: 7\n    resources_used.walltime = 100:00:00\n"
        "    Variable_List = Resource_List.walltime=9\n"
        "    Resource_List.walltime = 110:00:00",
        36000,
    ),
    "LSB_JOBID": ("bjobs", "1:30 L\n", 5400),
}


def say(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    command: str,
    text: str,
    code: int = 0,
) -> None:
    """Make a command that prints a text, and its arguments into a file."""
    path = folder / command
    script = f"echo \"$@\" >> {folder}/asked\ncat <<'.'\n{text}\n.\nexit {code}\n"
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def ask(**environ: str) -> JobEnd | None:
    return asyncio.run(ask_for_end(Settings.load(), environ))


@pytest.mark.parametrize("job", SAID)
def test_batch_systems_are_asked(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, text, left_s = SAID[job]
    say(monkeypatch, tmp_path, command, text)
    end = ask(**{job: "7"})
    assert end is not None
    assert abs(end.at - time.time() - left_s) < 5
    warned_s = 0 if job == "LSB_JOBID" else kill_wait_s(Settings.load(), {job: "7"})
    assert end.killed_at == end.at + warned_s


def test_a_job_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, tmp_path, "bjobs", "1:30 L")
    assert ask(LSB_JOBID="7", LSB_JOBINDEX="3") is not None
    assert (tmp_path / "asked").read_text().split()[-1] == "7[3]"


HOUR_S = 3600


@pytest.mark.parametrize(
    ("job", "command", "text"),
    [
        (
            "JOB_ID",
            "qstat",
            "env_list:   MY=h_rt=5\nhard resource_list:      mem_free=1G,h_rt=3600",
        ),
        (
            "OAR_JOB_ID",
            "oarstat",
            '    wanted_resources = -l "walltime=2:0:0"\n    walltime = 1:0:0',
        ),
        ("_CONDOR_JOB_AD", "cat", "AllowedJobDuration = 3600"),
        ("PBS_JOBID", "qstat", "    Resource_List.walltime = 01:00:00"),
        ("PBS_JOBID", "qstat", "    Walltime.Remaining = 3600"),
    ],
)
def test_batch_systems_that_tell_the_limit(
    job: str, command: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the job's begin counts: that of the processes that have its variable."""
    if command == "cat":  # a file it is, and the command that reads it a real one
        (tmp_path / "ad").write_text(text)
    else:
        say(monkeypatch, tmp_path, command, text)
    began = psutil.Process().create_time()
    end = ask(**{job: str(tmp_path / "ad")})
    assert end is not None
    least = time.time() if "Remaining" in text else began
    assert abs(end.at - least - HOUR_S) < 5


def test_condor_says_when_a_job_began(tmp_path: Path) -> None:
    began = int(time.time()) - 600
    ad = f"JobCurrentStartDate = {began}\nAllowedJobDuration = 3600\n"
    (tmp_path / "ad").write_text(ad)
    end = ask(_CONDOR_JOB_AD=str(tmp_path / "ad"))
    assert end is not None and abs(end.at - began - HOUR_S) < 2


def test_the_earlier_end_holds() -> None:
    lifetime, job = JobEnd(900, 90000), JobEnd(1000, 1028)
    assert earlier(lifetime, job) == earlier(job, lifetime) == JobEnd(900, 1028)
    assert earlier(None, job) == earlier(job, None) == job
    assert earlier(None, None) is None


def test_a_job_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, tmp_path, "squeue", "7 UNLIMITED")
    assert ask(SLURM_JOB_ID="7") is None


@pytest.mark.parametrize("text", ["", "7 NOT_SET", "7 INVALID", "8 1:00"])
def test_no_answer_is_not_no_end(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, tmp_path, "squeue", text)
    with pytest.raises((ValueError, KeyError)):
        ask(SLURM_JOB_ID="7")


def test_what_a_job_has_in_its_environment_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, tmp_path, "qstat", "    Variable_List = TOKEN=secret")
    with pytest.raises(ValueError, match="walltime is told of job 7") as caught:
        ask(PBS_JOBID="7")
    assert "secret" not in str(caught.value)


def test_a_batch_system_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, tmp_path, "squeue", "", 1)
    with pytest.raises(OSError, match="squeue.* ended with 1"):
        ask(SLURM_JOB_ID="7")
    monkeypatch.setattr(job_end, "COMMAND_TIMEOUT_S", 0.2)
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(TimeoutError):
        ask(SLURM_JOB_ID="7")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="squeue"):
        ask(SLURM_JOB_ID="7")


def test_a_batch_system_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure, too; time limits change."""
    say(monkeypatch, tmp_path, "squeue", "", 1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(worker_leaving, "ASK_S", (0.1, 0.1))
    monkeypatch.setattr(worker_leaving, "ASK_FIRST_S", 0.1)
    told: list[Any] = []

    async def check() -> None:
        settings = Settings.load()
        worker: Any = SimpleNamespace(close=None, nanny="", lifetime=None)
        farewell = Farewell(worker, settings, dict, lambda: told.append(farewell.end))
        asking = asyncio.create_task(farewell._ask_for_end())
        async with asyncio.timeout(20):
            while (tmp_path / "asked").read_text().count("\n") < 2:
                await asyncio.sleep(0.05)
            assert told == []
            for left in ("2:00:00", "1:00:00"):
                say(monkeypatch, tmp_path, "squeue", f"7 {left}")
                count = len(told)
                while len(told) == count:
                    await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()

    (tmp_path / "asked").touch()
    asyncio.run(check())
    assert [round((end.at - time.time()) / HOUR_S) for end in told] == [2, 1]


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 20),
        ({"SLURM_JOB_ID": "7"}, 28),
        ({"PBS_JOBID": "7"}, 8),
        ({"LSB_JOBID": "7"}, 8),
        ({"JOB_ID": "7"}, 20),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 28),
    ],
)
def test_time_after_a_signal(environ: dict[str, str], seconds: float) -> None:
    assert kill_wait_s(Settings.load(), environ) == seconds
    assert kill_wait_s(Settings(signal_timeout_s=5), environ) == 5


def test_end_of_job_that_is_none() -> None:
    with pytest.raises(ValueError, match="soon"):
        Settings(ends_at="soon")  # type: ignore[arg-type]


# Listeners that share a port.


def listen(port: int = 0) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(512)
    sock.setblocking(False)
    return sock


@pytest.mark.skipif(not os.path.exists("/proc"), reason="only Linux can")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_connections_go_to_others(which: int) -> None:
    first = listen()
    port = first.getsockname()[1]
    socks = [first, listen(port), listen(port)]

    def connect(count: int) -> list[int]:
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        numbers = []
        for sock in socks:
            accepted = steering.accept_all(sock)
            numbers.append(len(accepted))
            for connection in [*accepted]:
                connection.close()
        for client in clients:
            client.close()
        return numbers

    waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
    accepted = steering.steer_away(socks[which], 2)
    assert accepted is not None
    left = [c for sock in socks for c in steering.accept_all(sock)]
    # Those of the probes that went elsewhere are there, too: at most two.
    assert 30 <= len(left) + len(accepted) <= 32
    counts = connect(200)
    assert counts[which] == 0
    assert sum(counts) == 200
    assert min(counts[i] for i in range(3) if i != which) > 50
    steering.reset(socks[which])
    assert min(connect(200)) > 20
    for sock in [*socks, *waiting, *left, *accepted]:
        sock.close()


# Real clusters.


class Load:
    """Requests in threads, half of them on connections that stay; all of them count."""

    def __init__(self, url: str, n_threads: int = 4) -> None:
        self.count: Counter[int] = Counter()
        self.errors: list[str] = []
        self._url = url
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n % 2 == 0,))
            for n in range(n_threads)
        ]

    def _run(self, keep: bool) -> None:
        with httpx.Client(timeout=30) as client:
            headers = {} if keep else {"connection": "close"}
            while not self._end.is_set():
                try:
                    response = client.post(self._url, headers=headers)
                    self.count[response.status_code] += 1
                except httpx.HTTPError as err:
                    self.errors.append(repr(err))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.more(20)
        return self

    def __exit__(self, *args: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive()
        assert self.errors == []
        assert set(self.count) == {200}

    def more(self, number: int) -> None:
        """Wait for so many more answers."""
        wanted = self.count[200] + number
        poll(lambda: self.count[200] >= wanted, 20)


class Pid:
    """Takes a moment for each request."""

    def __call__(self) -> int:
        time.sleep(0.005)
        return os.getpid()


def deploy(location: str, num_replicas: int = 2) -> serve.Deployment:
    http = {"location": location, "port": free_port()}
    serve.start(detached=True, http_options=http)
    deployment = serve.deployment(name="Pid", num_replicas=num_replicas)(Pid)
    deployment.deploy()
    return deployment


def replicas() -> list[Any]:
    return serve.status().deployments["Pid"].replicas


@pytest.fixture(params=["HeadOnly", "EveryNode"])
def location(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(3, nanny=[True, False, False]) as cluster:
        yield cluster


def test_retired_and_terminated(cluster: ProcessCluster, location: str) -> None:
    with cluster.client() as client:
        deployment = deploy(location)
        pids = client.run(os.getpid)
        bare = {p.pid: p for p in cluster.workers}
        with Load(deployment.url) as load:
            # By SIGTERM: the one with the proxy, or with a replica.
            served = {r.worker for r in replicas()} | {
                p.worker for p in serve.status().proxies
            }
            gone = min(a for a, pid in pids.items() if pid in bare and a in served)
            cluster.terminate(bare[pids[gone]])
            load.more(50)
            poll(lambda: {r.worker for r in replicas()}.isdisjoint({gone}))
            # By a call.
            left = [a for a in pids if a != gone]
            first = min(left, key=lambda a: sum(r.worker == a for r in replicas()))
            (second,) = set(left) - {first}
            assert list(client.retire_workers([second])) == [second]
            load.more(50)
        assert {r.worker for r in replicas()} == {first}
        assert {r.state for r in replicas()} == {"RUNNING"}
        status = serve.status()
        assert status.deployments["Pid"].deaths == []
        assert second not in {proxy.worker for proxy in status.proxies}


def test_own_cluster_made_smaller() -> None:
    with (
        LocalCluster(
            3,
            threads_per_worker=1,
            processes=False,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster),
    ):
        deployment = deploy("EveryNode")
        with Load(deployment.url) as load:
            cluster.scale(1)
            poll(lambda: len(cluster.workers) == 1)
            load.more(50)
        began = time.monotonic()
    assert time.monotonic() - began < 3  # nobody waits for a place to go


def test_actor_of_a_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "LINGER_S", 0.3)
    with (
        LocalCluster(
            2, threads_per_worker=1, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        deploy("NoServer", 1)
        (old,) = replicas()
        actor = client.submit(Pid, actor=True, workers=[old.worker]).result()
        assert client.retire_workers([old.worker]) == {}  # as ever
        (new,) = replicas()
        assert new.worker != old.worker
        time.sleep(0.5)
        # The worker stays after all, and is as good as any other.
        assert list(client.retire_workers([new.worker])) == [new.worker]
        (again,) = replicas()
        assert again.worker == old.worker
        assert again.reason == ""
        assert actor is not None


def test_job_with_an_end() -> None:
    end = time.time() + 24  # of which it leaves for the last quarter
    with ProcessCluster(0) as cluster, cluster.client():
        cluster.env["SLURM_JOB_END_TIME"] = str(end)
        cluster.add_worker("--name", "brief")
        cluster.wait_for_workers(1)
        del cluster.env["SLURM_JOB_END_TIME"]
        deployment = deploy("HeadOnly", 1)
        (old,) = replicas()
        cluster.add_worker()
        with Load(deployment.url) as load:
            poll(lambda: old.worker not in {r.worker for r in replicas()}, 25)
            assert end - 8 < time.time() < end
            load.more(20)
        poll(lambda: len(serve.status().proxies) == 1)
        assert serve.status().proxies[0].worker != old.worker


@pytest.mark.long
def test_lifetimes_of_all_workers_at_once() -> None:
    args = ["--lifetime", "2500ms", "--lifetime-restart"]
    with ProcessCluster(2, worker_args=args) as cluster, cluster.client() as client:
        deployment = deploy("EveryNode")
        pids = set(client.run(os.getpid).values())
        with Load(deployment.url) as load:
            poll(lambda: not pids & {r.pid for r in replicas()}, 25)
            load.more(50)
