"""Health checks: who is ill, who is silent, and what follows."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from distributed import Client
from starlette.requests import Request

import daskserve as serve
from daskserve import pickling
from daskserve.controller.actions import Settle, WatchReplica
from daskserve.controller.health import HealthBoard, note_silence
from daskserve.exceptions import ReplicaDiedError
from daskserve.replica.health import HealthMonitor, _Patient
from daskserve.transport.loops import LoopThread
from daskserve.transport.messages import CANCEL
from tests.test_failures import Storm, processes, workers_of
from tests.test_http import Site, open_site
from tests.test_runner import Replica
from tests.test_state import Rig, address, failure, released, started, stopped, view
from tests.utils import poll

# Who says nothing. A fake clock.


class Board(HealthBoard):
    """One that looks ten times a second."""

    now = 100.0

    def wait(self, seconds: float, *heard: str) -> dict[str, float]:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            for worker in heard:
                self.heard(worker)
            self.look(self.now)
        return {worker: round(s, 1) for worker, s in self.silent.items()}


@pytest.fixture
def board() -> Board:
    board = Board()
    board.look(board.now)
    return board


def test_silent_worker(board: Board) -> None:
    board.heard("a")
    board.report("b", 1.0, 3.0, [])
    assert board.wait(2.9) == {}
    assert board.wait(1) == {"b": 3.9}
    assert board.wait(37) == {"a": 40.9, "b": 40.9}
    board.heard("a")
    assert board.wait(1) == {"b": 41.9}
    board.forget("b")
    assert board.wait(30) == {}
    assert board.wait(60, "a") == {}


def test_time_in_which_the_scheduler_stood_still_does_not_count(board: Board) -> None:
    board.report("a", 1.0, 3.0, [])
    board.now += 1000
    assert board.wait(1.9) == {}
    assert board.wait(1) == {"a": 3.8}  # a second of the thousand


@pytest.mark.parametrize(
    ("workers", "number", "widespread"),
    [(1, 1, True), (2, 1, False), (3, 2, False), (3, 3, True), (9, 4, False)]
    + [(9, 5, True), (100, 49, False), (100, 50, True)],
)
def test_fault_on_our_side(
    board: Board, workers: int, number: int, widespread: bool
) -> None:
    names = [f"w{i}" for i in range(workers)]
    for name in names:
        board.report(name, 1.0, 3.0, [])
    assert len(board.wait(4, *names[number:])) == number
    assert board.widespread == widespread


def test_fault_on_our_side_is_seen_with_the_first_silent_worker(board: Board) -> None:
    for number in range(10):  # they report one after the other, every ten seconds
        board.report(f"w{number}", 10.0, 40.0, [])
        board.wait(1)
    while not board.wait(0.1):
        pass
    assert len(board.silent) == 1
    assert board.widespread
    for number in range(10):
        board.heard(f"w{number}")
    board.wait(0.1)
    assert not board.widespread


def test_troubles_that_are_news(board: Board) -> None:
    ill = (1, False, "ill")
    assert board.report("a", 1.0, 3.0, [ill]) == [ill]
    assert board.report("a", 1.0, 3.0, [list(ill)]) == []  # type: ignore[list-item]
    worse = (1, True, "very ill")
    assert board.report("a", 1.0, 3.0, [worse, (2, False, "ill")]) == [
        worse,
        (2, False, "ill"),
    ]
    assert board.report("a", 1.0, 3.0, [worse]) == [(2, False, "")]


# What follows from it, likewise.


@pytest.fixture
def rig() -> Rig:
    return Rig()


def silent(rig: Rig, seconds: float, *workers: int) -> list[int]:
    """Let workers be silent; return which replicas are given up."""
    for number in workers:
        rig.join(view(number, accepting=False))
    found = {address(number): seconds for number in workers}
    return [n for _, n in rig.state.workers_silent(found, now=rig.now)]


def test_replicas_of_a_silent_worker_are_replaced_elsewhere(rig: Rig) -> None:
    assert rig.healthy() == [1, 2]
    assert silent(rig, 40.0, 1) == []  # a period of 10 s and a timeout of 30 s
    assert silent(rig, 41.0, 1) == [1]
    assert silent(rig, 42.0, 1) == []
    assert rig.routed() == [2]
    actions = rig.reconcile()
    assert released(actions) == [1]
    assert started(actions) == [3]
    assert rig.replica(3)["worker"] == address(3)
    (death,) = rig.status()["deaths"]
    assert death["reason"].startswith(f"worker {address(1)} has said nothing for 41 s")
    rig.start(3)
    assert rig.status()["state"] == "HEALTHY"


def test_patience_is_each_deployments_own(rig: Rig) -> None:
    rig.healthy(num_replicas=1, workers=(address(1),))
    hasty = {"health_check_period_s": 1.0, "health_check_timeout_s": 0.5}
    rig.healthy(
        name="g", route_prefix="/g", num_replicas=1, workers=(address(1),), **hasty
    )
    assert silent(rig, 1.9, 1) == []
    assert silent(rig, 2.1, 1) == [2]  # never less than 2 s
    assert rig.routed() == [1]
    assert rig.routed("g") == []


def test_silent_while_its_replicas_start(rig: Rig) -> None:
    ticket = rig.deploy()
    assert started(rig.reconcile()) == [1, 2]
    rig.state.replica_initializing(2, pid=2, now=rig.now)
    # A constructor may hold the interpreter's lock.
    assert silent(rig, 41, 1, 2) == [1]
    assert started(rig.reconcile()) == [3]
    assert rig.replica(3)["worker"] == address(3)
    assert rig.start(2, 3) == [Settle(ticket)]


def test_silence_shows_in_the_status(rig: Rig) -> None:
    rig.healthy()
    status = note_silence(rig.state.status(now=rig.now), {address(2): 3.2})
    reasons = [replica["reason"] for replica in status["f"]["replicas"]]
    assert reasons == ["", "its worker has said nothing for 3 s"]


def test_draining_replica_of_a_silent_worker(rig: Rig) -> None:
    rig.healthy()
    rig.deploy(num_replicas=1)
    assert stopped(rig.reconcile()) == [2]
    assert silent(rig, 41, 2) == []
    assert released(rig.wait(26)) == [2]


def ill(
    rig: Rig, replica_id: int, *, fatal: bool = True, text: str = "ValueError: db"
) -> None:
    rig.state.replica_ill(replica_id, fatal=fatal, text=text, now=rig.now)


def test_first_failures_only_show(rig: Rig) -> None:
    rig.healthy()
    ill(rig, 1, fatal=False)
    assert rig.reconcile() == []
    assert rig.replica(1)["reason"] == "ValueError: db"
    assert rig.routed() == [1, 2]
    assert rig.status()["state"] == "HEALTHY"
    ill(rig, 1, fatal=False, text="")
    assert rig.replica(1)["reason"] == ""


def test_ill_replica_is_replaced(rig: Rig) -> None:
    rig.healthy()
    rig.now += 1000
    ill(rig, 1)
    assert rig.routed() == [2]
    ill(rig, 1)  # said again until it is gone
    actions = rig.reconcile()
    assert stopped(actions) == [1]
    assert started(actions) == [3]
    assert [d["reason"] for d in rig.status()["deaths"]] == ["ValueError: db"]
    assert rig.status()["state"] == "UNHEALTHY"
    rig.start(3)
    assert released(rig.stop(1)) == [1]
    assert rig.status()["state"] == "HEALTHY"


def test_back_off_of_one_that_falls_ill_again_and_again(rig: Rig) -> None:
    rig.healthy(num_replicas=1)
    rig.now += 1000
    replica_id, delays = 1, []
    for _ in range(12):
        ill(rig, replica_id)
        actions = rig.reconcile()
        if not started(actions):
            (pending,) = [
                r for r in rig.status()["replicas"] if r["state"] == "PENDING"
            ]
            delay = float(pending["reason"].split()[1])
            assert pending["reason"].endswith("s for another try after ValueError: db")
            assert started(rig.wait(delay - 0.01)) == []
            actions = rig.wait(0.02)
            delays.append(delay)
        (replica_id,) = started(actions)
        rig.start(replica_id)
        rig.wait(30)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30]
    rig.wait(131)
    ill(rig, replica_id)  # it had been well for long
    assert started(rig.reconcile()) != []


def test_replica_that_falls_ill_while_deployed_counts_as_failed(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.deploy(version="2", code=b"new")
    (first, second) = started(rig.reconcile())
    for _ in range(6):
        rig.start(first)
        ill(rig, first)
        actions = rig.wait(6)
        if not started(actions):
            break
        (first,) = started(actions)
    assert "ValueError: db" in failure(actions, ticket).text
    assert rig.routed() == [1, 2]
    assert rig.replica(second)["state"] == "STOPPING"


def test_ill_at_the_wrong_time(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    ill(rig, 1)
    assert started(rig.reconcile()) == [1]
    ill(rig, 1)
    assert rig.reconcile() == []
    assert rig.status()["deaths"] == []


def test_other_rhythm_is_told(rig: Rig) -> None:
    rig.healthy()
    rig.deploy(health_check_period_s=1.0, health_check_timeout_s=2.0)
    told = [a for a in rig.reconcile() if isinstance(a, WatchReplica)]
    assert told == [WatchReplica(n, address(n), 1.0, 2.0, 600.0) for n in (1, 2)]
    rig.deploy(
        health_check_period_s=1.0,
        health_check_timeout_s=2.0,
        abandoned_call_timeout_s=None,
    )
    told = [a for a in rig.reconcile() if isinstance(a, WatchReplica)]
    assert told == [WatchReplica(n, address(n), 1.0, 2.0, None) for n in (1, 2)]


# The checks themselves: a replica and a monitor, no cluster.


class Watched(Replica):
    """A replica, and what is reported of it."""

    def __init__(
        self, target: Any, period_s: float, timeout_s: float, **options: Any
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        #: Wakes the monitor, once there is one.
        self.wake: Callable[[], None] = lambda: None
        super().__init__(
            target,
            health_check_period_s=period_s,
            health_check_timeout_s=timeout_s,
            busy_changed=lambda: self.wake(),
            **options,
        )

    def troubles(self) -> list[tuple[bool, str]]:
        """Return what was reported, each once."""
        found = [t[1:] for m in list(self.messages) for t in m["troubles"]]
        return list(dict.fromkeys(found))

    def text(self) -> str:
        """Wait until it must be replaced, and return why."""
        fatal = poll(lambda: [t for f, t in self.troubles() if f])
        return str(fatal[0])


Watch = Callable[..., Watched]

#: Events that code of replicas waits for, which cannot travel in it.
GATES: dict[str, threading.Event] = {}


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Give a function that starts a replica and its checks."""
    ends: list[Callable[[], object]] = []

    def watch(
        target: Any, period_s: float = 0.1, timeout_s: float = 0.3, **options: Any
    ) -> Watched:
        replica = Watched(target, period_s, timeout_s, **options)
        thread = LoopThread("daskserve-test-health")
        thread.start()
        monitor = HealthMonitor({1: replica.runner}, replica.messages.append)
        replica.wake = lambda: thread.call_soon(monitor.wake)
        thread.submit(monitor.run())
        ends.extend([thread.stop, replica.runner.abandon])
        return replica

    yield watch
    for end in ends:
        end()


