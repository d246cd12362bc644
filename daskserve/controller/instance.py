"""A running instance: the brain, and what carries out its decisions. Scheduler."""

from __future__ import annotations

import asyncio
import logging
import random
import string
import time
from collections.abc import Awaitable, Mapping
from dataclasses import asdict
from typing import Any

from dask.utils import format_bytes
from distributed import Scheduler
from distributed.core import Status

from daskserve.config import Settings
from daskserve.controller.actions import (
    Action,
    Failure,
    ReconfigureReplica,
    ReleaseReplica,
    Settle,
    StartReplica,
    StopReplica,
    WatchReplica,
)
from daskserve.controller.apps import Apps
from daskserve.controller.health import HealthBoard, Trouble, note_silence
from daskserve.controller.journal import Journal
from daskserve.controller.keeper import StateKeeper
from daskserve.controller.kept_values import keep_values
from daskserve.controller.launcher import Launcher, is_ours
from daskserve.controller.leaving import LeaveBoard, needed_workers
from daskserve.controller.placement import WorkerView
from daskserve.controller.policies import Policies, load_policy
from daskserve.controller.proxy_manager import HTTPConfig, ProxyManager
from daskserve.controller.publisher import Publisher
from daskserve.controller.records import Spec
from daskserve.controller.state import ControllerState
from daskserve.exceptions import ServeNotRunningError
from daskserve.transport.files import FileWatch
from daskserve.transport.messages import STREAM_COMMAND

logger = logging.getLogger(__name__)

#: How long `start` waits for the plugins of the workers that are there.
HELLO_TIMEOUT_S = 10.0
#: How long ``client.restart()`` may take to close workers.
_RESTART_S = 15.0


