"""HTTP proxies: started where `proxies.desired_proxies` says. Scheduler."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from distributed import Scheduler
from distributed.comm.addressing import get_address_host

from daskserve.controller.head import HeadProxy
from daskserve.controller.placement import Leaving, WorkerView
from daskserve.controller.proxies import SCHEDULER, desired_proxies, reachable_url
from daskserve.controller.publisher import LOCAL, Publisher
from daskserve.transport.load_reports import Loads
from daskserve.transport.messages import OP_BIND, OP_SHARE, OP_UNBIND, OP_UNLISTEN

logger = logging.getLogger(__name__)

#: State of a server that takes no new connections.
DRAINING = "DRAINING"

BIND_TIMEOUT_S = 30.0
#: After a failure, how long until a worker is asked again to start its server.
RETRY_S = 2.0
#: How long requests may take in a server that leaves, if there is the time.
DRAIN_S = 20.0
#: How long it may take to hand its port over.
UNLISTEN_S = 5.0
#: After how long without a request it closes connections.
IDLE_S = 2.0
_SILENT = (
    "worker {} says nothing, and holds the port as long as its process lives: end "
    "that, or wait for Dask to do so (distributed.scheduler.worker-ttl)"
)


@dataclass(slots=True)
class ProxyRecord:
    """One proxy as the status shows it."""

    worker: str
    host: str
    state: str
    url: str | None = None
    reason: str = ""
    retry_at: float = 0.0
    #: Whether new connections come to it.
    listening: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPConfig:
    """What the controller knows of the HTTP options; the rest stays opaque."""

    #: The pickled `HTTPOptions`, for the processes that serve.
    options: bytes
    enabled: bool
    location: str | None
    host: str | None
    port: int
    uds: str | None


class ProxyManager:
    """Start and stop HTTP servers as workers come and go.

    Parameters
    ----------
    scheduler
        Whose workers serve.
    publisher
        Where the scheduler's own proxy gets its routes.
    config
        The instance's HTTP options.
    ready
        Whether a worker's plugin is set up.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        publisher: Publisher,
        config: HTTPConfig,
        ready: Callable[[str], bool],
    ) -> None:
        self.records: dict[str, ProxyRecord] = {}
        self._scheduler = scheduler
        self._publisher = publisher
        self._config = config
        self._ready = ready
        self._port = config.port
        self._head: HeadProxy | None = None
        self._head_host = get_address_host(scheduler.address)
        self._hosts = frozenset({self._head_host, "localhost", *_own_addresses()})
        self._lock = asyncio.Lock()
        #: Held while a listener leaves the others of its host.
        self._leaving: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The port that is bound, or to be bound."""
        return self._port

    @property
    def urls(self) -> list[str]:
        """The addresses that are served, each once."""
        urls = {record.url for record in self.records.values()}
        return sorted(url for url in urls if url is not None)

    def due(self, now: float, views: Mapping[str, WorkerView]) -> bool:
        """Whether `reconcile` would do anything; it is not called twice at a time."""
        if self._lock.locked():
            return False
        if self.records.keys() - views.keys() - {SCHEDULER}:
            return True
        wanted = self._wanted(views, now)
        if any(a not in wanted and r.state != DRAINING for a, r in self._known()):
            return True
        records = (self.records.get(address) for address in wanted)
        return any(r is None or (r.url is None and now >= r.retry_at) for r in records)

    async def reconcile(
        self, now: float, views: Mapping[str, WorkerView]
    ) -> list[ProxyRecord]:
        """Start what is missing, forget what is gone; return what failed to start."""
        async with self._lock:
            for address in self.records.keys() - views.keys() - {SCHEDULER}:
                del self.records[address]
            failed = []
            wanted = self._wanted(views, now)
            for address in sorted(wanted):
                record = self.records.get(address)
                if record is None:
                    at_head = address == SCHEDULER
                    host = self._head_host if at_head else views[address].host
                    record = ProxyRecord(address, host, "STARTING")
                    self.records[address] = record
                if record.url is None and now >= record.retry_at:
                    await self._bind(record)
                    if record.url is None:
                        record.retry_at = now + RETRY_S
                        failed.append(record)
            for address, record in self._known():
                if address not in wanted and record.state != DRAINING:
                    self._retire(record, views[address].leaving, now, failed)
            return failed

    def _known(self) -> list[tuple[str, ProxyRecord]]:
        return [(a, r) for a, r in self.records.items() if a != SCHEDULER]

    def _retire(
        self,
        record: ProxyRecord,
        leaving: Leaving | None,
        now: float,
        failed: list[ProxyRecord],
    ) -> None:
        """Let a server end whose place others have taken, or whose time is over."""
        if record.url is None:
            del self.records[record.worker]
            return
        left = DRAIN_S if leaving is None else leaving.deadline - now
        if failed and self._alone and left > DRAIN_S / 4:
            return  # it goes on until another one has its place
        why = "" if leaving is None else f": worker {record.worker} {leaving.reason}"
        record.state, record.reason = DRAINING, f"draining{why}"
        idle_s = 0.0 if leaving is not None and leaving.at_once else IDLE_S
        task = asyncio.ensure_future(
            self._drain(record, max(0.1, min(left, DRAIN_S)), idle_s)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, record: ProxyRecord, drain_s: float, idle_s: float) -> None:
        worker = record.worker
        async with self._leaving[record.host if not self._alone else ""]:
            peers = [
                r for r in self._peers(record) if r.listening and r.url == record.url
            ]
            others = len(peers) if idle_s else 0
            await self._ask(worker, OP_UNLISTEN, UNLISTEN_S, others=others)
            record.listening = False
            for peer in peers:
                # The first one resets what all share; alone, the port is its own now.
                await self._share(peer.worker, not self._alone)
        await self._ask(worker, OP_UNBIND, drain_s + 10, drain_s=drain_s, idle_s=idle_s)
        if self.records.get(worker) is record:
            del self.records[worker]

    @property
    def _alone(self) -> bool:
        """Whether one server has its port or path to itself, but for a handover."""
        return self._config.location != "EveryNode"

    def _peers(self, record: ProxyRecord) -> list[ProxyRecord]:
        """Return those that share the port with a server."""
        return [
            r
            for r in self.records.values()
            if r is not record and (self._alone or r.host == record.host)
        ]

    async def _share(self, worker: str, shared: bool) -> None:
        if worker != SCHEDULER:
            await self._ask(worker, OP_SHARE, UNLISTEN_S, shared=shared)
        elif self._head is not None:
            self._head.share(shared)

    def note_silent(self, silent: Mapping[str, float]) -> None:
        """Say of servers whether their workers answer; they keep their ports.

        A process that is stopped still holds its sockets, so no other can take over
        the port: beside it, the kernel would go on giving connections to both.
        """
        for record in self.records.values():
            if record.url is None:
                continue
            if record.worker in silent and record.state == "HEALTHY":
                record.state, record.reason = "FAILED", _SILENT.format(record.worker)
                logger.warning("HTTP server at %s: %s", record.url, record.reason)
            elif record.state == "FAILED" and record.worker not in silent:
                record.state, record.reason = "HEALTHY", ""

    async def close(self, drain_s: float = 5.0) -> None:
        """Stop all servers."""
        async with self._lock:
            for task in list(self._tasks):
                task.cancel()
            records, self.records = self.records, {}
            addresses = [address for address in records if address != SCHEDULER]
            await asyncio.gather(*(self._unbind(a, drain_s) for a in addresses))
            if self._head is not None:
                self._publisher.unsubscribe(LOCAL)
                head, self._head = self._head, None
                await head.close(drain_s)

    def _wanted(self, views: Mapping[str, WorkerView], now: float) -> set[str]:
        wanted = desired_proxies(
            location=self._config.location,
            enabled=self._config.enabled,
            one_per_host=self._config.uds is not None,
            scheduler_hosts=self._hosts,
            views=views,
            current=[
                address
                for address, record in self.records.items()
                if record.url is not None and record.state != DRAINING
            ],
            now=now,
        )
        return {a for a in wanted if a == SCHEDULER or self._ready(a)}

    async def _bind(self, record: ProxyRecord) -> None:
        # Of a server that was killed, nothing holds the port.
        holders = [r for r in self._peers(record) if r.url and r.listening]
        every_node = not self._alone
        share = every_node or bool(holders)
        try:
            async with asyncio.timeout(BIND_TIMEOUT_S):
                if self._alone:
                    for holder in holders:
                        await self._share(holder.worker, True)
                if record.worker == SCHEDULER:
                    answer = await self._bind_head(share)
                else:
                    answer = await getattr(self._scheduler.rpc(record.worker), OP_BIND)(
                        options=self._config.options,
                        port=self._port,
                        share_port=share,
                        probe=every_node and not holders,
                    )
        except (OSError, TimeoutError) as err:
            answer = {"error": f"worker {record.worker} does not answer: {err!r}"}
        if "error" in answer:
            record.state, record.reason = "FAILED", answer["error"]
            logger.warning("%s", record.reason)
            return
        record.url = reachable_url(answer["url"], record.host)
        record.state, record.reason = "HEALTHY", ""
        record.listening = True
        if not every_node:
            self._port = answer["port"]  # it is the instance's from now on
        logger.info("HTTP server of %s at %s", record.worker, record.url)

    async def _bind_head(self, share_port: bool) -> dict[str, Any]:
        if self._head is None:

            def acked(version: int) -> None:
                self._publisher.acked(LOCAL, version)

            def queued(queued: dict[str, int]) -> None:
                self._publisher.queues.report(LOCAL, queued)

            def load(interval_s: float, loads: Loads) -> None:
                now = time.monotonic()
                self._publisher.loads.report(LOCAL, interval_s, loads, now)

            self._head = HeadProxy(self._scheduler, acked, queued, load)
            self._publisher.subscribe_local(self._head)
        routes = self._publisher.snapshot["routes"]
        return await self._head.bind(
            self._config.options, self._port, routes, share_port
        )

    async def _unbind(self, address: str, drain_s: float) -> None:
        await self._ask(address, OP_UNBIND, drain_s + 10, drain_s=drain_s)

    async def _ask(
        self, address: str, op: str, timeout_s: float, **details: Any
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await getattr(self._scheduler.rpc(address), op)(**details)
        except (OSError, TimeoutError) as err:
            # Mostly the worker is on its way out too.
            logger.info("HTTP server of %s does not answer %s: %r", address, op, err)


def _own_addresses() -> set[str]:
    """Return all addresses of this host: its workers may use another network."""
    interfaces = psutil.net_if_addrs().values()
    return {a.address for addresses in interfaces for a in addresses}