def test_report_of_a_replica_that_is_well(watch: Watch) -> None:
    class Well: ...

    replica = watch(Well, period_s=1.5, timeout_s=3)
    poll(lambda: replica.messages)
    assert replica.messages[0] == {
        "op": "serve-health",
        "period_s": 1.5,
        "patience_s": 4.5,
        "files": "",
        "troubles": [],
    }


def test_worker_without_replicas_reports() -> None:
    messages: list[dict[str, Any]] = []
    thread = LoopThread("daskserve-test-health")
    thread.start()
    thread.submit(HealthMonitor({}, messages.append).run())
    poll(lambda: messages)
    thread.stop()
    assert messages == [
        {
            "op": "serve-health",
            "period_s": 10.0,
            "patience_s": 40.0,
            "files": "",
            "troubles": [],
        }
    ]


def test_blocked_loop_is_ill_and_says_where(watch: Watch) -> None:
    class Blocks:
        async def __call__(self) -> None:
            self.block()

        def block(self) -> None:
            time.sleep(1)

    replica = watch(Blocks)
    replica.request()
    text = replica.text()
    line = Blocks.block.__code__.co_firstlineno + 1
    assert text == (
        "its event loop did not answer for 0.3 s: blocking code in an async method at "
        f"{__file__}:{line} in block()"
    )


