"""A process's way to all replicas: the caller's end of every request and handle call.

Runs on the transport loop of a worker, a client or the scheduler. Snapshots of the
routing come in, requests go out over channels to the replica that `Router` chose.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any

from daskserve.exceptions import (
    DeploymentUnavailableError,
    QueueFullError,
    ReplicaDiedError,
    RequestTimeoutError,
)
from daskserve.transport.affinity import Affinity, Bindings, Session
from daskserve.transport.channel import (
    Channel,
    CommChannel,
    ConnectionLostError,
    Exchange,
    Inbox,
    LocalChannel,
)
from daskserve.transport.direct import DirectAddress, DirectChannel
from daskserve.transport.load_reports import LoadReports
from daskserve.transport.messages import (
    CALL,
    CANCEL,
    DECLINE,
    FOLLOW,
    NOBODY,
    REFUSED,
    Message,
)
from daskserve.transport.queue_reports import QueueReports
from daskserve.transport.router import Router, Slot
from daskserve.transport.silence import SilenceWatch
from daskserve.transport.snapshots import follow

logger = logging.getLogger(__name__)

#: How long a replica that refused a request is not asked again, unless it says before
#: that it has room.
REFUSED_PAUSE_S = 0.05
#: How long after a connection broke, or could not be made, it is tried again.
RECONNECT_S = 0.2
#: How long after a replica's own port could not be reached it is tried again.
DIRECT_RETRY_S = 30.0
#: How long a new snapshot may wait for connections before it counts as taken.
CONNECTED_S = 1.0
#: How long a process that has just connected waits to be told of the routing.
FIRST_SNAPSHOT_S = 10

_numbers = itertools.count()


class Group:
    """One deployment as this process sees it."""

    __slots__ = ("affinity", "begun", "connecting_until", "hopeless", "info",
                 "max_queued", "name", "router", "sessions", "timeout_s", "timer",
                 "waiting", "wanted")  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.router = Router()
        #: How many requests were given to a replica, up to now.
        self.begun = 0
        #: Whether connections are made; there may be no request from here ever.
        self.wanted = False
        #: Until when the first ones may be on their way.
        self.connecting_until = 0.0
        #: Its part of the newest snapshot.
        self.info: Mapping[str, Any] | None = None
        self.hopeless = False
        self.max_queued: int | None = None
        self.timeout_s: float | None = None
        #: Where its requests name their sessions, if replicas are chosen by them.
        self.affinity: Affinity | None = None
        self.sessions = Bindings()
        #: Of the next look at replicas that have refused.
        self.timer: asyncio.TimerHandle | None = None
        #: In the order in which they came.
        self.waiting: deque[Call] = deque()

    def update(self, info: Mapping[str, Any], local_address: str | None) -> None:
        """Take this deployment's part of a snapshot."""
        self.info = info
        self.hopeless = info["hopeless"]
        self.max_queued, self.timeout_s = info["max_queued"], info["timeout_s"]
        self.affinity = Affinity.of(info.get("session_affinity"))
        self.router.update(
            (
                Slot(replica_id, tag, worker, local=worker == local_address)
                for replica_id, tag, worker, _ in info["replicas"]
            ),
            info["max_ongoing"],
        )

    def enqueue(self, call: Call) -> None:
        """Add a call that waits: one that was refused goes where it was before."""
        place = len(self.waiting)
        if call.refused:
            behind = (i for i, c in enumerate(self.waiting) if c.number > call.number)
            place = next(behind, place)
        self.waiting.insert(place, call)

    def unavailable(self) -> DeploymentUnavailableError | None:
        """Say why nothing can ever take a request, or None if waiting makes sense."""
        if self.hopeless and not self.router.slots:
            return DeploymentUnavailableError(
                f"Deployment {self.name!r} is unavailable because it failed to deploy."
            )
        return None