class Instance:
    """One instance of daskserve on one scheduler.

    Parameters
    ----------
    scheduler
        The scheduler.
    http
        The HTTP options.
    detached
        Whether it outlives the client `owner`.
    owner
        Id of the client that started it.
    keeper
        Keeps what is wanted for a scheduler after this one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        http: HTTPConfig,
        *,
        detached: bool,
        owner: str,
        keeper: StateKeeper | None = None,
    ) -> None:
        settings = Settings.load()
        self.http = http
        self.detached = detached
        self.owner = owner
        self.publisher = Publisher(scheduler, settings.ack_timeout_s)
        self.proxies = ProxyManager(scheduler, self.publisher, http, self.publisher.has)
        #: Workers that are about to leave.
        self.leaving = LeaveBoard(settings.end_margin_s, settings.end_lead_s)
        self.settings = settings
        self._scheduler = scheduler
        self._state = ControllerState(
            new_suffix=_new_suffix,
            # Ids of an instance before this one must not be taken for ours.
            first_id=random.randrange(1, 2**40),
            max_failures=settings.constructor_failure_limit,
            spread_after_s=settings.spread_after_s,
            trial_s=settings.trial_s,
        )
        self.apps = Apps(self)
        self._launcher = Launcher(scheduler, self._replica_failed, self._start_ahead)
        #: Workers that their nannies end, and the bytes that they use.
        self._over_memory: dict[str, int] = {}
        #: Workers that ``client.restart()`` closes, and until when that may take.
        self._restarting: dict[str, float] = {}
        self._policies = Policies()
        self._health = HealthBoard()
        self._files = FileWatch(f"the scheduler {scheduler.address}")
        self.publisher.silent = self._health.silent
        self._waiting: dict[int, asyncio.Future[Failure | None]] = {}
        self._wake = asyncio.Event()
        self.closed = False
        self._keeper = keeper
        self._ending = False
        #: Whether HTTP servers were started once; a restored instance waits for workers
        #: with that, since one in the scheduler would stay there.
        self._bound = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # Life.

    async def start(self) -> list[str]:
        """Start proxies and the controller's loop; return why that failed, if so."""
        await self._launcher.start()
        await self._wait_for_workers()
        failed = await self.proxies.reconcile(time.monotonic(), self._views())
        if failed:
            await self.close()
            return [record.reason for record in failed]
        self._bound.set()
        self._loop_task = asyncio.ensure_future(self._run())
        await self._saved()
        return []

    @classmethod
    def restored(
        cls, scheduler: Scheduler, journal: Journal, keeper: StateKeeper
    ) -> Instance:
        """Make the instance of an earlier scheduler; `resume` brings it to life."""
        http = HTTPConfig(**journal.http)
        instance = cls(scheduler, http, detached=True, owner="", keeper=keeper)
        instance._state.restore(journal.deployments, now=time.monotonic())
        return instance

    async def resume(self) -> None:
        """Start what an earlier scheduler had, as workers come."""
        await self._launcher.start()
        self._loop_task = asyncio.ensure_future(self._run())

    async def ready(self) -> None:
        """Wait a little until a restored instance has its HTTP servers."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await self._bound.wait()
        except TimeoutError:
            logger.info("No worker is there yet to bring back what was deployed")

    async def shutdown(self) -> None:
        """Delete all deployments, stop the proxies, end."""
        if not self.closed:
            self._ending = True
            await self.apps.delete_all()
            await self._settled(self._state.shutdown())
            await self.close()
            await self._saved()

    async def close(self) -> None:
        """End at once what is left."""
        self.closed = True
        self._wake.set()
        for future in self._waiting.values():
            if not future.done():
                text = "the instance was shut down meanwhile"
                future.set_result(Failure("DeploymentFailedError", text))
        await self.proxies.close()
        self.publisher.publish({"routes": {}, "deployments": {}})
        await self._launcher.close()
        keep_values(self._scheduler, set())
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task], timeout=5)
        for task in list(self._tasks):
            task.cancel()

    # Wishes.

    async def deploy(self, spec: Spec, prev_version: str | None) -> Failure | None:
        """Want a deployment and wait until that is settled everywhere."""
        self._refuse_at_end()
        policy = (spec.autoscaling or {}).get("policy")
        if policy is not None:
            await asyncio.to_thread(load_policy, policy)
        ticket = self._state.deploy(
            spec, prev_version=prev_version, now=time.monotonic()
        )
        return await self._settled(ticket)

    async def rollback(self, name: str, number: int | None) -> Failure | None:
        """Want a deployment as it was before, and wait as `deploy` does."""
        self._refuse_at_end()
        ticket = self._state.rollback(name, number, now=time.monotonic())
        return await self._settled(ticket)

    def _refuse_at_end(self) -> None:
        if self._ending:
            raise ServeNotRunningError("the daskserve instance is being shut down")

    async def delete(self, name: str) -> Failure | None:
        """Want a deployment to be gone and wait until it is."""
        return await self._settled(self._state.delete(name))

    def spec(self, name: str) -> Spec:
        """Return what is wanted of a deployment; `KeyError` if there is none."""
        return self._state.spec(name)

    def check_route(self, spec: Spec) -> None:
        """Raise `ValueError` if another deployment has the route prefix."""
        self._state.check_prefix(spec)

    def names(self) -> list[str]:
        """Return the names of all deployments."""
        return self._state.names()

    def has_left(self, worker: str) -> bool:
        """Whether nothing of ours is on a worker any more."""
        ws = self._scheduler.workers.get(worker)
        if ws is None:
            return True
        return (
            worker not in self.proxies.records
            and worker not in self._state.workers_in_use()
            and not any(is_ours(ts.key) for ts in ws.actors)
        )

    def needed_workers(self) -> set[str]:
        """Return the workers that are to stay when the cluster is made smaller."""
        return needed_workers(
            self._state.demands(),
            self._views(),
            self.proxies.records.keys(),
            self._to_be_replaced(),
        )

    def _to_be_replaced(self) -> set[str]:
        """Return the workers that are about to end and to be replaced."""
        now = time.monotonic()
        workers = self._scheduler.workers
        return {a for a in workers if self.leaving.is_to_be_replaced(a, now)}

    def ending_workers(self) -> int:
        """Return how many workers are missing in the place of those that soon end."""
        used = self._state.workers_in_use()
        ending = self._to_be_replaced()
        spare = set(self._scheduler.workers) - ending - used
        return max(0, len(ending & used) - len(spare))

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return the versions of a deployment; `KeyError` if there is none."""
        return self._state.history(name, now=time.monotonic())

    @property
    def keeps_awake(self) -> bool:
        """Whether the scheduler's idle timeout does not count now."""
        return self.settings.keep_awake and bool(self._state.names())

    def missing_workers(self) -> int:
        """Return how many more workers replicas without room would fill."""
        return self._state.missing_workers(time.monotonic(), self._views())

    def status(self) -> dict[str, Any]:
        """Return everything that users may want to know, as plain data."""
        return {
            "instance": {
                "scheduler": self._scheduler.address,
                "detached": self.detached,
                "location": self.http.location,
                "http_urls": self.proxies.urls,
                "reason": self._reason,
            },
            "proxies": [
                {
                    "worker": record.worker,
                    "host": record.host,
                    "url": record.url,
                    "state": record.state,
                    "reason": record.reason,
                }
                # In the order of the URLs.
                for record in sorted(
                    self.proxies.records.values(), key=lambda r: (r.url or "", r.worker)
                )
            ],
            "deployments": note_silence(
                self._state.status(now=time.monotonic()), self._health.silent
            ),
        }

    @property
    def _reason(self) -> str:
        reasons = [self._keeper.reason] if self._keeper is not None else []
        if not self._bound.is_set():
            reasons.append("brought back after the scheduler was lost; no worker yet")
        reasons += [self._files.reason, *self._health.short_of_files()]
        return "\n".join(filter(None, reasons))

    # News.

    def look(self) -> None:
        """Look again: something is wanted, or there may be room now."""
        self._wake.set()

    def worker_ends(self, worker: str, ending: dict[str, Any] | None) -> None:
        """Note when a worker's job ends; None: it has no end, or none any more."""
        if ending is None:
            self.leaving.never_ends(worker)
        else:
            self.leaving.ends(worker, now=time.monotonic(), **ending)
        self._wake.set()

    def hello(self, worker: str) -> None:
        """Note that a worker's plugin is set up."""
        self.publisher.subscribe(worker)
        self._health.heard(worker)
        self._wake.set()

    def worker_over_memory(self, worker: str, used: int) -> None:
        """Note that a nanny ends a worker because it uses too much memory, in bytes."""
        if worker in self._scheduler.workers:
            self._over_memory[worker] = used

    def is_ended(self, worker: str, now: float) -> bool:
        """Whether somebody ends a worker who will not wait: its nanny, or a restart."""
        return worker in self._over_memory or self._restarting.get(worker, now) > now

    def worker_removed(self, worker: str) -> None:
        """Replace what was on a worker that has gone."""
        now, used = time.monotonic(), self._over_memory.pop(worker, None)
        restarts = self._restarting.pop(worker, now) > now
        leaves = restarts or self.leaving.get(worker, now) is not None
        announced = used is None and leaves
        self.publisher.worker_lost(worker)
        self.leaving.gone(worker)
        self._health.forget(worker)
        reason = f"worker {worker} left the cluster"
        if used is not None:
            reason = (
                f"worker {worker} used {format_bytes(used)}, more than its memory "
                f"limit allows, and was ended by its nanny"
            )
        self._state.worker_lost(worker, reason, now=now, announced=announced)
        self._wake.set()

    def restarted(self) -> None:
        """Replace everything: ``client.restart()`` has cancelled all actors."""
        now = time.monotonic()
        self._restarting = dict.fromkeys(self._scheduler.workers, now + _RESTART_S)
        self._launcher.forget_all()
        reason = "the cluster was restarted (client.restart)"
        self._state.all_lost(reason, now=now)
        self._wake.set()

    def key_left_memory(self, key: Any) -> None:
        """Note that a task has left memory, which may be a replica's actor."""
        self._launcher.key_left_memory(key)

    def replica_news(self, worker: str, replica_id: int, news: dict[str, Any]) -> None:
        """Take what a replica reports of itself."""
        now = time.monotonic()
        event = news["event"]
        if event in ("initializing", "started") and not self._state.knows(replica_id):
            self._discard(worker, replica_id)  # it was stopped before it had begun
            return
        if event == "initializing":
            self._state.replica_initializing(replica_id, pid=news["pid"], now=now)
        elif event == "started":
            self._state.replica_started(
                replica_id,
                now=now,
                pid=news["pid"],
                direct=news["direct"],
                limit=news["limit"],
            )
        elif event == "failed":
            text, cause = news["text"], news["cause"]
            self._state.replica_failed(replica_id, text, cause, now=now)
        elif event == "stopped":
            self._state.replica_stopped(replica_id)
        elif event == "reconfigured":
            generation, error = news["generation"], news["error"]
            self._state.reconfigured(replica_id, generation, error, now=now)
        self._wake.set()

    def health_report(
        self,
        worker: str,
        period_s: float,
        patience_s: float,
        troubles: list[Trouble],
        files: str = "",
    ) -> None:
        """Take what a worker says of itself and of replicas that are ill."""
        if not self.publisher.has(worker):
            return  # an old message of one that has left
        if worker in self._health.silent:
            logger.info("Worker %s answers again", worker)
            self._wake.set()
        now = time.monotonic()
        for replica_id, fatal, text in self._health.report(
            worker, period_s, patience_s, troubles, files
        ):
            self._state.replica_ill(replica_id, fatal=fatal, text=text, now=now)
            self._wake.set()

    def _replica_failed(self, replica_id: int, reason: str, own_fault: bool) -> None:
        now = time.monotonic()
        if own_fault:
            self._state.replica_failed(replica_id, reason, now=now)
        else:
            # If its worker is just leaving, the scheduler says so in a moment, which is
            # the better reason.
            loop = asyncio.get_running_loop()
            loop.call_soon(self._actor_lost, replica_id, reason)
        self._wake.set()

    def _actor_lost(self, replica_id: int, reason: str) -> None:
        if not self._state.knows(replica_id):
            return
        # Its worker may well be there, and go on running it.
        for worker in list(self._scheduler.workers):
            self._discard(worker, replica_id)
        self._state.replica_lost(replica_id, reason, now=time.monotonic())

    def _discard(self, worker: str, replica_id: int) -> None:
        self._command(
            worker, command="stop", replica_id=replica_id, grace_s=0.0, poll_s=0.0
        )

    # The loop: compare what is wanted with what is there, again and again.

    async def _run(self) -> None:
        while not self.closed:
            self._wake.clear()
            began = time.monotonic()
            try:
                self._step()
            except Exception:
                # Whatever it was, the next look starts from the facts again.
                logger.exception("The controller's step failed")
            # A step looks at everything: on a big cluster, one for each of a thousand
            # replicas that start would leave the scheduler no time for anything else.
            await asyncio.sleep(time.monotonic() - began)
            try:
                async with asyncio.timeout(self.settings.tick_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _step(self) -> None:
        if self._scheduler.status != Status.running:
            return  # it closes, and its workers go for good
        now = time.monotonic()
        if self.leaving:
            workers = self._scheduler.workers.items()
            running = {a for a, ws in workers if ws.status == Status.running}
            self.leaving.sweep(now, running)
        moving = bool(self.leaving) or bool(self._state.spreader)
        if moving and self.publisher.is_known():
            self._state.routing_known()
        self._files.look(now)
        lost = self._give_up_silent(now)
        views = self._views()
        self._follow_load(now)
        actions = self._state.reconcile(now, views)
        self.publisher.publish(self._state.routing())
        for worker, replica_ids in lost.items():
            self.publisher.replicas_lost(worker, replica_ids)
        self.publisher.publish_queues(now)
        self._save()
        for action in actions:
            self._perform(action)
        awaited = self._bound.is_set() or any(v.accepting for v in views.values())
        if awaited and self.proxies.due(now, views):
            self._spawn(self._bind(now, views))
        elif awaited:
            self._bound.set()

    async def _bind(self, now: float, views: Mapping[str, WorkerView]) -> None:
        await self.proxies.reconcile(now, views)
        self._bound.set()

    def _save(self) -> None:
        if self._keeper is None:
            return
        journal = None
        if self.detached and not self._ending:
            http = {**asdict(self.http), "port": self.proxies.port}
            journal = Journal(http=http, deployments=self._state.saved())
        self._keeper.save(journal)

    async def _saved(self) -> None:
        if self._keeper is not None:
            self._save()
            await self._keeper.saved()

    def _follow_load(self, now: float) -> None:
        queued, loads = self.publisher.queues.totals(), self.publisher.loads
        for trouble in self._state.follow_load(
            loads, queued, self._policies.ask, now=now
        ):
            logger.warning("%s", trouble)
        self._policies.forget(set(self._state.names()))

    def _give_up_silent(self, now: float) -> dict[str, list[int]]:
        """Part with replicas whose workers say nothing; return them by worker."""
        silent = self._health.look(now)
        self.proxies.note_silent(silent)
        lost: dict[str, list[int]] = {}
        if silent and not self._health.widespread:
            for worker, replica_id in self._state.workers_silent(silent, now=now):
                lost.setdefault(worker, []).append(replica_id)
                # It hears of it when it is back.
                self._discard(worker, replica_id)
        for worker, replica_ids in lost.items():
            logger.warning(
                "Worker %s has said nothing for %.0f s: its replicas %s are replaced",
                worker,
                silent[worker],
                replica_ids,
            )
        return lost

    def _perform(self, action: Action) -> None:
        if isinstance(action, StartReplica):
            self._launcher.launch(action)
        elif isinstance(action, StopReplica):
            self._command(
                action.worker,
                command="stop",
                replica_id=action.replica_id,
                grace_s=action.grace_s,
                poll_s=action.poll_s,
            )
        elif isinstance(action, ReconfigureReplica):
            self._command(
                action.worker,
                command="reconfigure",
                replica_id=action.replica_id,
                user_config=action.user_config,
                config_generation=action.config_generation,
            )
        elif isinstance(action, WatchReplica):
            self._command(
                action.worker,
                command="watch",
                replica_id=action.replica_id,
                period_s=action.period_s,
                timeout_s=action.timeout_s,
                abandoned_call_timeout_s=action.abandoned_call_timeout_s,
            )
        elif isinstance(action, ReleaseReplica):
            self._launcher.release(action.replica_id)
        elif isinstance(action, Settle):
            self._spawn(self._settle(action))

    def _start_ahead(self, worker: str, replica_id: int, spec: bytes) -> None:
        self._command(worker, command="start", replica_id=replica_id, spec=spec)

    def _command(self, worker: str, **details: Any) -> None:
        if worker in self._scheduler.stream_comms:
            message = {"op": STREAM_COMMAND, **details}
            self._scheduler.worker_send(worker, message)

    async def _settle(self, action: Settle) -> None:
        await self.publisher.wait_acked()
        await self._saved()
        future = self._waiting.pop(action.ticket, None)
        if future is not None and not future.done():
            future.set_result(action.error)

    async def _settled(self, ticket: int) -> Failure | None:
        future = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        self._wake.set()
        keep_values(self._scheduler, self._state.future_keys())
        result: Failure | None = await future
        keep_values(self._scheduler, self._state.future_keys())
        return result

    def _views(self) -> dict[str, WorkerView]:
        now, leaving = time.monotonic(), self.leaving
        return {
            address: WorkerView(
                address=address,
                host=ws.host,
                name=str(ws.name),
                nthreads=ws.nthreads,
                free_threads=ws.nthreads - len(ws.processing),
                resources=dict(ws.resources),
                accepting=ws.status == Status.running
                and self.publisher.has(address)
                and address not in self._health.silent
                and not self.is_ended(address, now),
                leaving=leaving.get(address, now),
                lasts=leaving.lasts(address, now),
            )
            for address, ws in self._scheduler.workers.items()
        }

    async def _wait_for_workers(self) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                while self._silent_workers():
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            logger.warning(
                "daskserve's plugin is not set up within %g s on %s",
                HELLO_TIMEOUT_S,
                self._silent_workers(),
            )

    def _silent_workers(self) -> list[str]:
        return [a for a in self._scheduler.workers if not self.publisher.has(a)]

    def _spawn(self, awaitable: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(awaitable)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("A task of the controller failed", exc_info=task.exception())


def _new_suffix() -> str:
    return "".join(random.choices(string.ascii_letters + string.digits, k=6))