def test_library_call_that_blocks_is_named_with_its_caller(watch: Watch) -> None:
    async def wait() -> None:
        threading.Event().wait(2)

    replica = watch(wait)
    replica.request()
    text = replica.text()
    assert f"{__file__}:{wait.__code__.co_firstlineno + 1} in wait() (in " in text
    assert "threading.py" in text


def test_busy_replica_is_well(watch: Watch) -> None:
    """Its sync thread is taken for longer than a check may last: none is made."""

    class Busy:
        def __init__(self) -> None:
            self.checks = 0

        def __call__(self) -> int:
            before = self.checks
            time.sleep(0.8)
            return self.checks - before

        def count(self) -> int:
            return self.checks

        def check_health(self) -> None:
            self.checks += 1

    replica = watch(Busy)
    assert replica.result(replica.call()) == 0
    checks = replica.result(replica.call("count"))
    poll(lambda: replica.result(replica.call("count")) > checks)
    assert replica.troubles() == []


class Stuck:
    """Its calls wait for what nobody sets but the test."""

    def __call__(self, gate: str = "go") -> None:
        GATES["begun"].set()
        GATES[gate].wait(20)

    def check_health(self) -> None: ...


LINE = Stuck.__call__.__code__.co_firstlineno + 2
PLACE = rf"it is at {__file__}:{LINE} in __call__\(\) \(in .*threading.py.*\)"


