"""The nanny plugin: a worker has all the time that whoever ends its job leaves it."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import weakref
from typing import Any

from distributed import Nanny
from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin

from daskserve.config import Settings
from daskserve.job_end import kill_wait_s

logger = logging.getLogger(__name__)

#: Those of this process that have our plugin.
_nannies: weakref.WeakSet[Nanny] = weakref.WeakSet()
#: What of its time a nanny waits before it kills its worker.
SHARE = 0.8
#: A signal that comes again within this time, in seconds, is still the same.
REPEATED_S = 1.0


class ServeNannyPlugin(NannyPlugin):
    """daskserve's part of a nanny.

    `dask worker` gives a nanny 10 s after a signal, whatever the time there is: batch
    systems have 30 s, in which requests are finished, or the next job begins.
    """

    name = "daskserve-nanny"
    restart = False

    def __init__(self) -> None:
        self._handler: Any = None

    def setup(self, nanny: Nanny) -> None:
        """Let the nanny wait for longer once it has got a signal."""
        _nannies.add(nanny)
        self._forgive_repeats()
        kill = nanny.kill
        wait_s = max(1.0, kill_wait_s(Settings.load()) - REPEATED_S)

        async def kill_in_time(timeout: float = 5, reason: str = "nanny-kill") -> None:  # noqa: ASYNC109
            if reason.startswith("signal-"):
                timeout = max(timeout, wait_s / SHARE)
                logger.info("The worker has %g s to close", timeout * SHARE)
            await kill(timeout=timeout, reason=reason)

        attributes: Any = nanny
        attributes.kill = kill_in_time

    def teardown(self, nanny: Nanny) -> None:
        """Undo `setup`; a nanny that closes removes its plugins first."""
        if nanny.status not in (Status.closing, Status.closed):
            vars(nanny).pop("kill", None)
            if self._handler is not None:
                signal.signal(signal.SIGTERM, self._handler)

    def _forgive_repeats(self) -> None:
        """Take two signals in a moment for one: `srun` and slurmd send one each.

        Dask's command would end at once by the second, and its worker with it.
        """
        handler: Any = signal.getsignal(signal.SIGTERM)
        by_dask = getattr(handler, "__module__", "") == "distributed._signals"
        if not by_dask or threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        came = False

        def pass_on(signum: int) -> None:
            for nanny in _nannies:  # a worker that ends first is not started anew
                nanny.close_gracefully(reason=f"signal-{signum}")
            loop.call_later(REPEATED_S, handler, signum, None)

        def on_signal(signum: int, frame: Any) -> None:
            nonlocal came
            if not came:
                came = True
                loop.call_soon_threadsafe(pass_on, signum)

        self._handler = handler
        signal.signal(signal.SIGTERM, on_signal)
