"""Choose a replica for a request by the wait to expect there: pure. Any process.

A caller knows its own requests in each replica; replicas tell, with their answers, what
they have of others, how long a call takes there and how many they take at a time. The
least expected wait wins, calls in progress times what each takes, as in Finagle's and
linkerd's "peak EWMA". Being in the caller's process is worth the hop that it saves and
no more. Of many replicas only some are looked at, by chance ("power of two choices":
M. Mitzenmacher, IEEE TPDS 12(10), 2001), and nothing is sent to one that is thought to
be full: it waits at the caller, who asks for a slot, until somebody is free ("late
binding": K. Ousterhout et al., "Sparrow", SOSP 2013).

A request for one of many models goes to a replica that has it, which `models` knows, or
to one with room for it, the first in an order that all callers share ("highest random
weight": D. Thaler and C. Ravishankar, IEEE/ACM Trans. Networking 6(1), 1998). That is
also where requests of a session go that is bound to no replica.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from daskserve.transport.model_places import ModelPlaces

#: What a message to another process and back costs, in seconds. A call that takes less
#: is hardly worth moving, for that costs more than it brings: of the wait behind such
#: calls, this part counts.
HOP_S, SHORT = 100e-6, 0.05
#: From so many hops on, the first of two terms is the larger one.
MOVABLE = 1 / (1 - SHORT)
#: How long a call is thought to take before any replica has said.
UNKNOWN_CALL_S = 1e-3
#: For how long it counts what a replica said of others' requests in it, in seconds.
VALID_S = 1.0
#: And what it said of the time of a call.
TIME_VALID_S = 10.0
#: So many replicas are all looked at; of more, this many by chance.
FEW, SAMPLED = 8, 4
#: Times that differ by less, or are less, are taken for equal: they are measured, so
#: noisy, and who is a little quicker is not to get all that comes.
NOISE, NOISE_S = 1.3, 1e-3
#: Shorter times are taken for this one.
LEAST_S = 1e-6
#: How much a report of a call's time counts beside those before it.
WEIGHT = 0.05
#: Bytes/s at which values are thought to travel between hosts, and within one.
BETWEEN_HOSTS, WITHIN_HOST = 250e6, 1e9
#: The wait for a replica without a slot, and what a stuck one adds.
FULL, STUCK_S = math.inf, 1e6
#: For how many models and sessions the order of replicas is kept.
MAX_RANKED = 1000


@dataclass(slots=True, eq=False)
class Slot:
    """One replica as a caller sees it."""

    replica_id: int
    tag: str
    #: The Dask address of its worker.
    worker: str
    #: It lives in the caller's own process.
    local: bool = False
    #: How many requests it takes at a time before it has said; None: as many as may be.
    first_limit: int | None = None
    #: Requests of this caller that are in it, and how many it takes at a time.
    in_flight: int = 0
    limit: int = 1
    #: Streams of this caller whose sync code is done, and its open WebSockets.
    streams: int = 0
    websockets: int = 0
    #: It has as many WebSockets as it may, or so it said: until this time.
    no_websockets_until: float = 0.0
    #: Requests of others in it, abandoned ones included, and until when that counts.
    others: int = 0
    valid_until: float = 0.0
    #: How much longer one more request has to wait for each that is in it, in seconds;
    #: below 0: unknown.
    call_s: float = -1.0
    #: Until when that is believed, since it may have had a bad day.
    call_until: float = 0.0
    #: Calls that nobody waits for any more keep all its threads.
    stuck: bool = False
    #: How many slots it was asked for that it has not offered yet.
    asked: int = 0
    #: It refused or was asked: nothing is sent before it offers a slot, or this time.
    closed_until: float = 0.0
    #: There is a connection to its worker.
    reachable: bool = True
    #: It is still in the newest snapshot.
    routable: bool = True
    #: Where it stands in the router's list of those with room; -1: nowhere.
    index: int = -1


class Router:
    """The replicas of one deployment and this caller's count of what is in each.

    Parameters
    ----------
    rng
        Source of chance, passed in so that tests are exact.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self.slots: dict[int, Slot] = {}
        self.max_ongoing = 1
        #: Requests of this caller in all replicas, those that drain included.
        self.in_flight = 0
        #: How many were sent to replicas, up to now.
        self.begun = 0
        #: What a call takes in most replicas, in seconds.
        self.call_s = UNKNOWN_CALL_S
        self._typical_s = 0.0
        #: Replicas with room, as far as this caller's own requests go.
        self._open: list[Slot] = []
        self._local: list[Slot] = []
        #: Those that are closed, by the time at which they are opened at the latest.
        self._closed: list[tuple[float, int, Slot]] = []
        self._random = (rng or random.Random()).random
        self._ranked: OrderedDict[str, list[Slot]] = OrderedDict()
        #: Which replicas have which models.
        self.models: ModelPlaces[Slot] = ModelPlaces()

    def update(self, slots: Iterable[Slot], max_ongoing: int) -> None:
        """Take the newest snapshot's replicas; counts of those that stay are kept."""
        fresh = {}
        for slot in slots:
            fresh[slot.replica_id] = self.slots.get(slot.replica_id, slot)
        former, self.slots = self.slots, fresh
        changed, self.max_ongoing = max_ongoing != self.max_ongoing, max_ongoing
        for replica_id, slot in former.items():
            if replica_id not in fresh:
                slot.routable = False
                self.note(slot)
                self.models.forget(slot)
        for replica_id, slot in fresh.items():
            if replica_id not in former or (changed and slot.first_limit is None):
                limit = slot.first_limit
                slot.limit = max_ongoing if limit is None else min(limit, max_ongoing)
            self.note(slot)
        self._local = [slot for slot in fresh.values() if slot.local]
        self._ranked.clear()

    def begin(self, slot: Slot) -> None:
        """Count a request that is sent to a replica; `end` it."""
        slot.in_flight = number = slot.in_flight + 1
        self.in_flight += 1
        self.begun += 1
        if number >= slot.limit:
            self.note(slot)

    def end(self, slot: Slot) -> None:
        """Count a request that has ended."""
        slot.in_flight -= 1
        self.in_flight -= 1
        if slot.index < 0:
            self.note(slot)

    def note(self, slot: Slot) -> None:
        """Look again whether a replica has room, after any change to its slot."""
        has_room = (
            slot.reachable
            and slot.routable
            and slot.in_flight < slot.limit
            and not slot.closed_until
        )
        if has_room == (slot.index >= 0):
            return
        if has_room:
            slot.index = len(self._open)
            self._open.append(slot)
        else:
            last = self._open.pop()
            if last is not slot:
                self._open[slot.index] = last
                last.index = slot.index
            slot.index = -1

    def report(
        self,
        slot: Slot,
        others: int,
        limit: int,
        call_s: float,
        typical_s: float,
        stuck: bool,
        now: float,
    ) -> None:
        """Take what a replica says of itself.

        Parameters
        ----------
        slot
            The replica's.
        others
            Requests of other callers in it.
        limit
            How many it takes at a time.
        call_s
            Seconds that each of them adds to the wait of the next.
        typical_s
            The same, if few that take long do not count: replicas are compared by it.
        stuck
            Whether calls that nobody waits for keep all its threads.
        now
            Time in seconds.
        """
        # Whatever it says.
        call_s, typical_s = max(LEAST_S, call_s), max(LEAST_S, typical_s)
        if self._typical_s:
            # Geometric means: one replica unlike the others changes them little.
            self.call_s *= (call_s / self.call_s) ** WEIGHT
            self._typical_s *= (typical_s / self._typical_s) ** WEIGHT
        else:
            self.call_s, self._typical_s = call_s, typical_s
        low, high = sorted((typical_s, self._typical_s))
        alike = high < NOISE * low or high < NOISE_S
        slot.call_s = -1.0 if alike else self.call_s * typical_s / self._typical_s
        slot.call_until = now + TIME_VALID_S
        slot.others, slot.stuck = others, stuck
        slot.valid_until = math.inf if stuck else now + VALID_S
        slot.limit = max(1, min(limit, self.max_ongoing))
        self.note(slot)

    def choose(self, now: float, avoid: Slot | None = None) -> Slot | None:
        """Return the replica with the least expected wait, or None if all are full.

        Parameters
        ----------
        now
            Time in seconds.
        avoid
            A replica to be taken only if there is no other.
        """
        slots = self._open
        count = len(slots)
        if count == 1:
            slot = slots[0]
            return slot if not slot.others or self._wait(slot, now) < FULL else None
        if count <= FEW:
            best = self._best(slots, now, avoid)
            if best is not None and (last := slots[-1]) is not best:
                # Behind the others: all that are alike get their turn.
                slots[best.index], slots[-1] = last, best
                best.index, last.index = last.index, best.index
        else:
            drawn = [slots[int(self._random() * count)] for _ in range(SAMPLED)]
            drawn += [slot for slot in self._local if slot.index >= 0]
            best = self._best(drawn, now, avoid)
        if best is None and avoid is not None and avoid.index >= 0:
            return self._best([avoid], now, None)
        return best

    def choose_near(
        self, bytes_at: Mapping[str, int], total_bytes: int, now: float
    ) -> Slot | None:
        """Return the replica that can begin first, where values have to travel.

        How long the call takes itself does not count: what was measured is of others.

        Parameters
        ----------
        bytes_at
            How many bytes of the values are on which workers.
        total_bytes
            How many there are.
        now
            Time in seconds.
        """
        on_host: dict[str, int] = {}
        for worker, size in bytes_at.items():
            host = host_of(worker)
            on_host[host] = max(on_host.get(host, 0), size)

        def travel_s(slot: Slot) -> float:
            here = bytes_at.get(slot.worker, 0)
            near = max(here, on_host.get(host_of(slot.worker), 0))
            return (total_bytes - near) / BETWEEN_HOSTS + (near - here) / WITHIN_HOST

        waits = [
            (self._wait(slot, now) - self._call_s(slot, now) + travel_s(slot), slot)
            for slot in self._open
        ]
        best = min(waits, key=lambda pair: pair[0], default=(FULL, None))
        return None if best[0] == FULL else best[1]

    def choose_for_model(
        self, model_id: str, now: float, avoid: Slot | None = None
    ) -> Slot | None:
        """Return a replica that has a model, or is to load it; None if all are full.

        It is loaded once more where there is room for it if the wait where it is is
        longer by what that takes; and in the place of another model only if none that
        has it takes a request now.
        """
        models = self.models
        holders = models.holders(model_id)
        there = self._best(holders, now, avoid)
        wait = FULL if there is None else self._wait(there, now)
        if there is not None and wait < models.load_s:
            return there
        first = None
        for slot in self.ranked(model_id):
            if slot is avoid or self._wait(slot, now) == FULL or slot.index < 0:
                continue
            first = first or slot
            if slot not in holders and models.has_room(slot, now):
                if wait < self._wait(slot, now) + models.load_s:
                    break
                models.expect(slot, model_id, now)
                return slot
        chosen = there or first or self.choose(now, avoid)
        if chosen is not None:
            models.expect(chosen, model_id, now)
        return chosen

    def choose_for_session(
        self,
        session: str,
        replica_id: int,
        now: float,
        *,
        websockets: int = 0,
        avoid: Slot | None = None,
    ) -> Slot | None:
        """Return the replica for a request of a session, which may have no slot now.

        Parameters
        ----------
        session
            What the order of replicas depends on, if it is not bound or cannot be used.
        replica_id
            The one that it is bound to; 0: none.
        now
            Time in seconds.
        websockets
            How many WebSockets a replica takes, if it is for one; else 0.
        avoid
            A replica to be taken only if there is no other.
        """

        def has_room(slot: Slot) -> bool:
            if not slot.reachable:
                return False
            if websockets:
                return slot.websockets < websockets
            if slot.first_limit is None:
                return self.is_free(slot, now)
            # What waits for its thread waits for this one.
            others = slot.others if slot.valid_until > now else 0
            return slot.in_flight + others < self.max_ongoing

        bound = self.slots.get(replica_id)
        if bound is not None and bound is not avoid and has_room(bound):
            return bound
        for slot in self.ranked(session):
            if slot is not avoid and has_room(slot):
                return slot
        return avoid if avoid is not None and has_room(avoid) else None

    def is_free(self, slot: Slot, now: float) -> bool:
        """Whether a replica has a slot, as far as is known."""
        return slot.index >= 0 and self._wait(slot, now) != FULL

    def choose_for_websocket(self, limit: int, now: float) -> Slot | None:
        """Return the replica with the fewest WebSockets, None if all have `limit`."""
        least, best = limit, None
        start = int(self._random() * max(1, len(self.slots)))
        slots = list(self.slots.values())
        for slot in slots[start:] + slots[:start]:
            if slot.websockets < least and slot.reachable:
                if slot.no_websockets_until <= now:
                    least, best = slot.websockets, slot
        return best

    @property
    def reachable(self) -> bool:
        """Whether any replica can be reached."""
        return any(slot.reachable for slot in self.slots.values())

    def to_ask(self, number: int) -> list[Slot]:
        """Return some replicas that are full by what they said, and may be asked."""
        if len(self._open) <= number:
            return list(self._open)
        i = int(self._random() * len(self._open))
        return (self._open[i:] + self._open[:i])[:number]

    def reopen(self, now: float) -> float | None:
        """Try again with replicas that have been closed long enough.

        Returns
        -------
        float or None
            When the next one is due.
        """
        closed = self._closed
        while closed and closed[0][0] <= now:
            until, _, slot = heapq.heappop(closed)
            if slot.closed_until == until:  # else it was opened meanwhile
                self.open(slot)
        return closed[0][0] if closed else None

    def close(self, slot: Slot, until: float, asked: int = 0) -> None:
        """Send nothing to a replica until it offers a slot, or that time has come."""
        slot.closed_until, slot.asked = until, asked
        heapq.heappush(self._closed, (until, slot.replica_id, slot))
        self.note(slot)

    def open(self, slot: Slot) -> None:
        """End that."""
        slot.closed_until, slot.asked = 0.0, 0
        self.note(slot)

    def ranked(self, key: str) -> list[Slot]:
        """Return all replicas in the order that all callers have for a key."""
        ranked = self._ranked.get(key)
        if ranked is None:
            ranked = sorted(
                self.slots.values(),
                key=lambda slot: hashlib.blake2b(
                    f"{key}\0{slot.tag}".encode("utf-8", "surrogatepass"), digest_size=8
                ).digest(),
            )
            self._ranked[key] = ranked
            if len(self._ranked) > MAX_RANKED:
                self._ranked.popitem(last=False)
        return ranked

    def _best(
        self, slots: Iterable[Slot], now: float, avoid: Slot | None
    ) -> Slot | None:
        """Return the one with the least wait; as `_wait`, in line: it is in the way."""
        best, least, usual_s = None, FULL, self.call_s
        for slot in slots:
            if slot is avoid or slot.index < 0:
                continue
            load = slot.in_flight
            if slot.others and slot.valid_until > now:
                load += slot.others
            if load >= slot.limit:
                continue
            call_s = slot.call_s
            if call_s < 0.0 or slot.call_until <= now:
                call_s = usual_s
            if call_s > HOP_S * MOVABLE:
                wait = call_s + load * (call_s - HOP_S)
            else:
                wait = (call_s if call_s > HOP_S else HOP_S) + load * call_s * SHORT
            if not slot.local:
                wait += HOP_S
            if slot.stuck:
                wait += STUCK_S
            if wait < least:
                best, least = slot, wait
        return best

    def _call_s(self, slot: Slot, now: float) -> float:
        """Return the seconds that a call takes in a replica."""
        known = slot.call_s >= 0.0 and slot.call_until > now
        return slot.call_s if known else self.call_s

    def _wait(self, slot: Slot, now: float) -> float:
        """Return the seconds until one more request would be done, or `FULL`."""
        load = slot.in_flight
        if slot.valid_until > now:
            load += slot.others
        if load >= slot.limit:
            return FULL
        call_s = self._call_s(slot, now)
        each_s = max(call_s - HOP_S, call_s * SHORT)
        wait = max(call_s, HOP_S) + load * each_s + (0.0 if slot.local else HOP_S)
        return wait + STUCK_S if slot.stuck else wait


def host_of(address: str) -> str:
    """Return a worker's host, with the protocol."""
    return address.rpartition(":")[0]