@pytest.fixture
def gates() -> Iterator[dict[str, threading.Event]]:
    for name in ("begun", "go", "other", "ill"):
        GATES[name] = threading.Event()
    yield GATES
    for gate in GATES.values():
        gate.set()


Gates = dict[str, threading.Event]


class Counts(Stuck):
    """Counts its checks."""

    checks = 0

    def count(self) -> int:
        return self.checks

    def check_health(self) -> None:
        self.checks += 1


def test_check_while_one_of_two_threads_is_busy(watch: Watch, gates: Gates) -> None:
    replica = watch(Counts, threads=2)
    held = replica.call()
    assert gates["begun"].wait(10)
    checks = replica.result(replica.call("count"))
    poll(lambda: replica.result(replica.call("count")) > checks + 1)
    gates["go"].set()
    assert replica.result(held) is None
    assert replica.troubles() == []


def test_check_that_was_passed_over_is_not_a_good_one(watch: Watch) -> None:
    """What failed twice before and after a long call has not failed once only."""

    class Ill:
        asked = 0

        def __call__(self) -> None:
            time.sleep(0.5)

        def check_health(self) -> None:
            self.asked += 1
            if self.asked > 1:
                raise LookupError("no database")

    replica = watch(Ill, period_s=0.2)
    poll(lambda: [t for _, t in replica.troubles() if "1 of 3" in t])
    replica.result(replica.call())
    assert "3 of 3 times" in replica.text()
    troubles = [m["troubles"] for m in replica.messages]
    first = next(n for n, found in enumerate(troubles) if found)
    assert [] not in troubles[first:]


@pytest.mark.parametrize("kind", ["async", "false"])
def test_check_that_fails(watch: Watch, kind: str) -> None:
    class Sync:
        ill = False

        def set(self, ill: bool) -> None:
            self.ill = ill

        def check_health(self) -> bool | None:
            if self.ill and kind == "false":
                return False
            if self.ill:
                raise LookupError("no database")
            return None

    class Async(Sync):
        async def check_health(self) -> bool | None:  # type: ignore[override]
            return super().check_health()

    replica = watch(Async if kind == "async" else Sync)
    poll(lambda: len(replica.messages) > 3)
    assert replica.troubles() == []
    replica.result(replica.call("set", True))
    text = replica.text()
    what = "RuntimeError: check_health() returned False"
    if kind != "false":
        what = "LookupError: no database"
    assert text == f"check_health() failed 3 of 3 times in a row, with {what}"
    assert [fatal for fatal, _ in replica.troubles()] == [False, False, True]
    replica.result(replica.call("set", False))
    poll(lambda: replica.messages[-1]["troubles"] == [])


