"""A replica's own Dask clients, for the code in it; in a worker.

One for sync code, on the worker's loop, and one for async code, on the replica's. What
a request submits is cancelled along with the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Generator, Iterable
from typing import Any, cast

from distributed import Client, Future, futures_of

from daskserve.exceptions import ServeError
from daskserve.replica.context import current_replica
from daskserve.transport.security import client_security

#: How long one may take to close.
CLOSE_TIMEOUT_S = 2.0


class ReplicaFuture(Future[Any]):
    """A future of the client for sync code, that async code may await all the same."""

    def __await__(self) -> Generator[Any, None, Any]:
        return value_of(self).__await__()


async def value_of(future: Future[Any]) -> Any:
    """Return the value of a future of whatever client; on any loop."""
    loop = cast(Any, future).client.loop.asyncio_loop
    result = cast(Any, future)._result()
    if loop is asyncio.get_running_loop():
        return await result
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(result, loop))


class RequestClient(Client):
    """A Dask client that remembers for which request it was asked for something."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.submit`."""
        return self._noted(super().submit(*args, **kwargs))

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.map`."""
        return self._noted(super().map(*args, **kwargs))

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.compute`."""
        client: Any = super()
        return self._noted(client.compute(*args, **kwargs))

    def persist(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.persist`."""
        client: Any = super()
        return self._noted(client.persist(*args, **kwargs))

    def _noted(self, result: Any) -> Any:
        futures = [result] if isinstance(result, Future) else futures_of(result)
        if not cast(Any, self)._asynchronous:
            for future in futures:
                future.__class__ = ReplicaFuture
        context = current_replica.get()
        if context is not None:
            if context._children is None:
                context._children = set()
            mine = (child for child in context._children if _is_of(child, self))
            submitted = next(mine, None)
            if submitted is None:
                context._children.add(submitted := _Submitted(self))
            submitted.add(futures)
        return result


class _Submitted:
    """Futures of a request; has the method by which requests cancel what they began.

    It does not keep them: what user code drops, Dask forgets.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._futures: weakref.WeakValueDictionary[int, Future[Any]] = (
            weakref.WeakValueDictionary()
        )

    def add(self, futures: Iterable[Future[Any]]) -> None:
        for future in futures:
            self._futures[id(future)] = future

    def cancel(self) -> None:
        """Cancel what has not ended; any thread."""
        client: Any = self.client
        futures = list(self._futures.values())

        async def cancel() -> None:
            with contextlib.suppress(Exception):  # it is closing
                await client._cancel(futures)

        client.loop.add_callback(cancel)


def _is_of(child: object, client: Client) -> bool:
    return isinstance(child, _Submitted) and child.client is client


class ReplicaClients:
    """The clients of one replica, made when they are first asked for.

    Parameters
    ----------
    worker
        The Dask worker.
    loop
        The replica's loop.
    """

    def __init__(self, worker: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._loop = loop
        self._lock = threading.Lock()
        self._sync: RequestClient | None = None
        self._async: RequestClient | None = None
        self._closed = False

    def get(self) -> RequestClient:
        """Return the one for the code that is running; any thread."""
        running = None
        with contextlib.suppress(RuntimeError):
            running = asyncio.get_running_loop()
        if running is not None and running is not self._loop:
            raise ServeError(
                "get_client() was called on an event loop that is not the replica's: "
                "there is a client for the replica's async code, and one for threads"
            )
        if running is None:
            return self.get_sync()
        with self._lock:
            self._check()
            self._async = self._async or self._make(asynchronous=True)
            return self._async

    def get_sync(self) -> RequestClient:
        """Return the one for sync code; it works, and blocks, on the loop, too."""
        with self._lock:
            self._check()
            # On the worker's loop, which has not to wait for this thread's lock.
            self._sync = self._sync or self._make(loop=self._worker.loop)
            return self._sync

    def _check(self) -> None:
        if self._worker is None:
            raise ServeError("an app that was run with local=True has no cluster")
        if self._closed:
            raise ServeError("the replica is stopping: it gets no Dask client")

    def _make(self, **options: Any) -> RequestClient:
        worker, make = self._worker, cast(Any, RequestClient)
        client: RequestClient = make(
            worker.scheduler.address,
            security=client_security(worker.security, "worker"),
            direct_to_workers=True,
            set_as_default=False,
            name="daskserve-replica",
            **options,
        )
        return client

    async def close(self) -> None:
        """Close both, and with them what they hold; on the replica's loop."""
        with self._lock:
            self._closed = True
            async_one: Any = self._async
            sync_one: Any = self._sync
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if async_one is not None:
                    await async_one.close()
                if sync_one is not None:
                    await asyncio.to_thread(sync_one.close, CLOSE_TIMEOUT_S)


def worker_of_replica(worker: Any, clients: ReplicaClients) -> Any:
    """Return a worker in the guise in which a replica's code sees it.

    It is the same, but for what `distributed.get_client` returns there.
    """

    class ReplicaWorker(type(worker)):  # type: ignore[misc]
        def _get_client(self, timeout: float | None = None) -> RequestClient:
            return clients.get_sync()

    same = object.__new__(ReplicaWorker)
    same.__dict__ = worker.__dict__
    return same


def get_client() -> Client:
    """Return a Dask client of the replica's own cluster.

    Tasks that a request submits with it are cancelled when the request is. It works on
    workers with one thread: replicas do not hold the threads of tasks.

    Returns
    -------
    distributed.Client
        In sync code (sync methods, threads that inherit their context) an ordinary one.
        In async code an asynchronous one, to be awaited as ever:
        ``client = await serve.get_client()``. It is the same each time; do not close
        it.

    Raises
    ------
    ServeError
        Not called from a replica.

    Examples
    --------
    >>> @serve.deployment
    ... class Total:
    ...     async def __call__(self, request):
    ...         client = await serve.get_client()
    ...         return await client.submit(sum, await request.json())
    """
    context = current_replica.get()
    if context is None or context._replica is None:
        raise ServeError(
            "get_client() was called outside of a replica: elsewhere use "
            "distributed.get_client() or distributed.Client(...)"
        )
    client: Client = context._replica.clients.get()
    return client
