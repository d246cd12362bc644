"""A process's tie to one cluster: calls to the controller, and handles' way out.

A client process has a `ClientSession` for each Dask client; a worker has the one that
its plugin made. User code finds the one that fits by `current_session`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Hashable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol, TypeVar, cast

from distributed import Client, default_client, get_worker
from distributed.comm.addressing import get_address_host
from distributed.comm.core import connect
from distributed.utils_comm import gather_from_workers

from daskserve import exceptions
from daskserve.config import Settings
from daskserve.exceptions import ServeError, ServeNotRunningError
from daskserve.replica.actor import PLUGIN_NAME
from daskserve.replica.context import current_replica
from daskserve.transport import values
from daskserve.transport.calls import CallSender
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.loops import LoopThread
from daskserve.transport.messages import (
    OP_RELAY,
    STREAM_ACK,
    STREAM_BYE,
    STREAM_LOAD,
    STREAM_LOST,
    STREAM_QUEUED,
    STREAM_ROUTES,
)
from daskserve.transport.racing import discard, race
from daskserve.transport.relayed import RelayedComm

T = TypeVar("T")
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
logger = logging.getLogger(__name__)

#: How long after a worker could not be reached a new connection to it goes by way of
#: the scheduler at once.
DIRECT_AGAIN_S = 60.0
#: How long a connection to a worker may take before one by way of the scheduler is made
#: beside it; as browsers do with IPv6 and IPv4 (RFC 8305).
HEAD_START_S = 0.15

_BUILTIN_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (KeyError, RuntimeError, TypeError, ValueError)
}


class Session:
    """What `ClientSession` and `WorkerSession` share.

    Parameters
    ----------
    address
        The scheduler's address, for errors.
    connection_args
        How comms of this process are opened: the cluster's TLS.
    """

    def __init__(self, address: str, connection_args: Mapping[str, Any]) -> None:
        self.address = address
        self.settings = Settings.load()
        self._connection_args = dict(connection_args)
        self._calls: CallSender | None = None
        _sessions.add(self)

    async def rpc(self, op: str, **message: Any) -> Any:
        """Call the controller; on Dask's loop.

        Raises
        ------
        ServeNotRunningError
            The scheduler knows nothing of daskserve.
        Exception
            What the controller answered: an error of ours, `ValueError` and the like.
        """
        try:
            reply = await self._call_scheduler(op, message)
        except OSError as err:
            raise ServeNotRunningError(
                f"the scheduler at {self.address} does not answer: {err}"
            ) from err
        if reply is None:
            raise ServeNotRunningError(
                f"no daskserve instance runs on the cluster at {self.address}: call "
                f"serve.start() first"
            )
        if reply.get("status") == "error":
            kind, text = reply["kind"], reply["text"]
            error = getattr(exceptions, kind, None) or _BUILTIN_ERRORS.get(kind)
            cause = values.load_error(reply.get("cause"))
            if cause is None or cause.__traceback__ is None:
                text = "\n\n".join(filter(None, [text, reply.get("traceback")]))
            raise (error or ServeError)(text) from cause
        self._controller_answered()
        return reply.get("result")

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Any:
        """Run a coroutine function on Dask's loop: block, or return an awaitable."""
        raise NotImplementedError  # pragma: no cover

    @property
    def dispatcher(self) -> Dispatcher:
        """The process's way to the replicas."""
        raise NotImplementedError  # pragma: no cover

    @property
    def calls(self) -> CallSender:
        """Where handle calls of this process go out."""
        dispatcher = self.dispatcher
        sender = self._calls
        if sender is None or sender.dispatcher is not dispatcher:
            sender = self._calls = CallSender(dispatcher)
        return sender

    async def _call_scheduler(self, op: str, message: dict[str, Any]) -> Any:
        raise NotImplementedError  # pragma: no cover

    def _controller_answered(self) -> None:
        """Note that there is an instance; on Dask's loop."""

    @property
    def context(self) -> ssl.SSLContext | None:
        """The cluster's TLS, as Dask uses it for connections of this process."""
        context: ssl.SSLContext | None = self._connection_args.get("ssl_context")
        return context

    async def connect(self, address: str) -> Any:
        """Open a comm to a worker; on any loop."""
        return await connect(
            address,
            timeout=self.settings.connect_timeout_s,
            **self._connection_args,
        )


class Server(Protocol):
    """What lives in the transport thread of a client besides."""

    def instance_may_be_new(self) -> None:
        """Note that another instance may have come; on the transport loop."""

    async def stop(self) -> None:
        """End; on the transport loop."""