@pytest.mark.parametrize(
    ("error", "is_async"),
    [(SystemExit, True), (asyncio.CancelledError, True), (StopIteration, False)],
)
def test_check_that_raises_what_is_no_exception(
    watch: Watch, error: type[BaseException], is_async: bool
) -> None:
    class Sync:
        asked = 0

        def check_health(self) -> None:
            self.asked += 1
            if self.asked > 1:
                raise error

    class Async(Sync):
        async def check_health(self) -> None:  # type: ignore[override]
            super().check_health()

    replica = watch(Async if is_async else Sync)
    assert "3 of 3 times" in replica.text()


@pytest.mark.parametrize("kind", ["async", "sync", "blocking"])
def test_check_that_does_not_end(watch: Watch, kind: str) -> None:
    class Sync:
        asked = 0

        def check_health(self) -> None:
            self.asked += 1
            if self.asked > 1:
                time.sleep(1.5)

    class Async(Sync):
        async def check_health(self) -> None:  # type: ignore[override]
            self.asked += 1
            if self.asked > 1:
                await asyncio.sleep(1.5)

    class Blocking(Sync):
        async def check_health(self) -> None:  # type: ignore[override]
            super().check_health()

    target = {"async": Async, "sync": Sync, "blocking": Blocking}[kind]
    text = watch(target).text()
    assert text.startswith("check_health() did not end within 0.3 s")
    line = Sync.check_health.__code__.co_firstlineno + 3
    place = f": it is at {__file__}:{line} in check_health()"
    assert text.endswith(place) == (kind != "async")


def leave(replica: Watched, *args: str) -> None:
    """Desert a call once it runs."""
    GATES["begun"].clear()
    called = replica.call("__call__", *args)
    assert GATES["begun"].wait(10)
    replica.runner.put(replica.caller, [(CANCEL, called, 1)])


def test_call_that_nobody_waits_for_is_named(watch: Watch, gates: Gates) -> None:
    """Long before the next check, and only as long as it runs."""
    replica = watch(Stuck, period_s=60, timeout_s=60)
    before = datetime.now().astimezone().replace(microsecond=0)
    leave(replica)
    ((fatal, text),) = poll(replica.troubles)
    assert not fatal
    found = re.fullmatch(
        rf"busy since (.*) with a call that nobody waits for: {PLACE}", text
    )
    assert found is not None
    assert timedelta() <= datetime.fromisoformat(found[1]) - before <= timedelta(0, 10)
    gates["go"].set()
    poll(lambda: replica.messages[-1]["troubles"] == [])
    assert replica.troubles() == [(False, text)]


def test_of_calls_that_nobody_waits_for_the_oldest_is_named(
    watch: Watch, gates: Gates
) -> None:
    replica = watch(Stuck, period_s=60, timeout_s=60, threads=2)
    leave(replica)
    first = poll(replica.troubles)
    time.sleep(1.1)  # another second is written down
    leave(replica, "other")
    gates["go"].set()
    poll(lambda: [t for t in replica.troubles() if t not in first])
    assert not [fatal for fatal, _ in replica.troubles() if fatal]
    gates["other"].set()
    poll(lambda: replica.messages[-1]["troubles"] == [])


def test_call_that_somebody_waits_for_is_no_trouble(watch: Watch, gates: Gates) -> None:
    replica = watch(Stuck, abandoned_call_timeout_s=0.1)
    called = replica.call()
    assert gates["begun"].wait(10)
    number = len(replica.messages)
    poll(lambda: len(replica.messages) > number + 10)
    assert replica.troubles() == []
    gates["go"].set()
    assert replica.result(called) is None


