"""How many requests wait for a deployment: here, and in all other processes.

Runs on a process's transport loop. Each process tells the controller how many wait in
it, some times a second while any do, and is told the sum of all others; so
``max_queued_requests`` counts over all proxies and handles, if a little late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

#: Seconds between two reports, while anything waits.
REPORT_S = 0.05
#: What the controller said is believed for so long; it says it again in time.
VALID_S = 3.0


class QueueReports:
    """One process's part of that.

    Parameters
    ----------
    loop
        The transport loop; everything runs on it.
    count
        Returns how many requests wait here, by deployment, without the zeros.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, count: Callable[[], dict[str, int]]
    ) -> None:
        #: Sends a report to the controller; None: nobody is told.
        self.send: Callable[[dict[str, int]], object] | None = None
        self._loop = loop
        self._count = count
        self._reported: dict[str, int] = {}
        self._elsewhere: dict[str, int] = {}
        self._valid_until = 0.0
        self._armed = False

    def elsewhere(self, deployment: str) -> int:
        """Return how many wait in other processes, as far as is known."""
        if not self._elsewhere or self._loop.time() > self._valid_until:
            return 0
        return self._elsewhere.get(deployment, 0)

    def changed(self) -> None:
        """Note that a request has begun to wait."""
        if not self._armed and self.send is not None:
            self._armed = True
            self._loop.call_later(REPORT_S, self._report)

    def take_elsewhere(self, queued: Mapping[str, int]) -> None:
        """Note how many wait in all other processes."""
        self._elsewhere = dict(queued)
        self._valid_until = self._loop.time() + VALID_S

    def _report(self) -> None:
        queued = self._count()
        if queued != self._reported and self.send is not None:
            self._reported = queued
            self.send(queued)
        self._armed = bool(queued)
        if self._armed:
            self._loop.call_later(REPORT_S, self._report)
