"""Choose a replica for a request: no I/O, one loop's use. Any process.

Local first while it has room, else the less loaded of two random ones ("power of two
choices": M. Mitzenmacher, IEEE TPDS 12(10), 2001), by this caller's own count.

A request for one of many models, or of a session that is bound to no replica, goes to
the replica that comes first for it in an order that all callers share ("highest random
weight": D. Thaler and C. Ravishankar, IEEE/ACM Trans. Networking 6(1), 1998), so that
it finds what others left there.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

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
    #: Requests of this caller that are in it.
    in_flight: int = 0
    #: It refused a request; not asked again before this time (the caller's clock).
    full_until: float = 0.0
    #: There is a connection to its worker.
    reachable: bool = True
    #: It is still in the newest snapshot.
    routable: bool = True


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
        self._local: list[Slot] = []
        self._remote: list[Slot] = []
        self._random = (rng or random.Random()).random
        self._ranked: OrderedDict[str, list[Slot]] = OrderedDict()

    def update(self, slots: Iterable[Slot], max_ongoing: int) -> None:
        """Take the newest snapshot's replicas; counts of those that stay are kept."""
        fresh = {}
        for slot in slots:
            fresh[slot.replica_id] = self.slots.get(slot.replica_id, slot)
        for replica_id, slot in self.slots.items():
            slot.routable = replica_id in fresh
        self.slots = fresh
        self.max_ongoing = max_ongoing
        self._local = [slot for slot in fresh.values() if slot.local]
        self._remote = [slot for slot in fresh.values() if not slot.local]
        self._ranked.clear()

    def choose(
        self, now: float, avoid: Slot | None = None, model_id: str = ""
    ) -> Slot | None:
        """Return a replica with room, or None.

        Parameters
        ----------
        now
            The clock of `Slot.full_until`.
        avoid
            A replica to be taken only if there is no other.
        model_id
            The model that the request is for; "": none in particular.
        """
        if len(self.slots) == 1:
            (only,) = self.slots.values()
            return only if self._has_room(only, now) else None
        if model_id:
            best = self._first_for(model_id, now, avoid)
        else:
            best = self._less_loaded(self._local, now, avoid)
            if best is None:
                best = self._less_loaded(self._remote, now, avoid)
        if best is None and avoid is not None and self._has_room(avoid, now):
            return avoid
        return best

    def choose_for(
        self, session: str, replica_id: int, now: float, avoid: Slot | None = None
    ) -> Slot | None:
        """Return a replica with room for a request of a session, or None.

        Parameters
        ----------
        session
            What the order of replicas depends on, if it is not bound or cannot be used.
        replica_id
            The one that it is bound to; 0: none.
        now, avoid
            As in `choose`.
        """
        bound = self.slots.get(replica_id)
        if bound is not None and bound is not avoid and self._has_room(bound, now):
            return bound
        first = self._first_for(session, now, avoid)
        if first is None and avoid is not None and self._has_room(avoid, now):
            return avoid
        return first

    def choose_near(self, workers: Iterable[str], now: float) -> Slot | None:
        """Return a replica with room on one of some workers, or on a host of theirs.

        Parameters
        ----------
        workers
            Dask addresses, the best ones first.
        now
            The clock of `Slot.full_until`.
        """
        roomy = [slot for slot in self.slots.values() if self._has_room(slot, now)]
        for place in (str, _host):
            for worker in workers:
                there = [s for s in roomy if place(s.worker) == place(worker)]
                if there:
                    return min(there, key=lambda slot: slot.in_flight)
        return None

    @property
    def in_flight(self) -> int:
        """Requests of this caller in all replicas of the newest snapshot."""
        return sum(slot.in_flight for slot in self.slots.values())

    def _has_room(self, slot: Slot, now: float) -> bool:
        return (
            slot.reachable
            and slot.routable
            and slot.in_flight < self.max_ongoing
            and slot.full_until <= now
        )

    def _first_for(self, key: str, now: float, avoid: Slot | None) -> Slot | None:
        ranked = self._ranked.get(key)
        if ranked is None:
            ranked = sorted(
                self.slots.values(),
                key=lambda slot: hashlib.blake2b(
                    f"{key}\0{slot.tag}".encode(), digest_size=8
                ).digest(),
            )
            self._ranked[key] = ranked
            if len(self._ranked) > MAX_RANKED:
                self._ranked.popitem(last=False)
        for slot in ranked:
            if slot is not avoid and self._has_room(slot, now):
                return slot
        return None

    def _less_loaded(
        self, slots: list[Slot], now: float, avoid: Slot | None
    ) -> Slot | None:
        count = len(slots)
        if count == 0:
            return None
        if count <= 2:
            first, second = slots[0], slots[-1]
        else:
            # Two different ones, each pair as likely.
            i = int(self._random() * count)
            j = int(self._random() * (count - 1))
            first, second = slots[i], slots[j + (j >= i)]
        if first.in_flight > second.in_flight or (
            first.in_flight == second.in_flight and self._random() < 0.5
        ):
            first, second = second, first
        for slot in (first, second):
            if slot is not avoid and self._has_room(slot, now):
                return slot
        # Both of the two are full: only then it is worth looking at all.
        roomy = [s for s in slots if s is not avoid and self._has_room(s, now)]
        return min(roomy, key=lambda slot: slot.in_flight, default=None)


def _host(address: str) -> str:
    return address.rpartition(":")[0]