@pytest.mark.parametrize("period_s", [0.1, 60.0])
def test_call_that_nobody_waits_for_has_a_limit(
    watch: Watch, gates: Gates, caplog: pytest.LogCaptureFixture, period_s: float
) -> None:
    replica = watch(
        Stuck, period_s=period_s, timeout_s=60, abandoned_call_timeout_s=1.5
    )
    began = time.monotonic()
    leave(replica)
    text = replica.text()
    assert time.monotonic() - began >= 1.4
    assert re.fullmatch(
        "a call that nobody waits for has run on for 1.5 s "
        rf"\(abandoned_call_timeout_s\): {PLACE}",
        text,
    )
    logged = [r.message for r in caplog.records if r.name == "daskserve.replica.health"]
    assert logged == [f"Replica D#1 is to be replaced: {text}"]


def test_limit_may_change(watch: Watch, gates: Gates) -> None:
    replica = watch(Stuck, period_s=60, timeout_s=60)
    leave(replica)
    poll(replica.troubles)
    replica.runner.abandoned_call_timeout_s = 0.6
    replica.wake()
    assert "has run on for 0.6 s" in replica.text()


def test_calls_that_end_soon_after_they_were_left_are_not_told() -> None:
    runner = Abandons()
    patient = _Patient(runner, now=100.0)
    assert patient.look_for_abandoned(100.0) == math.inf
    runner.abandoned = 100.0, threading.get_ident()
    assert patient.look_for_abandoned(100.25) == 100.5
    assert patient.all_troubles() is None
    assert patient.look_for_abandoned(100.5) == 110.0
    assert patient.all_troubles() is not None
    runner.abandoned = 100.375, threading.get_ident()  # that one ended, another runs
    assert patient.look_for_abandoned(100.75) == 100.875
    assert patient.all_troubles() is None
    runner.abandoned_call_timeout_s = None
    assert patient.look_for_abandoned(1e6) == math.inf
    assert patient.all_troubles() is not None


class Abandons:
    """A replica with a call that nobody waits for."""

    tag = "D#1"
    rhythm = (1.0, 1.0)
    checkable = True
    abandoned: tuple[float, int] | None = None
    abandoned_call_timeout_s: float | None = 10.0

    def check_health(self, began: Callable[[], None]) -> Future[bool]:
        raise NotImplementedError

    def thread_ids(self) -> list[int | None]:
        return []


class FallsIll(Stuck):
    """Has an async check, which needs no thread."""

    async def check_health(self) -> None:  # type: ignore[override]
        if GATES["ill"].is_set():
            raise LookupError("no database")


def test_check_fails_and_a_call_runs_for_nobody(watch: Watch, gates: Gates) -> None:
    replica = watch(FallsIll)
    leave(replica)
    poll(replica.troubles)
    gates["ill"].set()
    text = replica.text()
    assert text.startswith("check_health() failed 3 of 3 times in a row")
    assert "; busy since" in text


def test_class_that_has_any_attribute(watch: Watch) -> None:
    class Any_:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    replica = watch(Any_)
    poll(lambda: len(replica.messages) > 3)
    assert replica.troubles() == []


def test_ill_from_the_beginning() -> None:
    class Ill:
        def check_health(self) -> None:
            raise LookupError("no database")

    replica = Replica(Ill)
    assert "LookupError: no database" in replica.wait_for("failed")["text"]
    replica.runner.close()


def test_checks_begin_with_reconfigure_over(watch: Watch) -> None:
    """A configuration may take its time: `deploy_timeout_s` watches over that."""

    class Slow:
        async def reconfigure(self, config: object) -> None:
            time.sleep(0.8)  # noqa: ASYNC251

    replica = watch(Slow)
    poll(lambda: len(replica.messages) > 2)
    replica.runner.reconfigure(pickling.dumps(1, what="it"), 2)
    replica.wait_for("reconfigured")
    assert replica.troubles() == []


# All of it, on a cluster.

QUICK = {"health_check_period_s": 0.1, "health_check_timeout_s": 1.9}


class Mixed:
    """Falls ill, or blocks its loop, when asked to."""

    def __init__(self) -> None:
        self.ill = False

    async def __call__(self, request: Request) -> int:
        if "block" in request.query_params:
            time.sleep(2.5)  # noqa: ASYNC251
        self.ill = self.ill or "ill" in request.query_params
        while "held" in request.query_params:
            await asyncio.sleep(0.01)
        return os.getpid()

    def check_health(self) -> None:
        if self.ill:
            raise LookupError("no database")