class Dispatcher:
    """Where requests and calls of this process go out.

    Parameters
    ----------
    loop
        The transport loop; everything but `has_replicas` runs on it.
    connect
        Opens a Dask comm to a worker's address.
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
        context: ssl.SSLContext | None = None,
        local_address: str | None = None,
        inboxes: Mapping[int, Inbox] | None = None,
        silence_s: float = 10.0,
    ) -> None:
        self.loop = loop
        #: Number of the newest snapshot; -1 before the first.
        self.version = -1
        self.snapshot: Mapping[str, Any] = {"routes": {}, "deployments": {}}
        self.groups: dict[str, Group] = {}
        #: Whether connections are made before there are requests: to all deployments.
        self.ahead = False
        #: Called with every new snapshot, after it took effect.
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        self.queues = QueueReports(loop, self._count_waiting)
        self.loads = LoadReports(loop, self._count_load)
        self._connect = connect
        self._local_address = local_address
        self._local = LocalChannel(loop, inboxes) if inboxes is not None else None
        if self._local is not None:
            self._local.on_room = self._has_room
            self._local.on_sessions = self._bind
        self._channels: dict[str, CommChannel] = {}
        #: What saves looking at all replicas: which are where, but for local ones and
        #: those of deployments that are not wanted, and of which deployment each is.
        self._on_worker: dict[str, dict[int, Slot]] = {}
        self._group_of: dict[int, Group] = {}
        #: Workers that are lost for all that is known, though a connection stands.
        self._doubted: set[str] = set()
        self._context = context
        self._watch = SilenceWatch(loop, silence_s)
        #: Direct connections, and the addresses of all there could be, by replica.
        self._direct: dict[int, DirectChannel] = {}
        self._direct_addresses: dict[int, tuple[str, DirectAddress]] = {}
        self._first_snapshot = asyncio.Event()
        self._opened = asyncio.Event()
        self._closed = False

    def update(
        self, version: int, snapshot: Mapping[str, Any], base: int | None = None
    ) -> bool:
        """Take a snapshot of the routing; an older one than ours is ignored.

        Parameters
        ----------
        version
            Its number.
        snapshot
            A whole one, or what has changed since another one.
        base
            The number of that other one; None: it is a whole one.

        Returns
        -------
        bool
            False if that is not the one we have: a whole one is needed.
        """
        if version <= self.version:
            return True
        if base is not None:
            if base != self.version:
                return False
            snapshot = follow(self.snapshot, snapshot)
        self.version, self.snapshot = version, snapshot
        deployments = snapshot["deployments"]
        for name in self.groups.keys() - deployments.keys():
            gone = DeploymentUnavailableError(f"Deployment {name!r} was deleted.")
            group = self.groups.pop(name)
            self._note_places(group, group.router.slots, {})
            self._update_direct(group.info, None)
            group.router.update((), 1)
            self._fail_waiting(group, gone)
        for name, info in deployments.items():
            group = self.groups.get(name) or self.groups.setdefault(name, Group(name))
            if info is not group.info:
                self._update_group(group, info)
        self._drop_idle_channels()
        self._doubted &= self._on_worker.keys()
        self.loads.follow(deployments)
        for listener in self.listeners:
            listener(snapshot)
        self._first_snapshot.set()
        return True

    def _update_group(self, group: Group, info: Mapping[str, Any]) -> None:
        former, slots, affinity = group.info, group.router.slots, group.affinity
        group.update(info, self._local_address)
        unavailable = group.unavailable()
        if unavailable is not None:
            self._fail_waiting(group, unavailable)
        self._note_places(group, slots, group.router.slots)
        for slot in group.router.slots.values():
            slot.reachable = self._connected(slot) if group.wanted else slot.local
        if group.wanted:
            self._update_direct(former, info)
            known = slots.keys() if group.affinity == affinity else ()
            self._follow(s for i, s in group.router.slots.items() if i not in known)
        elif self.ahead:
            self._want(group)
        self._hand_out(group)

    def connect_ahead(self) -> None:
        """Connect to all replicas, from now on before there are requests for them."""
        self.ahead = True
        for group in self.groups.values():
            if not group.wanted:
                self._want(group)

    def _want(self, group: Group) -> None:
        """Begin to connect to a deployment's replicas.

        In a cluster of a thousand workers each would have a thousand connections to
        the others if all did this for all deployments.
        """
        group.wanted = True
        group.connecting_until = self.loop.time() + CONNECTED_S
        self._note_places(group, {}, group.router.slots)
        for slot in group.router.slots.values():
            slot.reachable = self._connected(slot)
        self._update_direct(None, group.info)
        self._follow(group.router.slots.values())

    def _note_places(
        self, group: Group, old: Mapping[int, Slot], new: Mapping[int, Slot]
    ) -> None:
        for replica_id in old.keys() - new.keys():
            del self._group_of[replica_id]
            slot = old[replica_id]
            there = self._on_worker.get(slot.worker, {})
            if there.pop(replica_id, None) is not None and not there:
                del self._on_worker[slot.worker]
        for replica_id in new.keys() - old.keys():
            self._group_of[replica_id] = group
            slot = new[replica_id]
            if group.wanted and not slot.local:
                self._on_worker.setdefault(slot.worker, {})[replica_id] = slot

    def _connecting(self, group: Group) -> bool:
        """Whether the first connections to a deployment may be on their way."""
        return not group.wanted or (
            self.loop.time() < group.connecting_until
            and not all(slot.reachable for slot in group.router.slots.values())
        )

    async def connected(self) -> None:
        """Wait until all replicas of the snapshot can be reached, for a moment.

        A request that comes now is not to find a queue where there is room.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECTED_S):
                while not all(map(self._has_channel, self._on_worker)):
                    self._opened.clear()
                    await self._opened.wait()

    def worker_lost(
        self, address: str, replicas: Collection[int] | None = None
    ) -> None:
        """Fail at once what waits for a worker that the controller has given up.

        Parameters
        ----------
        address
            The worker's.
        replicas
            Which of its replicas; None: all, for it has left the cluster.
        """
        if replicas is not None:
            self._replicas_lost(address, replicas)
            return
        # Before anything fails: what is tried again is not to go to a neighbour there.
        self._doubted.add(address)
        self._set_reachable(address, False)
        channel = self._channels.get(address)
        reason = f"worker {address} left the cluster"
        if channel is not None:
            channel.close(reason)
        for direct in list(self._direct.values()):
            if direct.worker == address:
                direct.close(reason)

    def _replicas_lost(self, address: str, replicas: Collection[int]) -> None:
        channel = self._channels.get(address)
        reason = f"worker {address} does not answer"
        for replica_id in replicas:
            group = self._group_of.get(replica_id)
            if group is not None:  # the routing without it is about to come
                group.router.slots[replica_id].reachable = False
            direct = self._direct.get(replica_id)
            if direct is not None:
                direct.close(reason)
            if channel is not None:
                channel.fail_replica(replica_id, reason)

    async def close(self) -> None:
        """Close all channels; what is open fails."""
        self._closed = True
        self.loads.close()
        stopped = DeploymentUnavailableError("daskserve is stopping here.")
        for group in self.groups.values():
            self._fail_waiting(group, stopped)
        if self._local is not None:
            self._local.close("daskserve is stopping here")
        self._direct_addresses = {}
        for direct in list(self._direct.values()):
            direct.close("daskserve is stopping here")
        for channel in list(self._channels.values()):
            channel.close("daskserve is stopping here")
            await channel.wait_closed()

    async def group(self, name: str) -> Group:
        """Return a deployment's group, waiting for the first snapshot if need be."""
        group = self.groups.get(name)
        if group is None:
            try:
                async with asyncio.timeout(FIRST_SNAPSHOT_S):
                    await self._first_snapshot.wait()
            except TimeoutError:
                raise DeploymentUnavailableError(
                    f"No routing table came within {FIRST_SNAPSHOT_S} s: is an "
                    f"instance running on this cluster, and the scheduler alive?"
                ) from None
            group = self.groups.get(name)
        if group is None:
            raise DeploymentUnavailableError(
                f"There is no deployment {name!r}; there are {sorted(self.groups)}."
            )
        return group

    def has_replicas(self, name: str) -> bool:
        """Whether a deployment has replicas that take requests; any thread."""
        group = self.groups.get(name)
        return group is not None and bool(group.router.slots)

    def acquire_now(self, call: Call, group: Group) -> Slot | None:
        """Count `call` as in a replica with room, if there is one now."""
        if group.waiting:  # nobody overtakes those who wait
            return None
        if call.session is not None and self._connecting(group):
            return None  # it may be for one that cannot be reached yet
        slot = _choose(group, call, self.loop.time())
        if slot is not None:
            slot.in_flight += 1
            group.begun += 1
        return slot

    async def acquire(self, call: Call, group: Group) -> Slot:
        """Wait for a replica with room and count `call` as in it."""
        slot = self.acquire_now(call, group)
        if slot is not None:
            return slot
        unavailable = group.unavailable()
        if self._closed:
            unavailable = DeploymentUnavailableError("daskserve is stopping here.")
        if unavailable is not None:
            raise unavailable
        wanted = group.wanted
        if not wanted:
            self._want(group)
        if not wanted or (call.session is not None and self._connecting(group)):
            if call.near or call.session is not None:
                await self.connected()
            slot = self.acquire_now(call, group)  # if others brought connections here
            if slot is not None:
                return slot
        if not call.refused:  # one that was refused had its turn already
            self._check_queue(group)
        waiter: asyncio.Future[Slot] = self.loop.create_future()
        call.waiter = waiter
        group.enqueue(call)
        # Who waits already has looked, after the last one that was refused.
        if call.refused or len(group.waiting) == 1:
            self._look_again(group, self.loop.time())
        self.queues.changed()
        try:
            return await waiter
        except BaseException:
            # Cancelled in the same turn of the loop in which the place was handed out.
            if not waiter.cancelled() and waiter.exception() is None:
                self.release(group, waiter.result())
            # Those who were given a place have been taken out.
            with contextlib.suppress(ValueError):
                group.waiting.remove(call)
            raise
        finally:
            call.waiter = None

    def release(self, group: Group, slot: Slot) -> None:
        """Take a request out of a replica's count, which makes room for another."""
        slot.in_flight -= 1
        if group.waiting:
            self._hand_out(group)

    def channel(self, slot: Slot) -> Channel:
        """Return the channel to a replica that is reachable."""
        if slot.local and self._local is not None:
            return self._local
        direct = self._direct.get(slot.replica_id)
        if direct is not None and direct.is_open:
            return direct
        return self._channels[slot.worker]

    def _check_queue(self, group: Group) -> None:
        if group.max_queued is None:
            return
        waiting = len(group.waiting) + self.queues.elsewhere(group.name)
        room = 0
        if self.loop.time() < group.connecting_until:
            # Those who wait for the first connection will find room there.
            slots = group.router.slots.values()
            room = group.router.max_ongoing * sum(not slot.reachable for slot in slots)
        if waiting >= group.max_queued + room:
            raise QueueFullError(
                f"Request dropped: {waiting} requests wait for deployment "
                f"{group.name!r} already (max_queued_requests={group.max_queued})."
            )

    def _count_waiting(self) -> dict[str, int]:
        return {n: len(g.waiting) for n, g in self.groups.items() if g.waiting}

    def _count_load(self, name: str) -> tuple[int, dict[int, int], int]:
        group = self.groups.get(name)
        if group is None:
            return 0, {}, 0
        slots = group.router.slots.values()
        running = {slot.replica_id: slot.in_flight for slot in slots if slot.in_flight}
        return len(group.waiting), running, group.begun

    def _connected(self, slot: Slot) -> bool:
        """Whether there is a connection to a replica; begins one if there is none."""
        if slot.local:
            return True
        channel = self._channels.get(slot.worker)
        if channel is None:
            self._open(slot.worker)
            return False
        return channel.is_open and slot.worker not in self._doubted

    def _has_channel(self, address: str) -> bool:
        channel = self._channels.get(address)
        return channel is not None and channel.is_open

    def _open(self, address: str) -> None:
        if not self._closed and address not in self._channels:
            channel = self._channels[address] = CommChannel(
                address, self._connect, self._channel_opened, self._channel_closed
            )
            channel.on_room = self._has_room
            channel.on_sessions = self._bind

    def _channel_opened(self, channel: CommChannel) -> None:
        self._opened.set()
        address = channel.address
        self._doubted.discard(address)
        reason = f"worker {address} {self._watch.reason}"
        self._watch.add(channel, channel.sock, lambda: channel.close(reason))
        groups = self._set_reachable(address, True)
        self._follow(self._on_worker.get(address, {}).values())
        for group in groups:
            self._hand_out(group)
        # The network may have come back.
        for replica_id in self._on_worker.get(address, {}):
            self._open_direct(replica_id)

    def _channel_closed(self, channel: CommChannel) -> None:
        self._watch.discard(channel)
        address = channel.address
        if self._channels.get(address) is channel:
            del self._channels[address]
            self._set_reachable(address, False)
            # If replicas are still said to be there, the network had a moment.
            self.loop.call_later(RECONNECT_S, self._reopen, address)

    def _update_direct(
        self, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None
    ) -> None:
        """Begin connections to the ports of new replicas; end those of old ones."""
        former, present = self._direct_replicas(old), self._direct_replicas(new)
        self._direct_addresses.update(present)
        for replica_id in present.keys() - self._direct.keys():
            self._open_direct(replica_id)
        for replica_id in former.keys() - present.keys():
            self._direct_addresses.pop(replica_id, None)
            channel = self._direct.get(replica_id)
            # Else its end is the replica's to say.
            if channel is not None and channel.idle:
                channel.close("the replica is not there any more")

    def _direct_replicas(
        self, info: Mapping[str, Any] | None
    ) -> dict[int, tuple[str, DirectAddress]]:
        return {
            replica_id: (worker, DirectAddress(*direct))
            for replica_id, _, worker, direct in (info["replicas"] if info else ())
            if direct is not None and worker != self._local_address
        }

    def _open_direct(self, replica_id: int) -> None:
        found = self._direct_addresses.get(replica_id)
        if found is None or replica_id in self._direct:
            return
        worker, address = found
        context = self._context if worker.startswith("tls://") else None

        def closed(channel: DirectChannel) -> None:
            del self._direct[replica_id]
            if channel.broke:
                self._doubt(worker)
            delay = RECONNECT_S if channel.broke else DIRECT_RETRY_S
            self.loop.call_later(delay, self._reopen_direct, replica_id)

        def opened(channel: DirectChannel) -> None:
            # There, too: it is to come before what the same replica answers.
            group = self._group_of.get(replica_id)
            if group is not None and group.affinity is not None:
                channel.send((FOLLOW, 0, replica_id))

        channel = DirectChannel(address, worker, context, self._watch, closed, opened)
        channel.on_room = self._has_room
        channel.on_sessions = self._bind
        self._direct[replica_id] = channel

    def _reopen_direct(self, replica_id: int) -> None:
        found = self._direct_addresses.get(replica_id)
        # Else it is due when there is a way to the worker at all.
        if found is not None and self._has_channel(found[0]):
            self._open_direct(replica_id)

    def _doubt(self, worker: str) -> None:
        """Send nothing where a connection broke, until more is known.

        Mostly the process is dead: a request that was in one replica there is not to
        be lost once more in another.
        """
        self._doubted.add(worker)
        self._set_reachable(worker, False)
        self.loop.call_later(RECONNECT_S, self._probe, worker)

    def _probe(self, worker: str) -> None:
        """Ask a worker whether it lives, if the connection to it still looks so.

        The end of that one may only come late to a busy process.
        """
        channel = self._channels.get(worker)
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
        for replica_id, slot in self._on_worker.get(worker, {}).items():
            slot.reachable = self._connected(slot)
            self._hand_out(self._group_of[replica_id])

    def _reopen(self, address: str) -> None:
        if address in self._on_worker:
            self._open(address)

    def _set_reachable(self, address: str, reachable: bool) -> set[Group]:
        """Note it for all replicas on a worker; return their deployments."""
        there = self._on_worker.get(address, {})
        for slot in there.values():
            slot.reachable = reachable
        return {self._group_of[replica_id] for replica_id in there}

    def _drop_idle_channels(self) -> None:
        for address in self._channels.keys() - self._on_worker.keys():
            # A draining replica's requests may still be on their way.
            if self._channels[address].idle:
                self._channels[address].close("no replica is there any more")

    def _hand_out(self, group: Group) -> None:
        now = self.loop.time()
        while group.waiting:
            waiter = group.waiting[0].waiter
            if waiter is None or waiter.done():
                group.waiting.popleft()
                continue
            slot = _choose(group, group.waiting[0], now)
            if slot is None:
                self._look_again(group, now)
                return
            slot.in_flight += 1
            group.begun += 1
            group.waiting.popleft()
            waiter.set_result(slot)

    def _look_again(self, group: Group, now: float) -> None:
        """Look once more when a replica that has refused may be asked again.

        It tells when it has room, but for who comes from nowhere to a full one.
        """
        if group.timer is not None:
            return
        pauses = [s.full_until for s in group.router.slots.values()]
        ends = [end for end in pauses if end > now]
        if ends:
            group.timer = self.loop.call_at(min(ends) + 0.001, self._pause_over, group)

    def _pause_over(self, group: Group) -> None:
        group.timer = None
        self._hand_out(group)

    def _has_room(self, replica_id: int) -> None:
        """Note that a replica keeps a place for this process, for a moment."""
        group = self._group_of.get(replica_id)
        if group is None:
            return
        slot = group.router.slots[replica_id]
        if not slot.reachable:
            return
        # One: for a second there may be no room.
        call = next((c for c in group.waiting if _is_open(c.waiter)), None)
        if call is not None and call.waiter is not None:
            group.waiting.remove(call)
            slot.in_flight += 1
            group.begun += 1
            call.waiter.set_result(slot)
        else:
            self.channel(slot).send((DECLINE, 0, replica_id))

    def _follow(self, slots: Iterable[Slot]) -> None:
        """Ask replicas that can be reached for their sessions, if they matter."""
        for slot in slots:
            if slot.reachable and self._group_of[slot.replica_id].affinity is not None:
                self.channel(slot).send((FOLLOW, 0, slot.replica_id))

    def _bind(self, replica_id: int, digests: bytes) -> None:
        """Note sessions that a replica says it has."""
        group = self._group_of.get(replica_id)
        if group is not None:
            group.sessions.bind(replica_id, digests)

    def _fail_waiting(self, group: Group, failure: Exception) -> None:
        while group.waiting:
            waiter = group.waiting.popleft().waiter
            if waiter is not None and not waiter.done():
                waiter.set_exception(failure)


