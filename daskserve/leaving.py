"""A worker that is about to close, or to be killed, says so first. Worker process.

`Worker.close` and SIGTERM wait until the controller has moved elsewhere what runs here,
for as long as whoever ends the worker has patience. `Worker.close_gracefully`, which
``--lifetime`` calls, asks the scheduler by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil
from distributed import Worker
from distributed.core import Status

from daskserve.config import Settings
from daskserve.transport.messages import OP_LEAVE

logger = logging.getLogger(__name__)

#: Of the time that a worker has for closing, what it may spend on leaving before.
SHARE = 0.7
#: Job time limits in seconds, counted from the job's begin, of PBS, Torque and OAR.
LIMITS = ("PBS_WALLTIME", "OAR_JOB_WALLTIME_SECONDS")


class Farewell:
    """What a worker does before it goes.

    Parameters
    ----------
    worker
        The worker.
    settings
        How long things may take.
    """

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.ends_at = end_of_job(settings, os.environ)
        self._worker = worker
        self._settings = settings
        self._close = worker.close
        self._leaving: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._signals: dict[int, Any] = {}
        #: Whether a signal came.
        self._signalled = False

    @property
    def ends_in_s(self) -> float | None:
        """Seconds until the worker's job ends; None if that is not known."""
        return None if self.ends_at is None else self.ends_at - time.time()

    def install(self) -> None:
        """Begin to listen for ends; on the worker's loop."""
        worker = self._worker
        worker.close = self.close  # type: ignore[method-assign]
        if self.ends_in_s is not None:
            begin = max(0.0, self.ends_in_s - self._settings.end_margin_s)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(begin, self._job_ends)
        if threading.current_thread() is threading.main_thread():
            self._take_signal(signal.SIGTERM)

    def uninstall(self) -> None:
        """Undo `install`."""
        vars(self._worker).pop("close", None)
        if self._timer is not None:
            self._timer.cancel()
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
        await self.leave(f"is closed ({reason})", SHARE * timeout)
        return await self._close(
            timeout=timeout, executor_wait=executor_wait, nanny=nanny, reason=reason
        )

    async def leave(self, reason: str, timeout_s: float, stays: bool = False) -> None:
        """Wait until nothing of ours is needed here; for so long at most."""
        if self._leaving is None or self._leaving.done():
            asking = self._ask(reason, timeout_s, stays)
            self._leaving = asyncio.ensure_future(asking)
        await asyncio.wait([self._leaving], timeout=timeout_s)

    async def _ask(self, reason: str, timeout_s: float, stays: bool) -> None:
        worker = self._worker
        stream = worker.batched_stream
        connected = stream is not None and stream.comm and not stream.comm.closed()
        if worker.status != Status.running or not connected:
            return
        try:
            await getattr(worker.scheduler, OP_LEAVE)(
                worker=worker.address, reason=reason, timeout_s=timeout_s, stays=stays
            )
        except (OSError, RuntimeError) as err:
            logger.info("the scheduler did not let this worker go: %r", err)

    # The end of a batch job.

    def _job_ends(self) -> None:
        assert self.ends_at is not None and self.ends_in_s is not None
        at = time.strftime("%H:%M:%S", time.localtime(self.ends_at))
        left = max(1.0, self.ends_in_s - self._settings.end_margin_s / 4)
        self._spawn(self._ask(f"ends with its job at {at}", left, stays=True))

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
        if self._signalled:  # again: whoever sends it is in a hurry
            self._pass_on(signum)
        else:
            self._signalled = True
            loop.call_soon_threadsafe(self._spawn_leaving, signum)

    def _spawn_leaving(self, signum: int) -> None:
        self._spawn(self._leave_and_pass_on(signum))

    async def _leave_and_pass_on(self, signum: int) -> None:
        try:
            name = signal.Signals(signum).name
            logger.info("Received %s: leaving", name)
            await self.leave(f"got {name}", SHARE * self._settings.signal_timeout_s)
        finally:
            self._pass_on(signum)

    def _pass_on(self, signum: int) -> None:
        handler = self._signals.get(signum, signal.SIG_DFL)
        if callable(handler):
            handler(signum, None)
        else:
            signal.signal(signum, handler)
            os.kill(os.getpid(), signum)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def end_of_job(settings: Settings, environ: Mapping[str, str]) -> float | None:
    """Find out when the batch system will end this process.

    Parameters
    ----------
    settings
        Where the user may have said it.
    environ
        Where the batch system may have.

    Returns
    -------
    float or None
        Seconds since 1970; None if nobody says.
    """
    if settings.ends_at is not None:
        return settings.ends_at
    with contextlib.suppress(KeyError, ValueError):
        return float(environ["SLURM_JOB_END_TIME"])
    for name in LIMITS:
        with contextlib.suppress(KeyError, ValueError):
            return _begin_of_job(environ) + float(environ[name])
    return None


def _begin_of_job(environ: Mapping[str, str]) -> float:
    """Return when the job began: not later than the oldest process that is our own."""
    process, oldest = psutil.Process(), time.time()
    uid = process.uids().real
    with contextlib.suppress(psutil.Error):
        while process is not None and process.uids().real == uid:
            oldest = process.create_time()
            process = process.parent()
    return oldest
