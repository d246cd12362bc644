"""Keep a scheduler with an ``idle-timeout`` from closing while it serves. Scheduler.

Dask counts tasks only: a cluster that answers requests all day looks idle to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_awake(scheduler: Any, busy: Callable[[], bool]) -> None:
    """Have the scheduler ask `busy` before it thinks itself idle.

    Parameters
    ----------
    scheduler
        The scheduler.
    busy
        Whether something is deployed.
    """
    check_idle = scheduler.check_idle

    def check() -> Any:
        if not busy():
            return check_idle()
        scheduler.idle_since = None
        return None

    # Also asked over HTTP, by those who run clusters for others.
    scheduler.check_idle = check
    periodic = scheduler.periodic_callbacks.get("idle-timeout")
    if periodic is not None:
        periodic.callback = check
