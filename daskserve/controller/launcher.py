"""Replicas as pinned Dask actors; the only place that submits one. Scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from typing import Any

from distributed import Client, Future, Scheduler, wait

from daskserve.controller.actions import StartReplica
from daskserve.replica.actor import Replica, ReplicaSpec
from daskserve.transport.security import client_security

logger = logging.getLogger(__name__)

#: Before ordinary tasks: creating a replica takes a thread for a moment only.
PRIORITY = 1_000_000
#: How long an actor waits, in seconds, until it is looked whether it has a thread.
PATIENCE_S = 0.5
#: What is smaller, in bytes, is not still on its way then, and may as well go twice.
SMALL = 1_000_000
#: What the keys of our actors begin with.
KEY_PREFIX = "daskserve-"


def is_ours(key: Any) -> bool:
    """Whether a key is that of a replica's actor."""
    return str(key).startswith(KEY_PREFIX)


def forget_actor(scheduler: Scheduler, key: Any) -> None:
    """Let no worker count an actor that never came to be.

    Dask itself sees to those that were made only, and would not retire a worker that
    seems to have one.
    """
    task = scheduler.tasks[key]
    for ws in scheduler.workers.values():
        ws.actors.discard(task)


class Launcher:
    """Submit and release the actors, through a client of the controller's own.

    Actors die with the client that made them, so it must not be the user's.

    Parameters
    ----------
    scheduler
        Where to submit.
    on_failure
        Told of a replica that could not be created, or was lost: its id, the reason,
        and whether it is its own fault.
    start
        Starts a replica on a worker without its actor, which finds it there later;
        called with the worker, the replica's id and its pickled `ReplicaSpec`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        on_failure: Callable[[int, str, bool], None],
        start: Callable[[str, int, bytes], None],
    ) -> None:
        self._scheduler = scheduler
        self._on_failure = on_failure
        self._start = start
        self._client: Client | None = None
        self._futures: dict[int, Future[Any]] = {}
        self._ids: dict[Any, int] = {}
        #: Replicas that are about to be submitted.
        self._due: set[int] = set()
        #: How often the scheduler has restarted; the client counts as well, later.
        self._restarts = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect the controller's client to its own scheduler."""
        self._client = await Client(
            self._scheduler.address,
            asynchronous=True,
            set_as_default=False,
            name="daskserve-controller",
            security=client_security(self._scheduler.security, "scheduler"),
        )

    async def close(self) -> None:
        """Release all actors and close the client."""
        for replica_id in list(self._futures):
            self.release(replica_id)
        for task in list(self._tasks):
            task.cancel()
        if self._client is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await self._client.close()

    def launch(self, action: StartReplica) -> None:
        """Submit a replica's actor to its worker."""
        self._due.add(action.replica_id)
        task = asyncio.ensure_future(self._launch(action))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def release(self, replica_id: int) -> None:
        """Forget a replica's actor."""
        self._due.discard(replica_id)
        future = self._futures.pop(replica_id, None)
        if future is not None:
            self._ids.pop(future.key, None)
            future.release()

    def forget_all(self) -> None:
        """Forget all actors: ``client.restart()`` has cancelled them."""
        self._restarts += 1
        for replica_id in list(self._futures):
            self.release(replica_id)

    def key_left_memory(self, key: Any) -> None:
        """Note that a task has left memory; one of ours was not told to."""
        replica_id = self._ids.get(key)
        if replica_id is not None:
            self._on_failure(replica_id, "its Dask actor was cancelled or lost", False)

    async def _launch(self, action: StartReplica) -> None:
        assert self._client is not None
        spec = ReplicaSpec(
            replica_id=action.replica_id,
            tag=action.tag,
            deployment=action.spec.name,
            code=action.spec.code,
            init=action.spec.init,
            future_keys=action.spec.future_keys,
            user_config=action.spec.user_config,
            config_generation=action.config_generation,
            max_ongoing_requests=action.spec.max_ongoing_requests,
            max_websockets=action.spec.max_websockets,
            health_check_period_s=action.spec.health_check_period_s,
            health_check_timeout_s=action.spec.health_check_timeout_s,
            threads=action.spec.threads,
            abandoned_call_timeout_s=action.spec.abandoned_call_timeout_s,
            session_affinity=action.spec.session_affinity,
        )
        future: Future[Any] | None = None
        # Until it has heard of a restart, the client would give up what it submits,
        # and the scheduler would keep it for ever.
        while self._client.generation < self._restarts:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        if action.replica_id not in self._due:
            return
        self._due.discard(action.replica_id)
        try:
            if ahead := self._is_busy(action.worker):
                self._start(action.worker, spec.replica_id, pickle.dumps(spec))
            future = self._client.submit(
                Replica,
                replace(spec, code=b"", init=b"", user_config=None) if ahead else spec,
                actor=True,
                key=f"{KEY_PREFIX}{action.tag}-{action.replica_id}",
                workers=[action.worker],
                allow_other_workers=False,
                pure=False,
                priority=PRIORITY,
            )
            self._futures[action.replica_id] = future
            self._ids[future.key] = action.replica_id
            # Not `await future`: that would make an `Actor` here, which binds itself to
            # whatever client this process has.
            with self._client.as_current():
                await self._wait(future, action.worker, None if ahead else spec)
            if future.status == "error" and action.replica_id in self._futures:
                error = await future.exception()
                reason = f"the Dask actor could not be created: {error!r}"
                self._on_failure(action.replica_id, reason, True)
        except asyncio.CancelledError:
            if action.replica_id in self._futures:  # not the launcher's own end
                self._on_failure(action.replica_id, "its actor was cancelled", False)
            raise
        except futures.CancelledError:
            if action.replica_id in self._futures:  # by a restart it crossed on the way
                self._on_failure(action.replica_id, "its actor was cancelled", False)
        except Exception as err:
            if future is not None and action.replica_id not in self._futures:
                return  # released while it was waited for
            logger.exception("cannot submit replica %s", action.tag)
            self._on_failure(action.replica_id, f"cannot be submitted: {err!r}", True)

    def _is_busy(self, worker: str, waiting: int = 0) -> bool:
        """Whether tasks have all threads of a worker, but for those of ours."""
        ws = self._scheduler.workers.get(worker)
        if ws is None:
            return False
        return len(ws.processing) - len(ws.long_running) - waiting >= ws.nthreads

    async def _wait(
        self, future: Future[Any], worker: str, spec: ReplicaSpec | None
    ) -> None:
        """Wait for an actor; start its replica if tasks have all threads."""
        while spec is not None and self._futures.get(spec.replica_id) is future:
            with contextlib.suppress(TimeoutError):
                await wait([future], timeout=PATIENCE_S)
                return
            # Cancelled tasks go on, but the scheduler knows nothing of them any more.
            if len(spec.code) + len(spec.init) < SMALL or self._is_busy(worker, 1):
                self._start(worker, spec.replica_id, pickle.dumps(spec))
                break
        await wait([future])