def replicas_at(client: Client, worker: str) -> list[str]:
    """Return the replicas and the actors that there are on a worker."""

    def look(dask_worker: Any) -> list[str]:
        runners = dask_worker.plugins["daskserve"].runners.values()
        return [r.tag for r in runners] + [str(k) for k in dask_worker.state.actors]

    found: list[str] = client.run(look, workers=[worker])[worker]
    return found


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site(4) as site:
        yield site


@pytest.mark.long
def test_ill_blocked_and_stopped_workers(site: Site) -> None:
    with ThreadPoolExecutor(24) as pool:
        others = sorted(set(processes(site)) - {site.near})
        deployment = site.make(Mixed, num_replicas=2, workers=others, **QUICK)
        deployment.deploy()
        url = site.at(deployment)

        def reason(number: int) -> str:
            """Wait for a death, and for full strength again, and return the reason."""

            def look() -> str | None:
                status = serve.status().deployments[deployment.name]
                whole = len(status.deaths) == number and status.state == "HEALTHY"
                return status.deaths[-1].reason if whole else None

            return poll(look, 10)

        with Storm(url) as storm:
            assert httpx.get(url, params={"ill": 1}).status_code == 200
            assert "LookupError: no database" in reason(1)
            assert "3 of 3 times" in reason(1)
            blocked = pool.submit(httpx.post, url, params={"block": 1}, timeout=20)
            line = Mixed.__call__.__code__.co_firstlineno + 2
            assert f"{__file__}:{line} in __call__()" in reason(2)
            assert blocked.result().status_code in (200, 502)

            victim = min(workers_of(deployment))
            process = processes(site)[victim]
            asked = {"held": 1}
            # So many that neither replica gets them all, however quick it is.
            held = [
                pool.submit(httpx.post, url, params=asked, timeout=20)
                for _ in range(20)
            ]
            storm.wait(50)
            process.send_signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                assert f"worker {victim} has said nothing for" in reason(3)
                assert time.monotonic() - began < 6
                assert victim not in workers_of(deployment)
                # Those in the other replica go on.
                lost = poll(lambda: [job for job in held if job.done()])
                assert [job.result().status_code for job in lost] == [502] * len(lost)
                assert len(lost) < 20
                storm.wait(50)
            finally:
                process.send_signal(signal.SIGCONT)
            poll(lambda: replicas_at(site.client, victim) == [])
            # It is as good as any other again.
            deployment.options(num_replicas=3).deploy()
            assert victim in workers_of(deployment)
            storm.wait(50)
        assert storm.errors == []
        assert set(storm.statuses) == {200}
        assert "died" in str(serve.status())
    deployment.delete()


def test_killed_worker_with_calls_in_it(site: Site) -> None:
    class Holds:
        async def __call__(self) -> None:
            await asyncio.sleep(30)

    others = sorted(set(processes(site)) - {site.near})
    deployment = site.deploy(Holds, workers=others)
    handle = deployment.get_handle()
    calls = [handle.remote() for _ in range(10)]
    with pytest.raises(TimeoutError):
        calls[0].result(timeout_s=0.3)
    (worker,) = workers_of(deployment)
    site.cluster.kill(processes(site)[worker])
    began = time.monotonic()
    for call in calls:
        with pytest.raises(ReplicaDiedError):
            call.result(timeout_s=10)
    assert time.monotonic() - began < 1  # nobody waits for a connection
    deployment.delete()


def test_constructor_that_ends_its_process(site: Site) -> None:
    """It takes down one of the workers where it may run; replicas elsewhere go on."""

    class Leaves:
        def __init__(self) -> None:
            os._exit(1)

    beside = site.deploy(Mixed, where="near")
    others = sorted(set(processes(site)) - {site.near})
    deployment = site.make(Leaves, workers=others, deploy_timeout_s=2)
    with pytest.raises(serve.ServeError, match="left the cluster"):
        deployment.deploy()
    assert httpx.get(site.at(beside)).status_code == 200
    [death] = serve.status().deployments[deployment.name].deaths
    assert death.worker in others
    for process in list(site.cluster.workers):  # they have ended as they should
        if process.poll() is not None:
            site.cluster.workers.remove(process)
