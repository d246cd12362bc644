"""HTTP proxies: started where `proxies.desired_proxies` says. Scheduler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from distributed import Scheduler
from distributed.comm.addressing import get_address_host

from daskserve.controller.head import HeadProxy
from daskserve.controller.placement import WorkerView
from daskserve.controller.proxies import SCHEDULER, desired_proxies, reachable_url
from daskserve.controller.publisher import LOCAL, Publisher
from daskserve.transport.messages import OP_BIND, OP_UNBIND

logger = logging.getLogger(__name__)

BIND_TIMEOUT_S = 30.0
#: After a failure, how long until a worker is asked again to start its server.
RETRY_S = 2.0


@dataclass(slots=True)
class ProxyRecord:
    """One proxy as the status shows it."""

    worker: str
    host: str
    state: str
    url: str | None = None
    reason: str = ""
    retry_at: float = 0.0


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
        records = (self.records.get(address) for address in self._wanted(views))
        return any(r is None or (r.url is None and now >= r.retry_at) for r in records)

    async def reconcile(
        self, now: float, views: Mapping[str, WorkerView]
    ) -> list[ProxyRecord]:
        """Start what is missing, forget what is gone; return what failed to start."""
        async with self._lock:
            for address in self.records.keys() - views.keys() - {SCHEDULER}:
                del self.records[address]
            failed = []
            for address in sorted(self._wanted(views)):
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
            return failed

    async def close(self, drain_s: float = 5.0) -> None:
        """Stop all servers."""
        async with self._lock:
            records, self.records = self.records, {}
            addresses = [address for address in records if address != SCHEDULER]
            await asyncio.gather(*(self._unbind(a, drain_s) for a in addresses))
            if self._head is not None:
                self._publisher.unsubscribe(LOCAL)
                head, self._head = self._head, None
                await head.close(drain_s)

    def _wanted(self, views: Mapping[str, WorkerView]) -> set[str]:
        wanted = desired_proxies(
            location=self._config.location,
            enabled=self._config.enabled,
            one_per_host=self._config.uds is not None,
            scheduler_hosts=self._hosts,
            views=views,
            current=[a for a, record in self.records.items() if record.url is not None],
        )
        return {a for a in wanted if a == SCHEDULER or self._ready(a)}

    async def _bind(self, record: ProxyRecord) -> None:
        every_node = self._config.location == "EveryNode"
        serving = [r for r in self.records.values() if r.url is not None]
        try:
            async with asyncio.timeout(BIND_TIMEOUT_S):
                if record.worker == SCHEDULER:
                    answer = await self._bind_head()
                else:
                    answer = await getattr(self._scheduler.rpc(record.worker), OP_BIND)(
                        options=self._config.options,
                        port=self._port,
                        share_port=every_node,
                        probe=every_node
                        and record.host not in {r.host for r in serving},
                    )
        except (OSError, TimeoutError) as err:
            answer = {"error": f"worker {record.worker} does not answer: {err!r}"}
        if "error" in answer:
            record.state, record.reason = "FAILED", answer["error"]
            logger.warning("%s", record.reason)
            return
        record.url = reachable_url(answer["url"], record.host)
        record.state, record.reason = "HEALTHY", ""
        if not every_node:
            self._port = answer["port"]  # it is the instance's from now on
        logger.info("HTTP server of %s at %s", record.worker, record.url)

    async def _bind_head(self) -> dict[str, Any]:
        if self._head is None:

            def acked(version: int) -> None:
                self._publisher.acked(LOCAL, version)

            def queued(queued: dict[str, int]) -> None:
                self._publisher.queues.report(LOCAL, queued)

            self._head = HeadProxy(self._scheduler, acked, queued)
            self._publisher.subscribe_local(self._head)
        routes = self._publisher.snapshot["routes"]
        return await self._head.bind(self._config.options, self._port, routes)

    async def _unbind(self, address: str, drain_s: float) -> None:
        try:
            async with asyncio.timeout(drain_s + 10):
                await getattr(self._scheduler.rpc(address), OP_UNBIND)(drain_s=drain_s)
        except (OSError, TimeoutError) as err:
            # Mostly the worker is on its way out too.
            logger.info("HTTP server of %s was not stopped: %r", address, err)


def _own_addresses() -> set[str]:
    """Return all addresses of this host: its workers may use another network."""
    interfaces = psutil.net_if_addrs().values()
    return {a.address for addresses in interfaces for a in addresses}
