"""A worker that is about to close, or to be killed, says so first. Worker process.

`Worker.close` and SIGTERM wait until the controller has moved elsewhere what runs here,
for as long as whoever ends the worker has patience. `Worker.close_gracefully`, which
``--lifetime`` calls, asks the scheduler by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from distributed import Worker
from distributed.core import Status

from daskserve.config import Settings
from daskserve.job_end import (
    JobEnd,
    ask_for_end,
    batch_system,
    earlier,
    end_by_environment,
    end_by_lifetime,
    kill_wait_s,
)
from daskserve.nanny import REPEATED_S
from daskserve.transport.messages import OP_LEAVE

logger = logging.getLogger(__name__)

#: Of the time that a worker has for closing, what it keeps for that itself: so much of
#: it, and so many seconds at most.
CLOSING_SHARE, CLOSING_S = 0.3, 2.0
#: For so long before it is killed, a worker says how long its requests take: in
#: seconds, and as a part of its time at most; and how often.
NEAR_S, NEAR_SHARE, TELL_S = 180.0, 0.5, 3.0
DAY_S = 86400
#: Ends that are closer to each other, in seconds, are the same.
SAME_S = 5.0
#: A batch system is asked again after this part of what is left, within limits: time
#: limits change, and a thousand workers ask.
ASK_AFTER, ASK_S = 0.25, (30.0, 300.0)
#: When it is asked first, by then at the latest.
ASK_FIRST_S = 3.0


class Farewell:
    """What a worker does before it goes.

    Parameters
    ----------
    worker
        The worker.
    settings
        How long things may take.
    needs_s
        Returns how long what each replica has in progress may take, by its number.
    tell_end
        Tells the controller of `end`; on the worker's loop.
    """

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        needs_s: Callable[[], dict[int, float]],
        tell_end: Callable[[], None],
    ) -> None:
        self._lifetime = end_by_lifetime(worker)
        #: When the worker's job ends; None if that is not known.
        self.end = earlier(end_by_environment(settings), self._lifetime)
        self._since = time.time()
        self._worker = worker
        self._settings = settings
        self._needs_s = needs_s
        self._tell_end = tell_end
        self._close = worker.close
        #: What waits until nothing is needed here, and until when it does.
        self._leaving: asyncio.Task[None] | None = None
        self._leaving_until = float("inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._signals: dict[int, Any] = {}
        #: When a signal came first; None if none did.
        self._signalled_at: float | None = None

    def ending(self) -> dict[str, Any] | None:
        """Return what the controller is told of the end; None: there is none."""
        if self.end is None:
            return None
        now = time.time()
        return {
            "in_s": self.end.at - now,
            "killed_in_s": self.end.killed_at - now,
            "clock": _clock(self.end),
            "needs_s": self._needs_s(),
        }

    def install(self) -> None:
        """Begin to listen for ends; on the worker's loop."""
        worker = self._worker
        worker.close = self.close  # type: ignore[method-assign]
        self._plan_to_tell()
        if self._settings.ends_at is None and batch_system() is not None:
            self._asking = self._spawn(self._ask_for_end())
        if threading.current_thread() is threading.main_thread():
            self._take_signal(signal.SIGTERM)

    def uninstall(self) -> None:
        """Undo `install`."""
        vars(self._worker).pop("close", None)
        if self._timer is not None:
            self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._signals.items():
                if signal.getsignal(signum) == self._on_signal:
                    signal.signal(signum, handler)

    async def close(
        self,
        timeout: float = 30,  # noqa: ASYNC109 - Dask's own
        executor_wait: bool = True,
        nanny: bool = True,
        reason: str = "worker-close",
    ) -> str | None:
        """Leave, then close as Dask does."""
        await self.leave(f"is closed ({reason})", timeout)
        return await self._close(
            timeout=timeout, executor_wait=executor_wait, nanny=nanny, reason=reason
        )

    async def leave(self, reason: str, timeout_s: float) -> None:
        """Wait until nothing of ours is needed here, if the worker has so long."""
        timeout_s -= min(CLOSING_SHARE * timeout_s, CLOSING_S)
        until = time.monotonic() + timeout_s
        over = self._leaving is None or self._leaving.done()
        # A batch system tells nanny and worker at once: the shorter time counts.
        if over or until < self._leaving_until - 1:
            self._leaving_until = until
            self._leaving = self._spawn(self._ask(reason, timeout_s))
        assert self._leaving is not None
        await asyncio.wait([self._leaving], timeout=timeout_s)

    async def _ask(self, reason: str, timeout_s: float) -> None:
        worker = self._worker
        stream = worker.batched_stream
        connected = stream is not None and stream.comm and not stream.comm.closed()
        if worker.status != Status.running or not connected:
            return
        try:
            await getattr(worker.scheduler, OP_LEAVE)(
                worker=worker.address,
                reason=reason,
                timeout_s=timeout_s,
                needs_s=self._needs_s(),
            )
        except (OSError, RuntimeError) as err:
            logger.info("the scheduler did not let this worker go: %r", err)

    # The end of a batch job.

    def _plan_to_tell(self) -> None:
        """Tell of the end again when it is near: what is in progress matters then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.end is not None:
            logger.info("This worker's job ends at %s", _clock(self.end))
            at, now = self.end.killed_at, time.time()
            near_s = min(NEAR_S, NEAR_SHARE * (at - self._since))
            self._timer = self._later(max(0.0, at - near_s - now), self._tell_often)

    def _tell_often(self) -> None:
        self._tell_end()
        self._timer = self._later(TELL_S, self._tell_often)

    def _later(self, delay_s: float, function: Callable[[], None]) -> Any:
        return asyncio.get_running_loop().call_later(delay_s, function)

    async def _ask_for_end(self) -> None:
        """Ask the batch system, again and again."""
        wait_s = ASK_FIRST_S  # others may have started with this one
        answered = True
        while True:
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.0))
            wait_s = ASK_S[1]
            try:
                asked = await ask_for_end(self._settings)
            except FileNotFoundError as err:
                logger.info("When this job ends cannot be asked here: %s", err)
                return
            except Exception as err:  # it is busy, or what it says is not understood
                level = logging.WARNING if answered else logging.DEBUG
                logger.log(level, "When this job ends is not known now: %r", err)
                answered = False
                continue
            answered = True
            end = earlier(asked, self._lifetime)
            if _differ(self.end, end):
                self.end = end
                self._tell_end()
                self._plan_to_tell()
            if end is not None:
                wait_s = (end.at - time.time()) * ASK_AFTER
                wait_s = min(max(wait_s, ASK_S[0]), ASK_S[1])

    # Signals.

    def _take_signal(self, signum: int) -> None:
        handler = signal.getsignal(signum)
        module = getattr(handler, "__module__", "")
        own = self._worker.nanny and handler is signal.SIG_DFL
        # Without a nanny it is `dask worker` itself that waits for the signal; other
        # programs know best what to do.
        if own or (not self._worker.nanny and module == "distributed._signals"):
            self._signals[signum] = handler
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        # Nothing may be logged here, see `distributed._signals`.
        loop = self._worker.loop.asyncio_loop  # type: ignore[attr-defined]
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            loop.call_soon_threadsafe(self._spawn_leaving, signum)
        elif now > self._signalled_at + REPEATED_S:
            self._pass_on(signum)  # whoever sends it again is in a hurry

    def _spawn_leaving(self, signum: int) -> None:
        self._spawn(self._leave_and_pass_on(signum))

    async def _leave_and_pass_on(self, signum: int) -> None:
        try:
            name = signal.Signals(signum).name
            logger.info("Received %s: leaving", name)
            await self.leave(f"got {name}", kill_wait_s(self._settings))
        finally:
            self._pass_on(signum)

    def _pass_on(self, signum: int) -> None:
        handler = self._signals.get(signum, signal.SIG_DFL)
        if callable(handler):
            handler(signum, None)
        else:
            signal.signal(signum, handler)
            os.kill(os.getpid(), signum)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _clock(end: JobEnd) -> str:
    date = "%Y-%m-%d " if end.at - time.time() > DAY_S else ""
    return time.strftime(f"{date}%H:%M:%S", time.localtime(end.at))


def _differ(one: JobEnd | None, other: JobEnd | None) -> bool:
    if one is None or other is None:
        return one is not other
    return abs(one.killed_at - other.killed_at) > SAME_S
