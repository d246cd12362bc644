"""Health checks of the replicas on a worker, and the sign that it lives itself.

Runs on the worker's transport thread, which no user code runs on but what calls itself
middleware. A check goes to the replica's own loop, as requests do, so a loop that user
code blocks does not answer; a sync method that takes long blocks no loop, and its
replica is busy and not ill: a sync ``check_health`` is made while a thread is idle.
What is found goes to the controller in one message for all replicas, and comes as often
as the most frequent of their checks; and at once, when a call that nobody waits for any
more keeps a thread busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeAlias

from daskserve.transport.files import FileWatch
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
#: A call that nobody waits for is hardly worth a word before: most end soon.
NAMED_AFTER_S = 0.5
#: A check waits in pieces, and a piece in which this process stood still is only one.
_PIECE_S = 1.0

_PACKAGE = Path(__file__).parents[1]
#: Where code lives that is not the user's.
_LIBRARIES = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
)


#: Whether a replica must be replaced, and what is wrong with it.
Trouble: TypeAlias = tuple[bool, str]


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

    @property
    def abandoned(self) -> tuple[float, int] | None:
        """Since when nobody waits for a sync call that runs on, and on which thread."""

    @property
    def abandoned_call_timeout_s(self) -> float | None:
        """For how many seconds that may be; None: for ever."""


class _Patient:
    """What is known of one replica."""

    def __init__(self, runner: Checkable, now: float) -> None:
        self.runner = runner
        self.failures = 0
        self.due = now + runner.rhythm[0]
        self.task: asyncio.Task[None] | None = None
        #: Whether it must be replaced, and what is wrong with it.
        self.trouble: Trouble | None = None
        #: Likewise, of the call that nobody waits for.
        self.abandoned: Trouble | None = None
        #: Since when there is one, by the loop's clock and in words.
        self._since = 0.0, ""

    def all_troubles(self) -> Trouble | None:
        """Return both in one."""
        found = [t for t in (self.trouble, self.abandoned) if t is not None]
        if not found:
            return None
        return any(fatal for fatal, _ in found), "; ".join(text for _, text in found)

    def look_for_abandoned(self, now: float) -> float:
        """See whether a call runs that nobody waits for; return when to look again."""
        runner, found = self.runner, self.runner.abandoned
        if found is None:
            self.abandoned = None
            return math.inf
        since, thread = found
        limit_s = runner.abandoned_call_timeout_s
        where = _where_blocked([thread])
        at = f": it is at {where}" if where else ""
        if limit_s is not None and now - since >= limit_s:
            text = (
                f"a call that nobody waits for has run on for {limit_s:g} s "
                f"(abandoned_call_timeout_s){at}"
            )
            if self.abandoned is None or not self.abandoned[0]:
                logger.warning("Replica %s is to be replaced: %s", runner.tag, text)
            self.abandoned = True, text
            return math.inf
        if now - since < NAMED_AFTER_S:
            self.abandoned = None
            return since + NAMED_AFTER_S
        if self._since[0] != since:  # written down once, for clocks do not agree
            began = datetime.now().astimezone() - timedelta(seconds=now - since)
            self._since = since, began.isoformat(" ", "seconds")
        text = f"busy since {self._since[1]} with a call that nobody waits for{at}"
        self.abandoned = False, text
        return math.inf if limit_s is None else since + limit_s


class HealthMonitor:
    """Check all replicas of a worker, each in its own rhythm.

    Parameters
    ----------
    runners
        The replicas by number; others add and remove them.
    send
        Sends a message to the controller.
    where
        How people know this process.
    """

    def __init__(
        self,
        runners: Mapping[int, Checkable],
        send: Callable[[dict[str, Any]], None],
        where: str = "a worker",
    ) -> None:
        self._files = FileWatch(where)
        self._runners = runners
        self._send = send
        self._patients: dict[int, _Patient] = {}
        self._wake = asyncio.Event()
        #: What was said last, and when it is to be said again.
        self._reported: dict[str, Any] = {}
        self._report_at = 0.0

    def wake(self) -> None:
        """Look at the replicas: there is another one, or one is no longer as it was."""
        self._wake.set()

    async def run(self) -> None:
        """Check and report for ever."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            try:
                again_at = self._look_and_report(loop.time())
            except Exception:  # it may have been a replica that is just ending
                logger.exception("The health checks failed")
                again_at = loop.time() + 1.0
            await asyncio.sleep(LEAST_PERIOD_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(again_at):
                    await self._wake.wait()

    def _look_and_report(self, now: float) -> float:
        """Look, and say so if it is time or news; return when to look again."""
        period_s = self._begin_checks(now)
        news_at = min(
            (p.look_for_abandoned(now) for p in self._patients.values()),
            default=math.inf,
        )
        report = self._report(period_s, now)
        if report != self._reported or now + LEAST_PERIOD_S / 2 >= self._report_at:
            self._send(report)
            self._reported, self._report_at = report, now + period_s
        return min(news_at, self._report_at)

    def _begin_checks(self, now: float) -> float:
        """Begin the checks that are due; return the period of the most frequent."""
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

    def _report(self, period_s: float, now: float) -> dict[str, Any]:
        sums = [sum(p.runner.rhythm) for p in self._patients.values()]
        return {
            "op": STREAM_HEALTH,
            "period_s": period_s,
            "patience_s": max(LEAST_PATIENCE_S, min(sums, default=IDLE_PATIENCE_S)),
            "files": self._files.look(now),
            "troubles": [
                (replica_id, *trouble)
                for replica_id, patient in self._patients.items()
                if (trouble := patient.all_troubles()) is not None
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

    async def _examine(self, patient: _Patient) -> Trouble | None:
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
