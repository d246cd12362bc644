"""Workers leave in an orderly way: Dask's ops that end them wait for us. Scheduler.

Whoever retires a worker (``Client.retire_workers``, ``cluster.scale()``, ``adapt()``,
``--lifetime``), or a worker that closes, waits until nothing of ours is left there.
Dask would not retire a worker that holds an actor, but those who asked close it all the
same.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from distributed import Scheduler
from distributed.scheduler import WorkerState

from daskserve.controller.instance import Instance
from daskserve.controller.leaving import addresses_of
from daskserve.controller.placement import Leaving
from daskserve.transport.messages import OP_LEAVE

logger = logging.getLogger(__name__)

#: Between two looks at what is left on a worker.
LOOK_S = 0.03
#: Beyond the deadline, until what was told to stop has done so.
MARGIN_S = 1.0
#: For requests in progress when a cluster closes all its workers.
CLUSTER_CLOSE_S = 3.0
#: How `Worker.close_gracefully` begins its stimulus; it is what ``--lifetime`` calls.
GRACEFULLY = "worker-close-gracefully"


class Departures:
    """What waits for workers to be left.

    Parameters
    ----------
    scheduler
        Whose ops are wrapped.
    instance
        Returns the instance that runs, if one does.
    shutdown
        Ends it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        instance: Callable[[], Instance | None],
        shutdown: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._scheduler = scheduler
        self._instance = instance
        self._shutdown = shutdown
        self._retire = scheduler.retire_workers
        self._target = scheduler.adaptive_target
        scheduler.handlers["retire_workers"] = self.retire_workers
        scheduler.handlers["adaptive_target"] = self.adaptive_target
        scheduler.handlers[OP_LEAVE] = self.leave
        # For those in this process that call it themselves.
        scheduler.retire_workers = self.retire_workers  # type: ignore[method-assign]

    async def retire_workers(
        self,
        workers: list[str] | None = None,
        *,
        names: list[Any] | None = None,
        stimulus_id: str | None = None,
        close_workers: bool = False,
        remove: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Do as Dask, once our part of the workers is elsewhere."""
        instance, scheduler = self._instance(), self._scheduler
        details: dict[str, Any] = {"close_workers": close_workers, "remove": remove}
        if instance is not None and workers is None and names is None:
            workers = scheduler.workers_to_close(**kwargs)
            kwargs = {}
        given = {"workers": workers, "names": names, "stimulus_id": stimulus_id}
        details |= {name: value for name, value in given.items() if value is not None}
        if instance is None or (workers is not None and names is not None):
            return await self._dask(**details, **kwargs)  # it says what is wrong
        known = {address: str(ws.name) for address, ws in scheduler.workers.items()}
        wanted = (names if workers is None else workers) or []
        leaving = addresses_of(wanted, known)
        now = time.monotonic()
        by_cluster = workers is not None and not set(map(str, wanted)) & set(known)
        gracefully = (stimulus_id or "").startswith(GRACEFULLY)
        nobody_stays = by_cluster and len(leaving) == len(known)
        timeout_s = instance.settings.leave_timeout_s
        why = Leaving(
            reason="closes gracefully, as after --lifetime"
            if gracefully
            else "is retired",
            since=now,
            deadline=now + (CLUSTER_CLOSE_S if nobody_stays else timeout_s),
            may_return=gracefully,
            at_once=nobody_stays,
        )
        answer: dict[str, Any] = {}

        async def retire() -> None:
            answer.update(await self._dask(**details, **kwargs))

        await self._leave(instance, leaving, why, then=retire)
        return answer

    def _dask(self, **kwargs: Any) -> Awaitable[dict[str, Any]]:
        answer: Awaitable[dict[str, Any]] = self._retire(**kwargs)
        return answer

    async def leave(
        self, worker: str, reason: str, timeout_s: float, needs_s: dict[int, float]
    ) -> dict[str, Any]:
        """Answer a worker when it can close; it asks before it does.

        Parameters
        ----------
        worker
            Its address.
        reason
            Why it closes.
        timeout_s
            How long it can wait.
        needs_s
            How long requests in its replicas may take, by the replica's number.
        """
        instance, now = self._instance(), time.monotonic()
        if instance is None or worker not in self._scheduler.workers:
            return {"status": "OK"}
        if instance.is_ended(worker, now):
            return {"status": "OK"}
        if not threading.main_thread().is_alive():
            # A script has ended and its own cluster with it. Nothing can move: Dask's
            # executors take no work any more.
            return await self._shutdown()
        why = Leaving(
            reason=reason,
            since=now,
            deadline=now + timeout_s,
            killed=True,
            needs_s=needs_s,
        )
        await self._leave(instance, [worker], why)
        return {"status": "OK"}

    async def _leave(
        self,
        instance: Instance,
        workers: Sequence[str],
        why: Leaving,
        then: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        for worker in workers:
            logger.info("Worker %s %s: what it serves moves away", worker, why.reason)
            instance.leaving.announce(worker, why)
        instance.look()
        try:
            end = why.deadline + MARGIN_S
            waits = [w for w in workers if not instance.has_left(w)]
            while waits and time.monotonic() < end and not instance.closed:
                await asyncio.sleep(LOOK_S)
                waits = [w for w in waits if not instance.has_left(w)]
            if waits and not instance.closed:
                logger.warning("Time is up for %s, with something left there", waits)
            if then is not None:
                await then()
        finally:
            for worker in workers:
                instance.leaving.let_be(worker, time.monotonic())

    def spare(self, workers: list[WorkerState]) -> list[WorkerState]:
        """Choose the workers that ``adapt()`` may close; Dask asks."""
        instance = self._instance()
        if instance is None:
            return workers
        needed = instance.needed_workers()
        return [ws for ws in workers if ws.address not in needed]

    async def adaptive_target(self, **kwargs: Any) -> int:
        """Return how many workers ``adapt()`` wants: one at least while we serve.

        And more while replicas find no room, or their workers are about to end; they
        are no tasks, so Dask does not count them.
        """
        target: int = self._target(**kwargs)
        instance = self._instance()
        if instance is None or not instance.names():
            return target
        missing = max(instance.missing_workers(), instance.ending_workers())
        return max(target, 1, len(self._scheduler.workers) + missing if missing else 0)
