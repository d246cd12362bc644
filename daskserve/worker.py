"""The worker plugin: replicas, channels to them, and the worker's HTTP proxy.

Set up by Dask on every worker, now and later. Nothing here blocks Dask's loop, and
nothing raises into it: what goes wrong becomes a message to the controller.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from distributed import Worker
from distributed.diagnostics.plugin import WorkerPlugin

from daskserve import pickling
from daskserve.config import HTTPOptions, Settings
from daskserve.leaving import Farewell
from daskserve.proxy.server import HTTPServer
from daskserve.proxy.windows import Windows
from daskserve.replica.actor import PLUGIN_NAME, ReplicaSpec
from daskserve.replica.health import HealthMonitor
from daskserve.replica.runner import STOP_MARGIN_S, Runner
from daskserve.session import WorkerSession, worker_sessions
from daskserve.transport.channel import serve_channel
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.files import raise_max_files
from daskserve.transport.load_reports import Loads
from daskserve.transport.loops import LoopThread
from daskserve.transport.messages import (
    OP_BIND,
    OP_CHANNEL,
    OP_SHARE,
    OP_UNBIND,
    OP_UNLISTEN,
    STREAM_ACK,
    STREAM_COMMAND,
    STREAM_END,
    STREAM_HELLO,
    STREAM_LOAD,
    STREAM_LOST,
    STREAM_QUEUED,
    STREAM_REPLICA,
    STREAM_ROUTES,
)
from daskserve.transport.streams import never_raises

logger = logging.getLogger(__name__)


class ServeWorkerPlugin(WorkerPlugin):
    """daskserve's part of a worker."""

    name = PLUGIN_NAME

    def __init__(self) -> None:
        self.runners: dict[int, Runner] = {}
        #: All that were started; an actor may find its replica there, or ended already.
        self._started: set[int] = set()
        self._starting = threading.Lock()
        self.session: WorkerSession | None = None
        self._worker: Worker | None = None
        self._thread: LoopThread | None = None
        self._health: HealthMonitor | None = None
        self._server: HTTPServer | None = None
        self._channels: set[Any] = set()
        self._closed = False
        self._farewell: Farewell | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ServeWorkerPlugin, ()

    # Dask's hooks.

    def setup(self, worker: Worker) -> None:
        """Add our ops to the worker, start the transport thread, say hello."""
        self._worker = worker
        raise_max_files()  # connections and replicas take some
        self._thread = thread = LoopThread("daskserve-transport")
        thread.start()

        def make_dispatcher(connect: Callable[[str], Any]) -> Dispatcher:
            return Dispatcher(
                thread.loop,
                connect,
                context=worker.connection_args.get("ssl_context"),
                local_address=worker.address,
                inboxes=self.runners,
                silence_s=Settings.load().silence_timeout_s,
            )

        self.session = WorkerSession(worker, make_dispatcher)
        self.session.dispatcher.queues.send = self._report_queued
        self.session.dispatcher.loads.send = self._report_load
        worker_sessions[worker.address] = self.session
        worker.handlers[OP_CHANNEL] = self._serve_channel
        worker.handlers[OP_BIND] = self._bind
        worker.handlers[OP_UNBIND] = self._unbind
        worker.handlers[OP_SHARE] = self._share
        worker.handlers[OP_UNLISTEN] = self._unlisten
        worker.stream_handlers[STREAM_ROUTES] = self._take_routes
        worker.stream_handlers[STREAM_LOST] = self._take_lost
        worker.stream_handlers[STREAM_QUEUED] = self._take_queued
        worker.stream_handlers[STREAM_COMMAND] = self._take_command
        self._farewell = Farewell(
            worker, self.session.settings, self._needs_s, self._tell_end
        )
        self._farewell.install()
        self._say_hello()
        where = f"worker {worker.address}"
        self._health = HealthMonitor(self.runners, self._send, where)
        thread.submit(self._health.run())

    async def teardown(self, worker: Worker) -> None:
        """Close everything, within a bounded time, and never raise."""
        self._closed = True  # our ops stay, for who has not heard of it yet
        worker_sessions.pop(worker.address, None)
        if self._farewell is not None:
            self._farewell.uninstall()
        try:
            async with asyncio.timeout(10):
                await self._unbind(drain_s=0)
                await asyncio.to_thread(self._close_threads)
        except Exception:
            logger.exception("daskserve could not be closed cleanly on %s", worker)
        for comm in list(self._channels):
            comm.abort()

    def _close_threads(self) -> None:
        for runner in list(self.runners.values()):
            runner.abandon()
        self.runners.clear()
        if self._thread is not None and self.session is not None:
            self._thread.submit(self.session.dispatcher.close()).result(5)
            self._thread.stop()

    def _say_hello(self) -> None:
        self._send({"op": STREAM_HELLO})
        self._tell_end()

    def _tell_end(self) -> None:
        assert self._farewell is not None
        self._send({"op": STREAM_END, "ending": self._farewell.ending()})

    def _needs_s(self) -> dict[int, float]:
        return {n: runner.needs_s for n, runner in list(self.runners.items())}

    # What the controller sends.

    @never_raises
    def _take_routes(
        self, version: int, snapshot: dict[str, Any], base: int | None = None
    ) -> None:
        if self._closed:
            return
        assert self._thread is not None and self.session is not None
        dispatcher = self.session.dispatcher

        async def take() -> None:
            if not dispatcher.update(version, snapshot, base):
                self._say_hello()  # a whole one comes in answer
                return
            await dispatcher.connected()
            self._send({"op": STREAM_ACK, "version": version})

        self._thread.submit(take())

    @never_raises
    def _take_lost(self, worker: str, replicas: list[int] | None = None) -> None:
        assert self._thread is not None and self.session is not None
        self._thread.call_soon(self.session.dispatcher.worker_lost, worker, replicas)

    @never_raises
    def _take_queued(self, queued: dict[str, int]) -> None:
        assert self._thread is not None and self.session is not None
        self._thread.call_soon(self.session.dispatcher.queues.take_elsewhere, queued)

    def _report_queued(self, queued: dict[str, int]) -> None:
        self._send({"op": STREAM_QUEUED, "queued": queued})

    def _report_load(self, interval_s: float, loads: Loads) -> None:
        self._send({"op": STREAM_LOAD, "interval_s": interval_s, "loads": loads})

    @never_raises
    def _take_command(self, command: str, replica_id: int, **details: Any) -> None:
        runner = self.runners.get(replica_id)
        if command == "stop":
            if runner is None:
                self._report(replica_id, {"event": "stopped"})
            else:
                runner.stop(**details)
                patience = details["grace_s"] + STOP_MARGIN_S
                assert self._worker is not None
                self._worker.loop.call_later(patience, self._give_up, replica_id)
        elif command == "start":
            try:
                self.start_replica(pickling.loads(details["spec"]))
            except Exception as err:
                text = f"the replica could not be started: {err!r}"
                news = {"event": "failed", "text": text, "cause": None}
                self._report(replica_id, news)
        elif command == "reconfigure" and runner is not None:
            runner.reconfigure(**details)
        elif command == "watch" and runner is not None:
            runner.rhythm = details["period_s"], details["timeout_s"]
            runner.abandoned_call_timeout_s = details["abandoned_call_timeout_s"]
            self._wake_health()

    async def _bind(
        self, options: bytes, port: int, share_port: bool, probe: bool
    ) -> dict[str, Any]:
        """Start an HTTP server, in the place of one that may run."""
        if self._closed:
            return {"error": "the worker is closing"}
        assert self._worker is not None and self._thread is not None
        assert self.session is not None
        await self._unbind(drain_s=0)
        try:
            http_options = pickling.loads(options)
            assert isinstance(http_options, HTTPOptions)
            settings = self.session.settings
            dispatcher = self.session.dispatcher
            server = HTTPServer(
                dispatcher,
                http_options,
                Windows(settings.proxy_buffer_bytes, settings.window_bytes),
                f"worker {self._worker.address}",
            )

            async def start() -> str:
                dispatcher.connect_ahead()
                return await server.start(
                    port=port,
                    share_port=share_port,
                    probe=probe,
                    routes=dispatcher.snapshot["routes"],
                )

            url = await asyncio.wrap_future(self._thread.submit(start()))
        except Exception as err:
            return {"error": str(err) or repr(err)}
        self._server = server
        return {"url": url, "port": server.port}

    async def _unbind(
        self, drain_s: float, idle_s: float | None = None
    ) -> dict[str, Any]:
        """Stop the HTTP server, if there is one; gently if `idle_s` is given."""
        server, self._server = self._server, None
        if server is not None and self._thread is not None:
            if idle_s is None:
                stop = server.stop(drain_s)
            else:
                stop = server.retire(drain_s, idle_s)
            await asyncio.wrap_future(self._thread.submit(stop))
        return {}

    async def _share(self, shared: bool) -> dict[str, Any]:
        """Let another process bind the port of the HTTP server, or no more."""
        if self._server is not None and self._thread is not None:
            self._thread.call_soon(self._server.share, shared)
        return {}

    async def _unlisten(self, others: int) -> dict[str, Any]:
        """Leave new connections to others that listen on the same port."""
        if self._server is not None and self._thread is not None:
            listening = self._server.unlisten(others)
            await asyncio.wrap_future(self._thread.submit(listening))
        return {}

    # Replicas.

    def start_replica(self, spec: ReplicaSpec) -> None:
        """Start a replica, once; called by the actor, or before it has a thread."""
        with self._starting:
            if spec.replica_id in self._started:
                return
            self._started.add(spec.replica_id)
        self._start_replica(spec)

    def _start_replica(self, spec: ReplicaSpec) -> None:
        assert self.session is not None

        def report(news: dict[str, Any]) -> None:
            self._report(spec.replica_id, news)

        window_bytes = self.session.settings.window_bytes
        runner = Runner(spec, report, self.session, window_bytes, self._wake_health)
        self.runners[spec.replica_id] = runner
        runner.start()
        self._wake_health()

    def _wake_health(self) -> None:
        assert self._thread is not None and self._health is not None
        self._thread.call_soon(self._health.wake)

    def _report(self, replica_id: int, news: dict[str, Any]) -> None:
        if news["event"] in ("stopped", "failed"):
            assert self._worker is not None
            self._worker.loop.add_callback(self._forget, replica_id)
        self._send({"op": STREAM_REPLICA, "replica_id": replica_id, "news": news})

    async def _forget(self, replica_id: int) -> None:
        runner = self.runners.pop(replica_id, None)
        if runner is not None:
            await asyncio.to_thread(runner.close)

    async def _give_up(self, replica_id: int) -> None:
        runner = self.runners.pop(replica_id, None)
        if runner is not None:
            logger.warning(
                "Replica %s does not stop: its user code blocks. Its threads are left "
                "to themselves.",
                runner.spec.tag,
            )
            await asyncio.to_thread(runner.abandon)
            self._report(replica_id, {"event": "stopped"})

    # Comms.

    async def _serve_channel(self, comm: Any, caller: str) -> None:
        if self._closed:
            comm.abort()
            return
        self._channels.add(comm)
        try:
            await serve_channel(comm, self.runners, caller)
        finally:
            self._channels.discard(comm)

    def _send(self, message: dict[str, Any]) -> None:
        """Send to the scheduler over the worker's stream; any thread."""
        worker = self._worker
        assert worker is not None

        def send() -> None:
            try:
                worker.batched_stream.send(message)
            except OSError:
                logger.debug("the scheduler is gone, dropped %s", message["op"])

        worker.loop.add_callback(send)