class ClientSession(Session):
    """A Dask client's tie to its cluster.

    Parameters
    ----------
    client
        The client, synchronous or not.
    """

    def __init__(self, client: Client) -> None:
        super().__init__(_address(client), client.connection_args)
        # A client that nobody else holds is to close as ever.
        self._client = weakref.ref(client)
        self._thread: LoopThread | None = None
        self._dispatcher: Dispatcher | None = None
        self._lock = threading.Lock()
        #: Workers that could not be reached from here, and until when that counts.
        self._relayed: dict[str, float] = {}
        #: The connection on which snapshots come; None if none do.
        self._subscribed_on: Any = None
        #: Whether the controller has ever answered.
        self._answered = False
        #: HTTP servers on the transport loop, which end before it.
        self.servers: set[Server] = set()

    @property
    def client(self) -> Client:
        """The Dask client."""
        client = self._client()
        if client is None or client.status in ("closing", "closed"):
            raise ServeNotRunningError(
                f"the Dask client of the cluster at {self.address} is closed"
            )
        return client

    @property
    def dispatcher(self) -> Dispatcher:
        """Where handle calls of this process go out; its thread starts on first use."""
        with self._lock:
            if self._dispatcher is None:
                self._dispatcher = self._start_dispatcher()
            return self._dispatcher

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Any:
        """Run a coroutine function on the client's loop, as its own methods do."""
        try:
            return self.client.sync(function, *args)
        except (ServeError, KeyError, ValueError) as err:
            # The way there, through loops and threads, says nothing to users.
            raise err.with_traceback(None) from err.__cause__

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the transport loop; any thread.

        Raises
        ------
        RuntimeError
            There is none.
        """
        if self._thread is None:
            coroutine.close()
            raise RuntimeError("the transport thread has ended")
        return self._thread.submit(coroutine)

    def close(self) -> None:
        """End the transport thread; the session can be used again."""
        with self._lock:
            self._subscribed_on = None
            thread, self._thread = self._thread, None
            dispatcher, self._dispatcher = self._dispatcher, None
        if thread is not None and dispatcher is not None:
            client = self._client()
            if client is not None and client.status == "running":
                _loop(client).add_callback(
                    client._send_to_scheduler, {"op": STREAM_BYE}
                )
            with contextlib.suppress(RuntimeError, TimeoutError, CancelledError):
                for server in list(self.servers):
                    thread.submit(server.stop()).result(5)
                reason = "the Dask client that the call was made by is closed"
                thread.submit(dispatcher.close(reason)).result(5)
            thread.stop()

    async def connect(self, address: str) -> Any:
        """Open a comm to a worker, by way of the scheduler if need be; on any loop.

        Where a firewall drops what is sent, it takes long to know that nothing comes.
        """
        if self._relayed.get(address, 0.0) > time.monotonic():
            return await self._connect_relayed(address)
        comm, direct = await race(
            functools.partial(super().connect, address),
            functools.partial(self._connect_relayed, address),
            HEAD_START_S,
        )
        if direct is not None:
            self._relayed[address] = time.monotonic() + DIRECT_AGAIN_S
            direct.add_done_callback(functools.partial(self._tried, address))
        return comm

    async def _connect_relayed(self, address: str) -> Any:
        comm = await super().connect(self.address)
        await comm.write({"op": OP_RELAY, "to": address, "reply": False})
        return RelayedComm(comm, address)

    def _tried(self, address: str, direct: asyncio.Future[Any]) -> None:
        """Note what became of a direct connection that was waited for no longer."""
        if direct.cancelled():
            return
        if (error := direct.exception()) is None:
            self._relayed.pop(address, None)  # the next one is direct again
            discard(direct)
        else:
            logger.info("%s is reached by way of the scheduler: %s", address, error)

    async def _call_scheduler(self, op: str, message: dict[str, Any]) -> Any:
        if not self._answered and not await self._is_known(op):
            return None
        return await getattr(self.client.scheduler, op)(**message)

    async def _is_known(self, op: str) -> bool:
        """Ask whether there is an op: Dask logs a traceback where there is none."""

        def has_daskserve(op: str, dask_scheduler: Any) -> bool:
            return op in dask_scheduler.handlers

        try:
            known: bool = await self.client._run_on_scheduler(has_daskserve, op)
        except Exception:  # it runs no functions, or cannot be reached
            return True
        return known

    def _start_dispatcher(self) -> Dispatcher:
        client = self.client
        self._thread = thread = LoopThread("daskserve-client")
        thread.start()
        dispatcher = Dispatcher(
            thread.loop,
            self.connect,
            context=self.context,
            silence_s=self.settings.silence_timeout_s,
        )
        dispatcher_ref = weakref.ref(dispatcher)
        client_ref = self._client
        servers = self.servers

        def take_routes(
            version: int, snapshot: dict[str, Any], base: int | None = None
        ) -> None:
            dispatcher = dispatcher_ref()
            client = client_ref()
            if dispatcher is None or client is None:
                return

            async def take() -> None:
                if base is None and version > dispatcher.version:
                    for server in servers:
                        server.instance_may_be_new()
                if not dispatcher.update(version, snapshot, base):
                    _loop(client).add_callback(self._subscribe)  # for a whole one
                    return
                await dispatcher.connected()
                _loop(client).add_callback(
                    client._send_to_scheduler, {"op": STREAM_ACK, "version": version}
                )

            with contextlib.suppress(RuntimeError):  # the thread has stopped
                thread.submit(take())

        def take_lost(worker: str, replicas: list[int] | None = None) -> None:
            dispatcher = dispatcher_ref()
            if dispatcher is not None:
                thread.call_soon(dispatcher.worker_lost, worker, replicas)

        def take_queued(queued: dict[str, int]) -> None:
            dispatcher = dispatcher_ref()
            if dispatcher is not None:
                thread.call_soon(dispatcher.queues.take_elsewhere, queued)

        def send(message: dict[str, Any]) -> None:
            client = client_ref()
            if client is not None and client.status == "running":
                _loop(client).add_callback(client._send_to_scheduler, message)

        dispatcher.queues.send = lambda queued: send(
            {"op": STREAM_QUEUED, "queued": queued}
        )
        dispatcher.loads.send = lambda interval_s, loads: send(
            {"op": STREAM_LOAD, "interval_s": interval_s, "loads": loads}
        )
        client._stream_handlers[STREAM_ROUTES] = take_routes
        client._stream_handlers[STREAM_LOST] = take_lost
        client._stream_handlers[STREAM_QUEUED] = take_queued
        _loop(client).add_callback(self._subscribe)
        thread.submit(_close_with_client(client_ref, self))
        return dispatcher

    async def _subscribe(self) -> None:
        client = self.client
        self._subscribed_on = client.scheduler_comm
        try:
            snapshot = await self.rpc(
                "serve_subscribe", client=client.id, known=self._known_version()
            )
        except ServeNotRunningError:
            self._subscribed_on = None  # until the controller answers something
        else:
            take_routes: Any = client._stream_handlers[STREAM_ROUTES]
            take_routes(**snapshot)

    def _known_version(self) -> int:
        dispatcher = self._dispatcher
        return -1 if dispatcher is None else dispatcher.version

    def _controller_answered(self) -> None:
        self._answered = True
        client = self._client()
        if self._dispatcher is not None and client is not None:
            if self._subscribed_on is not client.scheduler_comm:
                _loop(client).add_callback(self._subscribe)

    def follow_reconnection(self, client: Client) -> None:
        """Subscribe again if the client's connection is a new one; any thread."""
        lost = self._subscribed_on not in (None, client.scheduler_comm)
        if lost and client.status == "running":
            _loop(client).add_callback(self._subscribe)


