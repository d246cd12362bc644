"""The scheduler plugin: Dask's hooks and the ops that clients call. Scheduler.

It decides nothing: hooks and ops go on to the `Instance`, errors come back as plain
dicts that `session.Session.rpc` raises again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from distributed import Scheduler
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState

from daskserve.config import Settings
from daskserve.controller.actions import Failure
from daskserve.controller.awake import keep_awake
from daskserve.controller.departures import Departures
from daskserve.controller.health import Trouble
from daskserve.controller.instance import Instance
from daskserve.controller.keeper import StateKeeper
from daskserve.controller.launcher import forget_actor, is_ours
from daskserve.controller.proxy_manager import HTTPConfig
from daskserve.controller.records import Spec
from daskserve.controller.relay import relay
from daskserve.exceptions import (
    ProxyStartError,
    ServeError,
    ServeNotRunningError,
)
from daskserve.transport.messages import (
    OP_RELAY,
    STREAM_ACK,
    STREAM_BYE,
    STREAM_END,
    STREAM_HEALTH,
    STREAM_HELLO,
    STREAM_LOAD,
    STREAM_QUEUED,
    STREAM_REPLICA,
)
from daskserve.transport.streams import never_raises

logger = logging.getLogger(__name__)

Handler = Callable[..., Coroutine[Any, Any, dict[str, Any]]]

NAME, NANNY_NAME = "daskserve", "daskserve-nanny"
#: How long nannies may take to load our plugin.
NANNIES_S = 30.0


def _answers(function: Callable[..., Coroutine[Any, Any, Any]]) -> Handler:
    """Make an op of a method: its result, or what it raised, in a plain dict."""

    @functools.wraps(function)
    async def handler(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            result = await function(*args, **kwargs)
        except (ServeError, KeyError, TypeError, ValueError) as err:
            text = str(err.args[0]) if err.args else str(err)
            return {"status": "error", "kind": type(err).__name__, "text": text}
        if isinstance(result, Failure):
            return {"status": "error", **dataclasses.asdict(result)}
        return {"status": "OK", "result": result}

    return handler


class ServeController(SchedulerPlugin):
    """daskserve's part of the scheduler.

    Parameters
    ----------
    keeper
        Of the state file, with ``--preload daskserve --state``.
    worker_plugin, nanny_plugin
        The pickled plugins, for an instance that is brought back.
    """

    name = NAME
    idempotent = True

    def __init__(
        self,
        keeper: StateKeeper | None = None,
        worker_plugin: bytes = b"",
        nanny_plugin: bytes = b"",
    ) -> None:
        self._keeper = keeper
        self._worker_plugin = worker_plugin
        self._nanny_plugin = nanny_plugin
        self._scheduler: Scheduler | None = None
        self._instance: Instance | None = None
        self._departures: Departures | None = None
        self._starting = asyncio.Lock()
        #: The newest routing that was given out.
        self._version = -1
        #: Clients with handles, which outlive an instance: they get the next one's.
        self._clients: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return ServeController, ()

    # Dask's hooks.

    async def start(self, scheduler: Scheduler) -> None:
        """Add our ops to the scheduler; once, though Dask may call twice."""
        if self._scheduler is not None:
            return
        self._scheduler = scheduler
        self._departures = Departures(
            scheduler, lambda: self._instance, self.serve_shutdown
        )
        for op in (
            self.serve_start,
            self.serve_info,
            self.serve_deploy,
            self.serve_delete,
            self.serve_run,
            self.serve_app,
            self.serve_delete_app,
            self.serve_get,
            self.serve_list,
            self.serve_history,
            self.serve_rollback,
            self.serve_status,
            self.serve_subscribe,
            self.serve_shutdown,
        ):
            scheduler.handlers[op.__name__] = op
        scheduler.handlers[OP_RELAY] = self._relay
        scheduler.stream_handlers[STREAM_HELLO] = self._hello
        scheduler.stream_handlers[STREAM_END] = self._end_told
        scheduler.stream_handlers[STREAM_ACK] = self._ack
        scheduler.stream_handlers[STREAM_BYE] = self._bye
        scheduler.stream_handlers[STREAM_QUEUED] = self._queued
        scheduler.stream_handlers[STREAM_LOAD] = self._load
        scheduler.stream_handlers[STREAM_REPLICA] = self._replica_news
        scheduler.stream_handlers[STREAM_HEALTH] = self._health_report
        keep_awake(
            scheduler, lambda: bool(self._instance and self._instance.keeps_awake)
        )
        if self._keeper is not None:
            await self._restore(self._keeper)

    async def _restore(self, keeper: StateKeeper) -> None:
        """Bring back what an earlier scheduler had; before anybody connects."""
        assert self._scheduler is not None
        journal = await keeper.load()
        if journal is None:
            return
        names = [d.name for d in journal.deployments]
        logger.info("Bringing back what was deployed, from %s: %s", keeper.name, names)
        try:
            self._instance = Instance.restored(self._scheduler, journal, keeper)
        except Exception as err:  # written by another daskserve, or by hand
            await keeper.refuse(ValueError(f"it does not hold what it should: {err!r}"))
            return
        self._spawn(self._resume(self._instance))

    async def _resume(self, instance: Instance) -> None:
        assert self._scheduler is not None
        try:
            await self._scheduler  # it is about to start
            await self._scheduler.register_worker_plugin(
                comm=None, plugin=self._worker_plugin, name=NAME, idempotent=False
            )
            self._spawn(self._reach_nannies(self._nanny_plugin))
            await instance.resume()
        except Exception:
            logger.exception("What was deployed cannot be brought back")
            await self._end()

    async def before_close(self) -> None:
        """End with the scheduler."""
        instance, self._instance = self._instance, None
        if instance is not None:
            await instance.close()
        if self._keeper is not None:
            await self._keeper.close()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Look again: there may be room now."""
        if self._instance is not None:
            self._instance.look()

    def remove_worker(
        self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **kwargs: Any
    ) -> None:
        """Replace what was on a worker that has gone."""
        if self._instance is not None:
            self._instance.worker_removed(worker)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """End an instance that is not detached with the client that started it."""
        self._bye(client)
        if self._instance is None:
            return
        if client == self._instance.owner and not self._instance.detached:
            logger.info("Client %s has gone and its instance ends with it", client)
            self._spawn(self.serve_shutdown())

    def restart(self, scheduler: Scheduler) -> None:
        """Replace everything: all actors are gone."""
        if self._instance is not None:
            self._instance.restarted()

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Choose the workers that ``adapt()`` may close."""
        return workers if self._departures is None else self._departures.spare(workers)

    def log_event(self, topic: str, msg: Any) -> None:
        """Notice that a nanny ends its worker, which will say that it leaves."""
        if topic == "worker-restart-memory" and self._instance is not None:
            self._instance.worker_over_memory(msg["worker"], msg["rss"])

    def transition(
        self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any
    ) -> None:
        """Notice an actor of ours that somebody cancelled, or that never came to be."""
        # Called for each transition of each task on the cluster.
        if start == "memory" and self._instance is not None:
            self._instance.key_left_memory(key)
        elif start == "processing" and finish == "released" and is_ours(key):
            assert self._scheduler is not None
            forget_actor(self._scheduler, key)

    # Streams.

    @never_raises
    def _hello(self, worker: str) -> None:
        if self._instance is not None:
            self._instance.hello(worker)

    @never_raises
    def _end_told(self, worker: str, ending: dict[str, Any] | None) -> None:
        if self._instance is not None:
            self._instance.worker_ends(worker, ending)

    @never_raises
    def _ack(
        self, version: int, worker: str | None = None, client: str | None = None
    ) -> None:
        subscriber = worker or client
        if self._instance is not None and subscriber is not None:
            self._instance.publisher.acked(subscriber, version)

    @never_raises
    def _queued(
        self,
        queued: dict[str, int],
        worker: str | None = None,
        client: str | None = None,
    ) -> None:
        subscriber = worker or client
        if self._instance is not None and subscriber is not None:
            if self._instance.publisher.has(subscriber):
                self._instance.publisher.queues.report(subscriber, queued)

    @never_raises
    def _load(
        self,
        interval_s: float,
        loads: dict[str, Any],
        worker: str | None = None,
        client: str | None = None,
    ) -> None:
        subscriber = worker or client
        if self._instance is not None and subscriber is not None:
            publisher = self._instance.publisher
            if publisher.has(subscriber):
                now = time.monotonic()
                publisher.loads.report(subscriber, interval_s, loads, now)

    @never_raises
    def _bye(self, client: str) -> None:
        self._clients.discard(client)
        if self._instance is not None:
            self._instance.publisher.unsubscribe(client)

    @never_raises
    def _replica_news(self, worker: str, replica_id: int, news: dict[str, Any]) -> None:
        if self._instance is not None:
            self._instance.replica_news(worker, replica_id, news)

    @never_raises
    def _health_report(
        self,
        worker: str,
        period_s: float,
        patience_s: float,
        troubles: list[Trouble],
        files: str = "",
    ) -> None:
        if self._instance is not None:
            self._instance.health_report(worker, period_s, patience_s, troubles, files)

    async def _reach_nannies(self, plugin: bytes) -> None:
        """Have our part in nannies, now and later; nobody waits for that."""
        assert self._scheduler is not None
        scheduler = self._scheduler
        # Not by `register_nanny_plugin`: while one nanny hangs, no other could come.
        scheduler.nanny_plugins[NANNY_NAME] = plugin
        message = {"op": "plugin_add", "plugin": plugin, "name": NANNY_NAME}
        try:
            async with asyncio.timeout(NANNIES_S):
                await scheduler.broadcast(msg=message, nanny=True, on_error="ignore")
        except Exception as err:  # they may be where the scheduler does not reach
            logger.info("Some nanny has no part of ours: %r", err)

    # Ops.

    @_answers
    async def serve_start(
        self,
        http: dict[str, Any],
        detached: bool,
        client: str,
        worker_plugin: bytes,
        nanny_plugin: bytes,
    ) -> dict[str, Any]:
        """Start an instance, or return what runs already."""
        assert self._scheduler is not None
        async with self._starting:
            if self._instance is not None:
                await self._instance.ready()
                return {**self._info(self._instance), "started": False}
            instance = Instance(
                self._scheduler,
                HTTPConfig(**http),
                detached=detached,
                owner=client,
                keeper=self._keeper,
            )
            instance.publisher.rise_above(self._version)
            self._instance = instance  # workers say hello to it
            try:
                await self._scheduler.register_worker_plugin(
                    comm=None, plugin=worker_plugin, name=NAME, idempotent=False
                )
                self._spawn(self._reach_nannies(nanny_plugin))
                errors = await instance.start()
            except BaseException:
                await self._end()
                raise
            if errors:
                await self._end()
                raise ProxyStartError("; ".join(errors))
            for waiting in self._clients:
                instance.publisher.subscribe(waiting)
            if not detached and client not in self._scheduler.clients:
                # It has gone meanwhile, and nobody else will end it.
                self._spawn(self.serve_shutdown())
            return {**self._info(instance), "started": True}

    @_answers
    async def serve_info(self) -> dict[str, Any]:
        """Return what `connect` needs."""
        instance = self._running()
        await instance.ready()
        return self._info(instance)

    @_answers
    async def serve_deploy(
        self, spec: dict[str, Any], prev_version: str | None
    ) -> Failure | None:
        """Deploy, and answer when that is settled."""
        instance = self._running()
        wish = instance.apps.kept_together(Spec.from_message(spec))
        return await instance.deploy(wish, prev_version)

    @_answers
    async def serve_delete(self, name: str) -> Failure | None:
        """Delete, and answer when nothing of it is left."""
        return await self._running().delete(name)

    @_answers
    async def serve_run(
        self, app: str, stages: list[list[dict[str, Any]]]
    ) -> Failure | None:
        """Deploy an app, in the place of what it was, and answer when it is settled."""
        wishes = [
            [(Spec.from_message(each["spec"]), each["prev_version"]) for each in stage]
            for stage in stages
        ]
        return await self._running().apps.run(app, wishes)

    @_answers
    async def serve_app(self, app: str) -> list[str]:
        """Return the names of an app's deployments, the ingress last."""
        return self._running().apps.names(app)

    @_answers
    async def serve_delete_app(self, app: str) -> Failure | None:
        """Delete an app, and answer when nothing of it is left."""
        return await self._running().apps.delete(app)

    @_answers
    async def serve_get(self, name: str) -> dict[str, Any]:
        """Return a deployment's code and options, which are opaque here."""
        spec = self._running().spec(name)
        return {"code": spec.code, "options": spec.options}

    @_answers
    async def serve_list(self) -> dict[str, dict[str, Any]]:
        """Return code and options of all deployments, by name."""
        instance = self._running()
        specs = {name: instance.spec(name) for name in instance.names()}
        return {
            name: {"code": spec.code, "options": spec.options}
            for name, spec in specs.items()
        }

    @_answers
    async def serve_history(self, name: str) -> list[dict[str, Any]]:
        """Return the versions of a deployment that have served."""
        return self._running().history(name)

    @_answers
    async def serve_rollback(self, name: str, number: int | None) -> Failure | None:
        """Deploy a former version, and answer when that is settled."""
        return await self._running().rollback(name, number)

    @_answers
    async def serve_status(self) -> dict[str, Any]:
        """Return the status of everything."""
        return self._running().status()

    @_answers
    async def serve_subscribe(self, client: str, known: int = -1) -> dict[str, Any]:
        """Send snapshots to a client from now on; return the present one.

        It has the one numbered `known`, maybe of an earlier scheduler.
        """
        publisher = self._running().publisher
        publisher.rise_above(known)
        self._clients.add(client)
        publisher.subscribe(client)
        return {"version": publisher.version, "snapshot": publisher.snapshot}

    @_answers
    async def serve_shutdown(self) -> None:
        """End the instance; none running is fine."""
        async with self._starting:
            if self._instance is not None:
                await self._instance.shutdown()
                await self._end()

    async def _relay(self, comm: Any, to: str) -> Any:
        assert self._scheduler is not None
        await relay(self._scheduler, comm, to, Settings.load().connect_timeout_s)
        return Status.dont_reply

    # Parts.

    def _running(self) -> Instance:
        if self._instance is None:
            assert self._scheduler is not None
            known = f" ({self._keeper_reason})" if self._keeper_reason else ""
            raise ServeNotRunningError(
                f"no daskserve instance runs on the cluster at "
                f"{self._scheduler.address}: call serve.start() first{known}"
            )
        return self._instance

    @property
    def _keeper_reason(self) -> str:
        return "" if self._keeper is None else self._keeper.reason

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _info(self, instance: Instance) -> dict[str, Any]:
        return {
            "http_urls": instance.proxies.urls,
            "options": instance.http.options,
            "detached": instance.detached,
            "reason": self._keeper_reason,
        }

    async def _end(self) -> None:
        """Close what is left of the instance and take the plugin off the workers."""
        assert self._scheduler is not None
        instance, self._instance = self._instance, None
        if instance is not None:
            await instance.close()
            self._version = instance.publisher.version
        # As `Scheduler.unregister_worker_plugin` does, but leaving workers alone that
        # are closing, and so have taken it off already.
        if self._scheduler.worker_plugins.pop(NAME, None) is not None:
            running = [
                address
                for address, ws in self._scheduler.workers.items()
                if ws.status == Status.running
            ]
            message = {"op": "plugin-remove", "name": NAME}
            if running and self._scheduler.status == Status.running:
                await self._scheduler.broadcast(
                    msg=message, workers=running, on_error="return"
                )
