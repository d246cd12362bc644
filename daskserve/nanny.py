"""The nanny plugin: a worker has all the time that whoever ends its job leaves it."""

from __future__ import annotations

import logging
from typing import Any

from distributed import Nanny
from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin

from daskserve.batch import kill_wait_s
from daskserve.config import Settings

logger = logging.getLogger(__name__)

#: What of its time a nanny waits before it kills its worker.
SHARE = 0.8


class ServeNannyPlugin(NannyPlugin):
    """daskserve's part of a nanny.

    `dask worker` gives a nanny 10 s after a signal, whatever the time there is: batch
    systems have 30 s, in which requests are finished, or the next job begins.
    """

    name = "daskserve-nanny"
    restart = False

    def setup(self, nanny: Nanny) -> None:
        """Let the nanny wait for longer once it has got a signal."""
        kill = nanny.kill
        wait_s = kill_wait_s(Settings.load())

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