def _address(client: Client) -> str:
    scheduler: Any = client.scheduler
    if scheduler is None:
        raise ServeNotRunningError(
            f"{client} is not connected: an asynchronous client is to be awaited first"
        )
    address: str = scheduler.address
    return address


def _loop(client: Client) -> Any:
    return client.loop


async def _close_with_client(
    client_ref: weakref.ref[Client], session: ClientSession
) -> None:
    """Wait on the transport loop for the client's end; threads do not outlive it."""
    while (client := client_ref()) is not None and client.status != "closed":
        session.follow_reconnection(client)
        del client
        await asyncio.sleep(0.5)
    threading.Thread(target=session.close, name="daskserve-close", daemon=True).start()


class WorkerSession(Session):
    """A worker's tie to its cluster; made by the worker plugin.

    Parameters
    ----------
    worker
        The Dask worker.
    make_dispatcher
        Makes the dispatcher, which the worker's proxy uses too, from how to connect.
    """

    def __init__(
        self,
        worker: Any,
        make_dispatcher: Callable[[Callable[[str], Any]], Dispatcher],
    ) -> None:
        super().__init__(worker.scheduler.address, worker.connection_args)
        self.worker = worker
        self._dispatcher = make_dispatcher(self.connect)

    @property
    def dispatcher(self) -> Dispatcher:
        """Where handle calls of this process go out."""
        return self._dispatcher

    def direct_listener(self) -> tuple[str, ssl.SSLContext | None, str] | None:
        """Return where replicas open ports; None: nowhere.

        Returns
        -------
        tuple of (str, ssl.SSLContext or None, str)
            The address to listen on, with which TLS, and the host as callers know it.
        """
        address = self.worker.address
        if not self.settings.direct or not address.startswith(("tcp://", "tls://")):
            return None
        context = None
        if address.startswith("tls://"):
            context = self.worker.security.get_listen_args("worker")["ssl_context"]
        # What `--contact-address` gave can be a name, which on its own host often means
        # a loopback address, or belong to a router: here it may not do to listen on.
        host = get_address_host(self.worker.listener.contact_address)
        return host, context, get_address_host(address)

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Any:
        """Run a coroutine function on the worker's loop.

        On that very loop, where async Dask tasks run, the result is to be awaited.
        """
        if threading.get_ident() == self.worker.thread_id:
            return function(*args)
        loop = self.worker.loop.asyncio_loop
        return asyncio.run_coroutine_threadsafe(function(*args), loop).result()

    async def gather(self, keys: tuple[Hashable, ...]) -> dict[Hashable, Any]:
        """Fetch the values of finished Dask tasks from the workers that have them.

        On any loop.

        Raises
        ------
        ServeError
            A value is not on the cluster any more.
        """

        async def fetch() -> dict[Hashable, Any]:
            # What is here is not copied, as for tasks.
            data = self.worker.data
            here: dict[Hashable, Any] = {k: data[k] for k in keys if k in data}
            elsewhere = [key for key in keys if key not in here]
            if not elsewhere:
                return here
            who_has = await self.worker.scheduler.who_has(keys=elsewhere)
            fetched, missing, failed, _ = await gather_from_workers(
                who_has, rpc=self.worker.rpc, who=self.worker.address
            )
            if missing or failed:
                raise ServeError(
                    f"the value of the Dask future {[*missing, *failed][0]!r} among "
                    f"the arguments is not on the cluster any more"
                )
            here |= cast("dict[Hashable, Any]", fetched)
            return here

        loop = self.worker.loop.asyncio_loop
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(fetch(), loop)
        )

    async def _call_scheduler(self, op: str, message: dict[str, Any]) -> Any:
        return await getattr(self.worker.scheduler, op)(**message)


