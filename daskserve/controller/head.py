"""A proxy in the scheduler's process, where no worker shares its host.

It has a thread of its own; nothing of it runs on the scheduler's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from distributed import Scheduler
from distributed.comm.core import connect

from daskserve import pickling
from daskserve.config import HTTPOptions, Settings
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.files import raise_max_files
from daskserve.transport.load_reports import Loads
from daskserve.transport.loops import LoopThread


class HeadProxy:
    """The HTTP server of the scheduler's host.

    Parameters
    ----------
    scheduler
        Whose TLS settings are used for connections to workers.
    on_ack
        Told the number of each snapshot that took effect; on the scheduler's loop.
    on_queued
        Told how many requests wait here, by deployment; on the scheduler's loop.
    on_load
        The same of all requests, with the interval at which it is told.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        on_ack: Callable[[int], None],
        on_queued: Callable[[dict[str, int]], None],
        on_load: Callable[[float, Loads], None],
    ) -> None:
        self._scheduler = scheduler
        self._on_ack = on_ack
        raise_max_files()  # a scheduler that `dask scheduler` did not start has not
        self._thread = LoopThread("daskserve-head")
        self._thread.start()
        self._settings = Settings.load()
        context = scheduler.connection_args.get("ssl_context")
        self._dispatcher = Dispatcher(
            self._thread.loop,
            self._connect,
            context=context,
            silence_s=self._settings.silence_timeout_s,
        )
        self._dispatcher.ahead = True
        loop = asyncio.get_running_loop()
        self._dispatcher.queues.send = lambda queued: loop.call_soon_threadsafe(
            on_queued, queued
        )
        self._dispatcher.loads.send = lambda interval_s, loads: (
            loop.call_soon_threadsafe(on_load, interval_s, loads)
        )
        self._server: Any = None

    async def bind(
        self, options: bytes, port: int, routes: Any, share_port: bool
    ) -> dict[str, Any]:
        """Start the server; return its URL and port, or what went wrong."""
        # Only here does a scheduler need uvicorn.
        from daskserve.proxy.server import HTTPServer
        from daskserve.proxy.windows import Windows

        try:
            http_options = pickling.loads(options)
            assert isinstance(http_options, HTTPOptions)
            where = f"the scheduler at {self._scheduler.address}"
            settings = self._settings
            windows = Windows(settings.proxy_buffer_bytes, settings.window_bytes)
            server = HTTPServer(self._dispatcher, http_options, windows, where)
            starting = server.start(
                port=port, share_port=share_port, probe=False, routes=routes
            )
            url = await asyncio.wrap_future(self._thread.submit(starting))
        except Exception as err:
            return {"error": str(err) or repr(err)}
        self._server = server
        return {"url": url, "port": server.port}

    def share(self, shared: bool) -> None:
        """Let others of the same user bind the port as well, or nobody any more."""
        if self._server is not None:
            self._thread.call_soon(self._server.share, shared)

    def take_routes(self, version: int, snapshot: dict[str, Any]) -> None:
        """Pass a snapshot on to the server's thread."""
        loop = asyncio.get_running_loop()

        async def take() -> None:
            self._dispatcher.update(version, snapshot)
            await self._dispatcher.connected()
            loop.call_soon_threadsafe(self._on_ack, version)

        self._thread.submit(take())

    def worker_lost(self, address: str, replicas: list[int] | None = None) -> None:
        """Fail at once what waits for a worker that has gone, or for some replicas."""
        self._thread.call_soon(self._dispatcher.worker_lost, address, replicas)

    def take_queued(self, queued: dict[str, int]) -> None:
        """Note how many requests wait in other processes."""
        self._thread.call_soon(self._dispatcher.queues.take_elsewhere, queued)

    async def close(self, drain_s: float) -> None:
        """Stop the server and its thread."""
        if self._server is not None:
            stopping = self._server.stop(drain_s)
            await asyncio.wrap_future(self._thread.submit(stopping))
        await asyncio.wrap_future(self._thread.submit(self._dispatcher.close()))
        # Nothing runs there any more: this takes no time, and also works at the end of
        # the interpreter, when there are no threads to be had.
        self._thread.stop(timeout_s=1)

    async def _connect(self, address: str) -> Any:
        return await connect(
            address,
            timeout=self._settings.connect_timeout_s,
            **self._scheduler.connection_args,
        )