def _choose(group: Group, call: Call, now: float) -> Slot | None:
    if call.near:
        near = group.router.choose_near(call.near, now)
        if near is not None:
            return near
    router, session = group.router, call.session
    if session is None:
        return router.choose(now, call.avoid, call.model_id)
    bound = group.sessions.find(session, router.slots)
    return router.choose_for(session.digest.hex(), bound, now, call.avoid)


def _is_open(waiter: asyncio.Future[Slot] | None) -> bool:
    return waiter is not None and not waiter.done()


class Call:
    """One request or handle call, from the wait for a replica to the last message.

    Use it on the dispatcher's loop, from one task; `abort` may come from any other
    task of that loop. `finish` is due in any case and may be called twice.
    """

    __slots__ = ("_aborted", "_channel", "_dispatcher", "_exchange", "avoid",
                 "deployment", "group", "model_id", "near", "number", "on_grant",
                 "refused", "session", "slot", "waiter")  # fmt: skip

    def __init__(
        self, dispatcher: Dispatcher, deployment: str, model_id: str = ""
    ) -> None:
        self._dispatcher = dispatcher
        self.deployment = deployment
        #: The model that it is for, if it is for one of many.
        self.model_id = model_id
        #: The session that it belongs to, if a replica is chosen by it.
        self.session: Session | None = None
        #: Workers where replicas are preferred, the best ones first.
        self.near: tuple[str, ...] = ()
        self._exchange: Exchange | None = None
        self._channel: Channel | None = None
        self._aborted: BaseException | None = None
        #: Who came first has the lower one.
        self.number = next(_numbers)
        self.group: Group | None = None
        self.slot: Slot | None = None
        self.waiter: asyncio.Future[Slot] | None = None
        self.avoid: Slot | None = None
        self.refused = False
        #: Told how many bytes of the request's body the replica takes.
        self.on_grant: Callable[[int], None] | None = None

    @property
    def begun(self) -> bool:
        """Whether a replica has been sent the request, and not been given up since."""
        return self._exchange is not None

    def begin_now(
        self, make: Callable[[int, int], Message], on_news: Callable[[], None]
    ) -> bool:
        """Send a request if a replica has room for it; return whether one has.

        Then `on_news` is called with what comes, until `stop_listening`; `first`
        goes on from there.
        """
        group = self._dispatcher.groups.get(self.deployment)
        if group is None:
            return False
        self.slot = self._dispatcher.acquire_now(self, group)
        if self.slot is None:
            return False
        self.group = group
        self._send_first(make, self.slot).on_news = on_news
        return True

    def peek(self) -> Message | None:
        """Return what has come from the replica and was not taken, or None."""
        return None if self._exchange is None else self._exchange.first

    def stop_listening(self) -> None:
        """Leave what comes to `first` and `next`."""
        if self._exchange is not None:
            self._exchange.on_news = None

    async def first(
        self, make: Callable[[int, int], Message], *, retry_lost: bool
    ) -> Message:
        """Send a request until a replica has taken it; return its first message.

        Parameters
        ----------
        make
            Makes the request's message from exchange id and replica id; called again
            for another replica.
        retry_lost
            Whether to try another replica, once, if the one that had the request is
            lost: the request is idempotent and can be sent again.

        Raises
        ------
        ReplicaDiedError
            The replica was lost with the request in it.
        RequestError
            Any other of its subclasses, as they say.
        """
        while True:
            if self._exchange is None:
                await self._begin(make)
            try:
                message = await self.next()
            except ConnectionLostError as lost:
                self.avoid = self.slot
                self.finish()
                if not retry_lost:
                    raise ReplicaDiedError(str(lost)) from lost
                retry_lost = False
                continue
            if message[0] != REFUSED:
                return message
            assert self.slot is not None
            self.slot.full_until = self._dispatcher.loop.time() + REFUSED_PAUSE_S
            self.refused = True
            self.finish()

    async def next(self) -> Message:
        """Return the next message of the replica."""
        if self._aborted is not None:
            raise self._aborted
        assert self._exchange is not None
        return await self._exchange.next()

    def send(self, op: int, *fields: Any) -> None:
        """Send a further message to the replica that has the request."""
        if self._exchange is not None:
            assert self._channel is not None and self.slot is not None
            exchange_id = self._exchange.exchange_id
            self._channel.send((op, exchange_id, self.slot.replica_id, *fields))

    def abort(self, failure: BaseException) -> None:
        """Make `first` or `next` raise `failure`, wherever they wait."""
        if self._aborted is None:
            self._aborted = failure
            if self.waiter is not None and not self.waiter.done():
                self.waiter.set_exception(failure)
            if self._exchange is not None:
                self._exchange.fail(failure)

    def cancel(self) -> None:
        """Tell the replica that nobody waits for it any more, and finish."""
        self.send(CANCEL)
        self.finish()

    def finish(self) -> None:
        """Give the place in the replica back."""
        if self._exchange is not None:
            assert self._channel is not None
            self._channel.close_exchange(self._exchange)
            self._exchange = None
        if self.slot is not None:
            slot, self.slot = self.slot, None
            assert self.group is not None
            self._dispatcher.release(self.group, slot)

    async def _begin(self, make: Callable[[int, int], Message]) -> None:
        dispatcher = self._dispatcher
        self.group = dispatcher.groups.get(self.deployment) or await dispatcher.group(
            self.deployment
        )
        while self._aborted is None:
            self.slot = await dispatcher.acquire(self, self.group)
            if self.slot.reachable:
                break
            self.finish()  # its connection broke while the place was handed out
        if self._aborted is not None:
            self.finish()
            raise self._aborted
        assert self.slot is not None
        self._send_first(make, self.slot)

    def _send_first(self, make: Callable[[int, int], Message], slot: Slot) -> Exchange:
        self._channel = channel = self._dispatcher.channel(slot)
        self._exchange = exchange = channel.open()
        exchange.replica_id = slot.replica_id
        exchange.on_grant = self.on_grant
        channel.send(make(exchange.exchange_id, slot.replica_id))
        return exchange


def timeout_error(name: str, timeout_s: float) -> RequestTimeoutError:
    """Return the error of a request that got no answer in time."""
    return RequestTimeoutError(
        f"Deployment {name!r} did not begin to answer within {timeout_s:g} s."
    )