class ForkedSession(Session):
    """What a session is in a forked child: the threads that it lives by are not there.

    All that would wait for them says so instead.
    """

    @property
    def dispatcher(self) -> Dispatcher:
        """There is none."""
        raise self.error()

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Any:
        """Refuse."""
        raise self.error()

    def error(self) -> ServeNotRunningError:
        """Say what happened, and what to do."""
        return ServeNotRunningError(
            f"this process is a forked child: it has no threads of daskserve, or of "
            f"Dask's client of {self.address}. Start it by "
            f"multiprocessing.get_context('spawn'), or make a distributed.Client in it"
        )


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    for session in list(_sessions):
        session.__class__ = ForkedSession


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_client_sessions: weakref.WeakKeyDictionary[Client, ClientSession] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()
#: The sessions of this process's workers; in life there is one worker a process.
worker_sessions: dict[str, WorkerSession] = {}


def client_session(client: Client) -> ClientSession:
    """Return the session of a client, the same each time."""
    with _lock:
        session = _client_sessions.get(client)
        if session is None:
            session = _client_sessions[client] = ClientSession(client)
        return session


def current_session() -> Session:
    """Return the session of the code that is running.

    In a replica and in a Dask task it is their worker's, else the default client's.

    Raises
    ------
    ServeNotRunningError
        There is neither.
    """
    context = current_replica.get()
    if context is not None:
        session: Session = context._replica.session
        return session
    with contextlib.suppress(ValueError):
        plugin: Any = get_worker().plugins.get(PLUGIN_NAME)
        if plugin is not None:
            found: Session = plugin.session
            return found
    with contextlib.suppress(ValueError):
        return client_session(default_client())
    if len(worker_sessions) == 1:  # a thread that a replica's code started itself
        return next(iter(worker_sessions.values()))
    raise ServeNotRunningError(
        "there is no Dask client in this process: make a distributed.Client for your "
        "cluster, or call serve.start()"
    )
