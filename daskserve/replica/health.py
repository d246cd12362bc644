"""Health checks of the replicas on a worker, and the sign that it lives itself.

Runs on the worker's transport thread, which no user code runs on but what calls itself
middleware. A check goes to the replica's own loop, as requests do, so a loop that user
code blocks does not answer; a sync method that takes long blocks no loop, and its
replica is busy and not ill: a sync ``check_health`` is made while a thread is idle.
What is found goes to the controller in one message for all replicas, and comes as often
as the most frequent of their checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from daskserve.transport.messages import (
    IDLE_PATIENCE_S,
    IDLE_PERIOD_S,
    LEAST_PATIENCE_S,
    STREAM_HEALTH,
)

logger = logging.getLogger(__name__)

#: How often in a row `check_health` may raise before the replica is replaced. One that
#: does not answer at all has been waited for long enough.
MOST_FAILURES = 3
#: Reports and checks are no more frequent.
LEAST_PERIOD_S = 0.1
#: A check waits in pieces, and a piece in which this process stood still is only one.
_PIECE_S = 1.0

_PACKAGE = Path(__file__).parents[1]
#: Where code lives that is not the user's.
_LIBRARIES = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
)


class Checkable(Protocol):
    """What is asked for of a replica's runner."""

    @property
    def tag(self) -> str:
        """The replica's name."""

    @property
    def rhythm(self) -> tuple[float, float]:
        """Seconds between two checks, and seconds that one may take."""

    @property
    def checkable(self) -> bool:
        """Whether it takes requests, and so should answer."""

    def check_health(self, began: Callable[[], None]) -> Future[bool]:
        """Call `began` and the user's ``check_health`` on the replica's loop.

        False comes back if that was passed over, for all threads of sync code are busy.
        """

    def thread_ids(self) -> list[int | None]:
        """Return its loop's thread, and that of a sync check if one runs."""


class _Patient:
    """What is known of one replica."""

    def __init__(self, runner: Checkable, now: float) -> None:
        self.runner = runner
        self.failures = 0
        self.due = now + runner.rhythm[0]
        self.task: asyncio.Task[None] | None = None
        #: Whether it must be replaced, and what is wrong with it.
        self.trouble: tuple[bool, str] | None = None


class HealthMonitor:
    """Check all replicas of a worker, each in its own rhythm.

    Parameters
    ----------
    runners
        The replicas by number; others add and remove them.
    send
        Sends a message to the controller.
    """

    def __init__(
        self, runners: Mapping[int, Checkable], send: Callable[[dict[str, Any]], None]
    ) -> None:
        self._runners = runners
        self._send = send
        self._patients: dict[int, _Patient] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look at what replicas there are, for another one has come."""
        self._wake.set()

    async def run(self) -> None:
        """Check and report for ever."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            try:
                period_s = self._look(loop.time())
                self._send(self._report(period_s))
            except Exception:  # it may have been a replica that is just ending
                logger.exception("The health checks failed")
                period_s = 1.0
            await asyncio.sleep(LEAST_PERIOD_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period_s - LEAST_PERIOD_S):
                    await self._wake.wait()

    def _look(self, now: float) -> float:
        """Begin the checks that are due; return when to look again."""
        runners = dict(self._runners)
        for replica_id in self._patients.keys() - runners.keys():
            self._drop(replica_id)
        periods = [r.rhythm[0] for r in runners.values()]
        period_s = max(LEAST_PERIOD_S, min(periods, default=IDLE_PERIOD_S))
        for replica_id, runner in runners.items():
            patient = self._patients.get(replica_id)
            if not runner.checkable:
                if patient is not None:
                    self._drop(replica_id)
            elif patient is None:
                self._patients[replica_id] = _Patient(runner, now)
            elif patient.task is None and now + period_s / 2 >= patient.due:
                patient.due = now + runner.rhythm[0]
                patient.task = asyncio.ensure_future(self._check(patient))
        return period_s

    def _drop(self, replica_id: int) -> None:
        patient = self._patients.pop(replica_id)
        if patient.task is not None:
            patient.task.cancel()

    def _report(self, period_s: float) -> dict[str, Any]:
        sums = [sum(p.runner.rhythm) for p in self._patients.values()]
        return {
            "op": STREAM_HEALTH,
            "period_s": period_s,
            "patience_s": max(LEAST_PATIENCE_S, min(sums, default=IDLE_PATIENCE_S)),
            "troubles": [
                (replica_id, *patient.trouble)
                for replica_id, patient in self._patients.items()
                if patient.trouble is not None
            ],
        }

    async def _check(self, patient: _Patient) -> None:
        trouble = await self._examine(patient)
        patient.task = None
        if trouble != patient.trouble:
            if trouble is not None:
                tag = patient.runner.tag
                logger.warning("Replica %s failed a health check: %s", tag, trouble[1])
            patient.trouble = trouble
            self._wake.set()

    async def _examine(self, patient: _Patient) -> tuple[bool, str] | None:
        runner, timeout_s = patient.runner, patient.runner.rhythm[1]
        begun: list[bool] = []
        try:
            check = runner.check_health(lambda: begun.append(True))
        except RuntimeError as err:
            return True, f"its event loop has ended: {err}"
        if not await _done_within(check, timeout_s):
            where = _where_blocked(runner.thread_ids())
            check.cancel()
            if begun:
                at = f": it is at {where}" if where else ""
                return True, f"check_health() did not end within {timeout_s:g} s{at}"
            at = f": blocking code in an async method at {where}" if where else ""
            return True, f"its event loop did not answer for {timeout_s:g} s{at}"
        error = _error_of(check)
        if error is None:
            if not check.result():
                return patient.trouble  # nothing is known beyond what was
            patient.failures = 0
            return None
        patient.failures += 1
        text = "".join(traceback.format_exception_only(error)).strip()
        times = f"{patient.failures} of {MOST_FAILURES} times"
        fatal = patient.failures >= MOST_FAILURES
        return fatal, f"check_health() failed {times} in a row, with {text}"


async def _done_within(job: Future[bool], timeout_s: float) -> bool:
    """Wait for a check; time in which the whole process stood still hardly counts."""
    waiting = asyncio.wrap_future(job)
    waiting.add_done_callback(_look_at)
    left, piece_s = timeout_s, min(_PIECE_S, timeout_s / 10)
    while left > 0 and not job.done():
        await asyncio.wait([waiting], timeout=piece_s)
        left -= piece_s
    return job.done()


def _look_at(future: asyncio.Future[bool]) -> None:
    """Keep asyncio from saying that nobody has looked at an exception."""
    if not future.cancelled():
        future.exception()


def _error_of(job: Future[bool]) -> BaseException | None:
    if job.cancelled():
        return asyncio.CancelledError()
    return job.exception()


def _where_blocked(thread_ids: list[int | None]) -> str:
    """Say what user code runs on some threads, by file, line and function.

    Returns
    -------
    str
        Of the first thread that runs anything; "" if all wait for events.
    """
    running = sys._current_frames()
    for ident in thread_ids:
        frames = list(_frames(running.get(ident or 0)))
        own = [frame for frame in frames if not _is_library(frame)]
        if own:
            inner = "" if own[0] is frames[0] else f" (in {_place(frames[0])})"
            return _place(own[0]) + inner
    return ""


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    ours = Path(name).is_relative_to(_PACKAGE)
    return ours or name.startswith((*_LIBRARIES, "<frozen "))


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}()"
