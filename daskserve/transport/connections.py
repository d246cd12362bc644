"""A process's connections to workers and replicas; on its transport loop.

One to each worker with replicas that are wanted here, over Dask's own port, always.
Besides, to replicas that are asked often, one to the replica's own port, which is
quicker: made when needed, closed when idle, and never more than a share of the files
that the process may open, so that their number grows with the workers, not with the
replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from daskserve.transport.channel import Channel, CommChannel, Inbox, LocalChannel
from daskserve.transport.direct import DirectAddress, DirectChannel
from daskserve.transport.files import share_of_files
from daskserve.transport.messages import CALL, NOBODY, Message
from daskserve.transport.router import Slot
from daskserve.transport.silence import SilenceWatch

#: How long after a connection broke, or could not be made, it is tried again.
RECONNECT_S = 0.2
#: How long after a replica's own port could not be reached it is tried again.
DIRECT_RETRY_S = 30.0
#: A connection of its own is for a replica that gets so many requests ...
OFTEN = 2
#: ... in so many seconds; it is closed when there was none for as long.
SWEEP_S = 10.0
#: The most of them, and which part of the files that a process may open.
MAX_DIRECT, DIRECT_SHARE = 256, 1 / 16
#: How long a new snapshot may wait for connections before it counts as taken.
CONNECTED_S = 1.0


class Connections:
    """Channels to workers and replicas, and which of them can be reached.

    Parameters
    ----------
    loop
        The transport loop.
    connect
        Opens a Dask comm to a worker's address.
    changed
        Told of slots that can be reached now, or not any more.
    notice
        Takes messages of replicas that belong to no exchange.
    opened
        Told of a replica's number and a connection of its own, when that can be used.
    context
        The cluster's TLS, for direct connections; None: it has none.
    local_address, inboxes
        The Dask address of the worker in this process and its replicas, if there is
        one.
    silence_s
        How long a worker's host may owe an answer before what is there counts as lost.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connect: Callable[[str], Awaitable[Any]],
        *,
        changed: Callable[[Iterable[Slot]], None],
        notice: Callable[[Message], None],
        opened: Callable[[int, Channel], None],
        context: ssl.SSLContext | None,
        local_address: str | None,
        inboxes: Mapping[int, Inbox] | None,
        silence_s: float,
    ) -> None:
        #: Connections to workers, by address, and to replicas.
        self.channels: dict[str, CommChannel] = {}
        self.direct: dict[int, DirectChannel] = {}
        #: By what replicas know this process, whichever way it asks.
        self.caller = secrets.token_hex(8)
        self.local: LocalChannel | None = None
        if inboxes is not None:
            self.local = LocalChannel(loop, inboxes, self.caller)
            self.local.on_notice = notice
        self._loop = loop
        self._connect = connect
        self._changed = changed
        self._notice = notice
        self._direct_opened = opened
        self._context = context
        self._local_address = local_address
        self._watch = SilenceWatch(loop, silence_s)
        #: The slots on each worker that is to be connected.
        self._on_worker: dict[str, dict[int, Slot]] = {}
        #: Workers that are lost for all that is known, though a connection stands.
        self._doubted: set[str] = set()
        #: Where replicas listen themselves.
        self._addresses: dict[int, tuple[str, DirectAddress]] = {}
        #: How often replicas without such a connection were used of late.
        self._uses: Counter[int] = Counter()
        #: Replicas whose connection was used since the last sweep.
        self._used: set[int] = set()
        self._retry_at: dict[int, float] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._opened = asyncio.Event()
        self._closed = False

    # What is wanted.

    def want(self, slots: Iterable[Slot]) -> None:
        """Connect to the workers of some slots, and note which can be reached."""
        for slot in slots:
            if not slot.local:
                self._on_worker.setdefault(slot.worker, {})[slot.replica_id] = slot
            slot.reachable = self._connected(slot)

    def forget(self, slots: Iterable[Slot]) -> None:
        """Want slots no more."""
        for slot in slots:
            there = self._on_worker.get(slot.worker, {})
            if there.pop(slot.replica_id, None) is not None and not there:
                del self._on_worker[slot.worker]

    def update_direct(
        self, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None
    ) -> None:
        """Note the ports of new replicas; end connections to those of old ones."""
        former, present = self._direct_addresses(old), self._direct_addresses(new)
        self._addresses.update(present)
        for replica_id in former.keys() - present.keys():
            self._addresses.pop(replica_id, None)
            self._retry_at.pop(replica_id, None)
            channel = self.direct.get(replica_id)
            # Else its end is the replica's to say.
            if channel is not None and channel.idle:
                channel.close("the replica is not there any more")

    def drop_idle(self) -> None:
        """Close connections to workers where nothing is wanted any more."""
        for address in self.channels.keys() - self._on_worker.keys():
            # A draining replica's requests may still be on their way.
            if self.channels[address].idle:
                self.channels[address].close("no replica is there any more")
        self._doubted &= self._on_worker.keys()

    async def connected(self) -> None:
        """Wait until all workers that are wanted can be reached, for a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECTED_S):
                while not all(map(self._has_channel, self._on_worker)):
                    self._opened.clear()
                    await self._opened.wait()

    # What is there.

    def channel(self, slot: Slot) -> Channel:
        """Return the channel to a replica that is reachable."""
        if slot.local and self.local is not None:
            return self.local
        direct = self.direct.get(slot.replica_id)
        if direct is None:
            self._use(slot.replica_id)
        elif direct.is_open:
            self._used.add(slot.replica_id)
            return direct
        return self.channels[slot.worker]

    def is_connecting(self, slot: Slot) -> bool:
        """Whether a slot that is not reachable may be so in a moment."""
        channel = self.channels.get(slot.worker)
        return channel is not None and not channel.is_open

    def worker_lost(self, address: str) -> None:
        """Fail at once what waits for a worker that has left the cluster."""
        # Before anything fails: what is tried again is not to go to a neighbour there.
        self._doubted.add(address)
        self._set_reachable(address, False)
        channel = self.channels.get(address)
        reason = f"worker {address} left the cluster"
        if channel is not None:
            channel.close(reason)
        for direct in list(self.direct.values()):
            if direct.worker == address:
                direct.close(reason)

    def replica_lost(self, address: str, replica_id: int) -> None:
        """Fail at once what waits for a replica whose worker does not answer."""
        reason = f"worker {address} does not answer"
        direct, channel = self.direct.get(replica_id), self.channels.get(address)
        if direct is not None:
            direct.close(reason)
        if channel is not None:
            channel.fail_replica(replica_id, reason)

    async def close(self, reason: str) -> None:
        """Close everything; what is open fails."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self.local is not None:
            self.local.close(reason)
        self._addresses = {}
        for direct in list(self.direct.values()):
            direct.close(reason)
        for channel in list(self.channels.values()):
            channel.close(reason)
            await channel.wait_closed()

    # Connections to workers.

    def _connected(self, slot: Slot) -> bool:
        """Whether there is a connection to a replica; begins one if there is none."""
        if slot.local:
            return True
        channel = self.channels.get(slot.worker)
        if channel is None:
            self._open(slot.worker)
            return False
        return channel.is_open and slot.worker not in self._doubted

    def _has_channel(self, address: str) -> bool:
        channel = self.channels.get(address)
        return channel is not None and channel.is_open

    def _open(self, address: str) -> None:
        if not self._closed and address not in self.channels:
            channel = self.channels[address] = CommChannel(
                address,
                self._connect,
                self._channel_opened,
                self._channel_closed,
                self.caller,
            )
            channel.on_notice = self._notice

    def _reopen(self, address: str) -> None:
        if address in self._on_worker:
            self._open(address)

    def _channel_opened(self, channel: CommChannel) -> None:
        self._opened.set()
        address = channel.address
        self._doubted.discard(address)
        reason = f"worker {address} {self._watch.reason}"
        self._watch.add(channel, channel.sock, lambda: channel.close(reason))
        for replica_id in self._on_worker.get(address, {}):
            self._retry_at.pop(replica_id, None)  # the network may have come back
        self._set_reachable(address, True)

    def _channel_closed(self, channel: CommChannel) -> None:
        self._watch.discard(channel)
        address = channel.address
        if self.channels.get(address) is channel:
            del self.channels[address]
            self._set_reachable(address, False)
            # If replicas are still said to be there, the network had a moment.
            self._loop.call_later(RECONNECT_S, self._reopen, address)

    def _set_reachable(self, address: str, reachable: bool) -> None:
        there = list(self._on_worker.get(address, {}).values())
        for slot in there:
            slot.reachable = reachable
        self._changed(there)

    def _doubt(self, worker: str) -> None:
        """Send nothing where a connection broke, until more is known.

        Mostly the process is dead: a request that was in one replica there is not to
        be lost once more in another.
        """
        self._doubted.add(worker)
        self._set_reachable(worker, False)
        self._loop.call_later(RECONNECT_S, self._probe, worker)

    def _probe(self, worker: str) -> None:
        """Ask a worker whether it lives, if the connection to it still looks so.

        The end of that one may only come late to a busy process.
        """
        channel = self.channels.get(worker)
        if channel is None or not channel.is_open:
            self._reopen(worker)
            return
        exchange = channel.open()

        def told() -> None:
            if exchange.first is not None:
                self._believe(worker)
            channel.close_exchange(exchange)

        exchange.on_news = told
        channel.send((CALL, exchange.exchange_id, NOBODY))

    def _believe(self, worker: str) -> None:
        self._doubted.discard(worker)
        there = list(self._on_worker.get(worker, {}).values())
        for slot in there:
            slot.reachable = self._connected(slot)
        self._changed(there)

    # Connections to replicas.

    def _direct_addresses(
        self, info: Mapping[str, Any] | None
    ) -> dict[int, tuple[str, DirectAddress]]:
        return {
            replica_id: (worker, DirectAddress(*direct))
            for replica_id, _, worker, direct, _ in (info["replicas"] if info else ())
            if direct is not None and worker != self._local_address
        }

    def _use(self, replica_id: int) -> None:
        """Note that a replica without a connection of its own was asked."""
        found = self._addresses.get(replica_id)
        if found is None:
            return
        self._uses[replica_id] += 1
        self._sweep_later()
        due = self._retry_at.get(replica_id, 0.0) <= self._loop.time()
        if self._uses[replica_id] >= OFTEN and due and self._make_room():
            self._open_direct(replica_id, *found)

    def _make_room(self) -> bool:
        """Close a connection that is not used, if there are as many as may be."""
        if len(self.direct) < min(MAX_DIRECT, share_of_files(DIRECT_SHARE)):
            return True
        for replica_id, channel in self.direct.items():
            if channel.idle and replica_id not in self._used:
                channel.close("others need it more")
                return True
        return False

    def _open_direct(
        self, replica_id: int, worker: str, address: DirectAddress
    ) -> None:
        context = self._context if worker.startswith("tls://") else None

        def closed(channel: DirectChannel) -> None:
            del self.direct[replica_id]
            if channel.broke:
                self._doubt(worker)
            delay = RECONNECT_S if channel.greeted else DIRECT_RETRY_S
            self._retry_at[replica_id] = self._loop.time() + delay

        def opened(channel: DirectChannel) -> None:
            self._direct_opened(replica_id, channel)

        channel = DirectChannel(
            address, worker, context, self._watch, closed, self.caller, opened
        )
        channel.on_notice = self._notice
        self.direct[replica_id] = channel
        self._used.add(replica_id)

    def _sweep_later(self) -> None:
        if self._sweeping is None and not self._closed:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Close what nobody has used since the last time."""
        self._sweeping = None
        self._uses.clear()
        used, self._used = self._used, set()
        for replica_id, channel in list(self.direct.items()):
            if channel.idle and replica_id not in used:
                channel.close("it was idle")
        if self.direct:
            self._sweep_later()
