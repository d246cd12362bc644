"""A process's way to all replicas: the caller's end of every request and handle call.

Runs on the transport loop of a worker, a client or the scheduler. Snapshots of the
routing come in, requests go out over channels to the replica that `Router` chose. Those
that no replica has a slot for wait here, and go to whoever is free first.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any

from daskserve.exceptions import DeploymentUnavailableError, QueueFullError
from daskserve.transport.call import Call
from daskserve.transport.channel import Channel, Inbox
from daskserve.transport.connections import CONNECTED_S, Connections
from daskserve.transport.group import Group
from daskserve.transport.load_reports import LoadReports
from daskserve.transport.messages import (
    DECLINE,
    FOLLOW,
    FULL,
    FULL_OF_WEBSOCKETS,
    LOAD,
    MODELS,
    ROOM,
    SESSION,
    WANT,
    Message,
)
from daskserve.transport.queue_reports import QueueReports
from daskserve.transport.router import Slot
from daskserve.transport.snapshots import follow

#: How long a replica that is full is not asked again, unless it offers a slot before.
ASKED_PAUSE_S = 0.5
#: And one that refuses for any other reason.
REFUSED_PAUSE_S = 0.05
#: How long the first request for a model waits for replicas to tell which they have.
MODELS_S = 0.5
#: How many replicas are asked for slots at a time, and for how many at most.
ASKED_REPLICAS, ASKED_SLOTS = 8, 64
#: How long a process that has just connected waits to be told of the routing.
FIRST_SNAPSHOT_S = 10


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
        self.connections = Connections(
            loop,
            connect,
            changed=self._reachability_changed,
            notice=self._take_notice,
            opened=self._direct_opened,
            context=context,
            local_address=local_address,
            inboxes=inboxes,
            silence_s=silence_s,
        )
        self._local_address = local_address
        self._group_of: dict[int, Group] = {}
        self._first_snapshot = asyncio.Event()
        self._closed = False

    # Snapshots.

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
            self._delete_group(self.groups.pop(name))
        for name, info in deployments.items():
            group = self.groups.get(name) or self.groups.setdefault(name, Group(name))
            if info is not group.info:
                self._update_group(group, info)
        self.connections.drop_idle()
        self.loads.follow(deployments)
        for listener in self.listeners:
            listener(snapshot)
        self._first_snapshot.set()
        return True

    def _update_group(self, group: Group, info: Mapping[str, Any]) -> None:
        former, affinity = group.info, group.affinity
        new, gone = group.update(info, self._local_address)
        unavailable = group.unavailable()
        if unavailable is not None:
            self._fail_waiting(group, unavailable)
        for slot in new:
            self._group_of[slot.replica_id] = group
            slot.reachable = slot.local
        self._forget(gone)
        if group.wanted:
            self.connections.update_direct(former, info)
            self._connect(group, new)
            same = affinity == group.affinity
            self._follow(new if same else group.router.slots.values())
        elif self.ahead:
            self._want(group)
        for slot in new:
            group.router.note(slot)
        self._hand_out(group)

    def _delete_group(self, group: Group) -> None:
        self._forget(group.router.slots.values())
        self.connections.update_direct(group.info, None)
        group.router.update((), 1)
        gone = DeploymentUnavailableError(f"Deployment {group.name!r} was deleted.")
        self._fail_waiting(group, gone)

    def _forget(self, slots: Iterable[Slot]) -> None:
        slots = list(slots)
        for slot in slots:
            del self._group_of[slot.replica_id]
        self.connections.forget(slots)

    def connect_ahead(self) -> None:
        """Connect to all replicas, from now on before there are requests for them."""
        self.ahead = True
        for group in self.groups.values():
            if not group.wanted:
                self._want(group)

    def _want(self, group: Group) -> None:
        """Begin to connect to the workers of a deployment's replicas.

        In a cluster of a thousand workers each would have a thousand connections to
        the others if all did this for all deployments.
        """
        group.wanted = True
        self.connections.update_direct(None, group.info)
        self._connect(group, group.router.slots.values())
        self._follow(group.router.slots.values())

    def _connect(self, group: Group, slots: Iterable[Slot]) -> None:
        slots = list(slots)
        self.connections.want(slots)
        if any(not slot.reachable for slot in slots):
            group.connecting_until = self.loop.time() + CONNECTED_S
            self._look_again(group, group.connecting_until)
        for slot in slots:
            group.router.note(slot)

    async def connected(self) -> None:
        """Wait until all replicas of the snapshot can be reached, for a moment.

        A request that comes now is not to find a queue where there is room.
        """
        await self.connections.connected()

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
        if replicas is None:
            self.connections.worker_lost(address)
            return
        for replica_id in replicas:
            group = self._group_of.get(replica_id)
            if group is not None:  # the routing without it is about to come
                slot = group.router.slots[replica_id]
                slot.reachable = False
                group.router.note(slot)
            self.connections.replica_lost(address, replica_id)

    async def close(self, reason: str = "daskserve is stopping here") -> None:
        """Close all channels; what is open fails, and says the reason."""
        self._closed = True
        self.loads.close()
        stopped = DeploymentUnavailableError(f"{reason}.")
        for group in self.groups.values():
            if group.timer is not None:
                group.timer.cancel()
            self._fail_waiting(group, stopped)
        await self.connections.close(reason)

    # Calls.

    async def group(self, name: str) -> Group:
        """Return a deployment's group, waiting for the first snapshot if need be."""
        group = self.groups.get(name)
        if group is None:
            await self.informed()
            group = self.groups.get(name)
        if group is None:
            raise DeploymentUnavailableError(
                f"There is no deployment {name!r}; there are {sorted(self.groups)}."
            )
        return group

    async def informed(self) -> None:
        """Wait for the first snapshot.

        Raises
        ------
        DeploymentUnavailableError
            None comes.
        """
        try:
            async with asyncio.timeout(FIRST_SNAPSHOT_S):
                await self._first_snapshot.wait()
        except TimeoutError:
            raise DeploymentUnavailableError(
                f"No routing table came within {FIRST_SNAPSHOT_S} s: is an instance "
                f"running on this cluster, and the scheduler alive?"
            ) from None

    def has_replicas(self, name: str) -> bool:
        """Whether a deployment has replicas that take requests; any thread."""
        group = self.groups.get(name)
        return group is not None and bool(group.router.slots)

    def submit(self, call: Call, group: Group) -> None:
        """Send a call to a replica that has a slot for it, or let it wait for one.

        Raises
        ------
        RequestError
            It can't wait, as there is no room for that, or no sense in it.
        """
        if group.wanted and not (group.waiting or group.connecting_until):
            if not call.particular:  # as mostly, and so in the fewest steps
                slot = group.router.choose(self.loop.time())
                if slot is not None:
                    group.router.begin(slot)
                    call.assign(slot)
                    return
        elif not group.wanted and not self._closed:
            self._want(group)
        self._submit(call, group)

    def _submit(self, call: Call, group: Group) -> None:
        bound = None
        # Nobody overtakes those who wait for the same.
        if not group.waiting or call.returned or call.websocket or call.session:
            now = self.loop.time()
            slot = self._choose(group, call, now)
            if slot is not None:
                if self._may_begin(group, call, slot, now):
                    self._assign(group, call, slot)
                    return
                bound = slot
        unavailable = _stopping() if self._closed else group.unavailable()
        if unavailable is not None:
            raise unavailable
        if call.websocket and group.router.reachable and not group.connecting_until:
            raise _too_many_websockets(group)
        if not call.returned:
            group.check_queue(self.queues.elsewhere(group.name))
        group.enqueue(call, bound)
        self.queues.changed()
        if bound is not None:
            self._hand_out(group)
        elif group.waiting == 1 or call.returned:
            # Who waits already has looked.
            self._ask_for_slots(group, self.loop.time())

    def release(self, group: Group, slot: Slot, websocket: bool = False) -> None:
        """Take a request out of a replica's count, which makes room for another."""
        if websocket:
            slot.websockets -= 1
            return
        group.router.end(slot)
        if group.waiting:
            self._hand_out(group)

    def refused(self, call: Call, group: Group, slot: Slot, reason: str) -> None:
        """Note that a replica has not taken a call."""
        now = self.loop.time()
        if reason == FULL:  # it will offer a slot; what else was asked it may forget
            group.router.close(slot, now + ASKED_PAUSE_S, 1)
        elif reason == FULL_OF_WEBSOCKETS:
            slot.no_websockets_until = now + ASKED_PAUSE_S
            return
        else:
            group.router.close(slot, now + REFUSED_PAUSE_S)
        self._look_again(group, slot.closed_until)

    def _choose(self, group: Group, call: Call, now: float) -> Slot | None:
        router = group.router
        if group.connecting_until:
            if not self._is_connecting(group, now):
                group.connecting_until = 0.0
            elif call.near or call.model_id or call.session:
                return None  # the right one may be about to be reached
        if call.session is not None:
            bound = group.sessions.find(call.session, router.slots)
            websockets = group.max_websockets if call.websocket else 0
            key = call.session.digest.hex()
            return router.choose_for_session(
                key, bound, now, websockets=websockets, avoid=call.avoid
            )
        if call.websocket:
            return router.choose_for_websocket(group.max_websockets, now)
        if call.near is not None:
            slot = router.choose_near(*call.near, now)
        elif call.model_id:
            if not group.by_model:
                group.by_model = True
                group.models_until = now + MODELS_S
                self._look_again(group, group.models_until)
                self._follow(router.slots.values())
            if group.hears_models(now):
                return None  # one may have it that was never asked from here
            slot = router.choose_for_model(call.model_id, now, call.avoid)
        else:
            slot = router.choose(now, call.avoid)
        if slot is not None and group.connecting_until:
            # The first that can be reached is not to get what is for all.
            if slot.in_flight >= max(1, group.fair_share()):
                return None
        return slot

    def _is_connecting(self, group: Group, now: float) -> bool:
        return now < group.connecting_until and any(
            not slot.reachable and self.connections.is_connecting(slot)
            for slot in group.router.slots.values()
        )

    def _may_begin(self, group: Group, call: Call, slot: Slot, now: float) -> bool:
        """Whether the replica that was chosen for a call has a slot for it now."""
        if call.session is None or call.websocket:
            return True
        is_free = group.router.is_free(slot, now)
        return is_free and (call.returned or slot.replica_id not in group.bound)

    def _assign(self, group: Group, call: Call, slot: Slot) -> None:
        if call.websocket:
            slot.websockets += 1
        else:
            group.router.begin(slot)
        call.assign(slot)

    def _hand_out(self, group: Group) -> None:
        """Send those who wait to replicas that have slots for them, in their order."""
        now = self.loop.time()
        for replica_id in list(group.bound):
            self._hand_out_bound(group, replica_id, now)
        while (call := group.next_call()) is not None:
            slot = self._choose(group, call, now)
            if slot is not None:
                group.leave(call)
                if self._may_begin(group, call, slot, now):
                    self._assign(group, call, slot)
                else:
                    group.enqueue(call, slot)
            elif (
                call.websocket and group.router.reachable and not group.connecting_until
            ):
                call.fail(_too_many_websockets(group))
            else:
                self._ask_for_slots(group, now)
                return

    def _hand_out_bound(self, group: Group, replica_id: int, now: float) -> None:
        """Send those who wait for one replica, or let them look for another."""
        slot = group.router.slots.get(replica_id)
        while (call := group.next_bound(replica_id)) is not None:
            if slot is None or not slot.reachable:
                group.leave(call)
                group.enqueue(call)
            elif group.router.is_free(slot, now):
                group.leave(call)
                self._assign(group, call, slot)
            else:
                if slot.index >= 0:  # full of others' requests
                    self._ask(group, slot, len(group.bound[replica_id]), now)
                return

    def _ask_for_slots(self, group: Group, now: float) -> None:
        """Ask replicas for slots that are full of other callers' requests."""
        if group.connecting_until or group.hears_models(now):
            return
        number = min(group.waiting, ASKED_SLOTS)
        for slot in group.router.to_ask(ASKED_REPLICAS):
            self._ask(group, slot, number, now)

    def _ask(self, group: Group, slot: Slot, number: int, now: float) -> None:
        group.router.close(slot, now + ASKED_PAUSE_S, number)
        self._look_again(group, slot.closed_until)
        self.connections.channel(slot).send((WANT, 0, slot.replica_id, number))

    def _look_again(self, group: Group, when: float) -> None:
        """Look once more at that time, at the latest."""
        if group.timer is not None:
            if group.timer_at <= when:
                return
            group.timer.cancel()
        group.timer_at = when
        group.timer = self.loop.call_at(when + 0.001, self._time_to_look, group)

    def _time_to_look(self, group: Group) -> None:
        group.timer = None
        now = self.loop.time()
        due = group.router.reopen(now)
        for until in (group.connecting_until, group.models_until):
            if until > now:
                due = min(due or until, until)
        if due is not None:
            self._look_again(group, due)
        self._hand_out(group)

    # What replicas say of themselves.

    def _take_notice(self, message: Message) -> None:
        group = self._group_of.get(message[2])
        if group is None:
            return
        slot = group.router.slots[message[2]]
        if message[0] == ROOM:
            self._has_slot(group, slot)
        elif message[0] == LOAD:
            _, _, _, others, limit, call_us, typical_us, stuck = message
            times_s = call_us / 1e6, typical_us / 1e6
            group.router.report(slot, others, limit, *times_s, stuck, self.loop.time())
            if group.waiting:
                self._hand_out(group)
        elif message[0] == SESSION:
            group.sessions.bind(message[2], message[3])
        elif message[0] == MODELS:
            _, _, _, limit, load_us, ids = message
            group.router.models.report(
                slot, limit, load_us / 1e6, ids, self.loop.time()
            )
            if group.waiting:
                self._hand_out(group)

    def _has_slot(self, group: Group, slot: Slot) -> None:
        """Take a slot that a replica keeps for this process, for a moment."""
        if not slot.reachable:
            return
        call = group.next_bound(slot.replica_id) or group.next_call()
        if call is None:
            group.router.open(slot)
            decline = (DECLINE, 0, slot.replica_id)
            self.connections.channel(slot).send(decline)
            return
        if call.model_id or call.near is not None:  # another one may suit it better
            group.router.open(slot)
            self._hand_out(group)
            return
        group.leave(call)
        self._assign(group, call, slot)
        slot.asked -= 1
        if slot.asked > 0:
            return
        if group.waiting:
            number = min(group.waiting, ASKED_SLOTS)
            self._ask(group, slot, number, self.loop.time())
        else:
            group.router.open(slot)

    def _follow(self, slots: Iterable[Slot]) -> None:
        """Ask replicas for their sessions and models, if these matter.

        Only those that can be reached; others are asked when they can.
        """
        for slot in slots:
            group = self._group_of.get(slot.replica_id)
            if group is None or not slot.reachable:
                continue
            if group.by_model or group.affinity is not None:
                channel = self.connections.channel(slot)
                channel.send((FOLLOW, 0, slot.replica_id))

    def _direct_opened(self, replica_id: int, channel: Channel) -> None:
        # There, too: it is to come before what the same replica answers.
        group = self._group_of.get(replica_id)
        if group is not None and group.affinity is not None:
            channel.send((FOLLOW, 0, replica_id))

    def _reachability_changed(self, slots: Iterable[Slot]) -> None:
        slots = list(slots)
        self._follow(slots)
        groups = set()
        for slot in slots:
            group = self._group_of.get(slot.replica_id)
            if group is not None:
                groups.add(group)
                if not slot.reachable:
                    slot.asked, slot.closed_until = 0, 0.0  # whoever was asked is gone
                group.router.note(slot)
        for group in groups:
            self._hand_out(group)

    # Reports.

    def _count_waiting(self) -> dict[str, int]:
        return {n: g.waiting for n, g in self.groups.items() if g.waiting}

    def _count_load(self, name: str) -> tuple[int, dict[int, int], int]:
        group = self.groups.get(name)
        if group is None:
            return 0, {}, 0
        counts = {
            slot.replica_id: slot.in_flight + slot.streams + slot.websockets
            for slot in group.router.slots.values()
        }
        if self.connections.local is not None:
            # No caller counts what nobody waits for.
            for replica_id, inbox in list(self.connections.local.inboxes.items()):
                if inbox.deserted and replica_id in counts:
                    counts[replica_id] += inbox.deserted
        running = {replica_id: n for replica_id, n in counts.items() if n}
        return group.waiting, running, group.router.begun

    def _fail_waiting(self, group: Group, failure: Exception) -> None:
        for call in group.calls():
            if call.queued:
                call.fail(failure)


def _too_many_websockets(group: Group) -> QueueFullError:
    return QueueFullError(
        f"WebSocket refused: each replica of deployment {group.name!r} has as many as "
        f"it may (max_websockets={group.max_websockets})."
    )


def _stopping() -> DeploymentUnavailableError:
    return DeploymentUnavailableError("daskserve is stopping here.")
