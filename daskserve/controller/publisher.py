"""Routes go down as numbered snapshots; who has which is known. Scheduler.

Who subscribes gets a whole one, and from then on what changes from each to the next.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection
from typing import Any, Protocol

from distributed import Scheduler

from daskserve.controller.load import LoadBoard
from daskserve.controller.queues import QueueBoard
from daskserve.transport.messages import STREAM_LOST, STREAM_QUEUED, STREAM_ROUTES
from daskserve.transport.snapshots import NO_CHANGES, difference

logger = logging.getLogger(__name__)

#: A worker's address, a client's id, or `LOCAL`.
Subscriber = str
#: The proxy in the scheduler's own process.
LOCAL = "scheduler"


class LocalSubscriber(Protocol):
    """The proxy in the scheduler's own process."""

    def take_routes(self, version: int, snapshot: dict[str, Any]) -> None:
        """Take a whole snapshot; in one process it costs nothing."""

    def worker_lost(self, address: str, replicas: list[int] | None = None) -> None:
        """Note that a worker has gone, or some of its replicas."""

    def take_queued(self, queued: dict[str, int]) -> None:
        """Note how many requests wait in other processes."""


class Publisher:
    """Tell all proxies and handles where requests go.

    Parameters
    ----------
    scheduler
        Whose streams are used.
    ack_timeout_s
        How long `wait_acked` waits for those who do not answer.
    """

    def __init__(self, scheduler: Scheduler, ack_timeout_s: float) -> None:
        # No clock: it may step back between two instances. See `rise_above`.
        self.version = random.randrange(2**40)
        self.snapshot: dict[str, Any] = {"routes": {}, "deployments": {}}
        self._scheduler = scheduler
        self._ack_timeout_s = ack_timeout_s
        self._acked: dict[Subscriber, int] = {}
        self._published_at = 0.0
        self._ack = asyncio.Event()
        self._local: LocalSubscriber | None = None
        #: Who does not answer, and need not be waited for.
        self.silent: Collection[Subscriber] = ()
        #: Who has how many requests waiting.
        self.queues = QueueBoard()
        #: And how many requests wait or run, where it is asked for.
        self.loads = LoadBoard()

    def publish(self, snapshot: dict[str, Any]) -> None:
        """Send what is new in a snapshot to all who subscribed, if anything is."""
        changes = difference(self.snapshot, snapshot)
        if changes is not None:
            base = self.version
            self.snapshot = snapshot
            self.version += 1
            self._published_at = time.monotonic()
            for subscriber in list(self._acked):
                # It has been sent that one: messages come in order, or not at all.
                self._send(subscriber, changes, base)

    def rise_above(self, version: int) -> None:
        """Give the present snapshot a number above one of an instance before.

        Clients outlive instances and schedulers, and ignore what looks older than what
        they have. A number that is not above ours was given out here.
        """
        if version > self.version:
            base, self.version = self.version, version + 1
            self._published_at = time.monotonic()
            for subscriber in list(self._acked):
                self._send(subscriber, NO_CHANGES, base)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Add a worker or client and send it the newest snapshot."""
        self._acked[subscriber] = -1
        self._send(subscriber, self.snapshot, None)

    def subscribe_local(self, local: LocalSubscriber) -> None:
        """Add the proxy in this process."""
        self._local = local
        self.subscribe(LOCAL)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget one that has gone."""
        self.queues.forget(subscriber)
        self.loads.forget(subscriber)
        if self._acked.pop(subscriber, None) is not None:
            self._ack.set()

    def has(self, subscriber: Subscriber) -> bool:
        """Whether `subscriber` gets snapshots."""
        return subscriber in self._acked

    def acked(self, subscriber: Subscriber, version: int) -> None:
        """Note that a snapshot took effect there."""
        if version > self._acked.get(subscriber, version):
            self._acked[subscriber] = version
            self._ack.set()

    def is_known(self) -> bool:
        """Whether all have the present snapshot, or have had the time to take it."""
        late = time.monotonic() - self._published_at >= self._ack_timeout_s
        return late or not self._behind(self.version)

    async def wait_acked(self) -> list[Subscriber]:
        """Wait until all have the present snapshot; return those who do not answer.

        They are not waited for any longer: a process that is stopped or cut off must
        not hold up a deployment.
        """
        version = self.version
        try:
            async with asyncio.timeout(self._ack_timeout_s):
                while late := self._behind(version):
                    self._ack.clear()
                    await self._ack.wait()
        except TimeoutError:
            late = self._behind(version)
            logger.warning(
                "No answer within %g s from %s: they may still route as before",
                self._ack_timeout_s,
                late,
            )
        return late

    def worker_lost(self, address: str) -> None:
        """Tell everybody that a worker has gone, so that nobody waits for it."""
        self.unsubscribe(address)
        self._tell_lost(address, None)

    def replicas_lost(self, address: str, replicas: list[int]) -> None:
        """Tell everybody that a worker does not answer for some of its replicas."""
        self._tell_lost(address, replicas)

    def _tell_lost(self, address: str, replicas: list[int] | None) -> None:
        for subscriber in list(self._acked):
            if subscriber == LOCAL:
                assert self._local is not None
                self._local.worker_lost(address, replicas)
            else:
                message = {"op": STREAM_LOST, "worker": address, "replicas": replicas}
                self._send_message(subscriber, message)

    def publish_queues(self, now: float) -> None:
        """Tell everybody how many requests wait, if that is news."""
        if self.queues.due(now) is None:
            return
        for subscriber in list(self._acked):
            queued = self.queues.elsewhere(subscriber)
            if subscriber == LOCAL:
                assert self._local is not None
                self._local.take_queued(queued)
            else:
                message = {"op": STREAM_QUEUED, "queued": queued}
                self._send_message(subscriber, message)

    def _behind(self, version: int) -> list[Subscriber]:
        return [
            s
            for s, acked in self._acked.items()
            if acked < version and s not in self.silent
        ]

    def _send(
        self, subscriber: Subscriber, snapshot: dict[str, Any], base: int | None
    ) -> None:
        if subscriber == LOCAL:
            if self._local is not None:
                self._local.take_routes(self.version, self.snapshot)
            return
        message = {
            "op": STREAM_ROUTES,
            "version": self.version,
            "snapshot": snapshot,
            "base": base,
        }
        self._send_message(subscriber, message)

    def _send_message(self, subscriber: Subscriber, message: dict[str, Any]) -> None:
        if subscriber in self._scheduler.stream_comms:
            self._scheduler.worker_send(subscriber, message)
        else:
            self._scheduler.client_send(subscriber, message)
