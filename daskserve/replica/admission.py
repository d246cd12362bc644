"""Which requests a replica takes, and who gets the next free slot; pure.

Callers do not know what others have sent. One that finds the replica full, or thinks
so, says how many slots it wants; slots that become free are kept for those callers in
turn, one for each, and they are told.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

C = TypeVar("C")

#: Calls on threads that take longer than this, in seconds, are sent one at a time for
#: each thread: what waits can then go to whoever is free first. Of shorter ones there
#: are as many more as pass while one travels, so that threads have always one to run.
SHORT_S, TRAVEL_S = 0.01, 0.001


def slots_of_threads(threads: int, call_s: float, most: int) -> int:
    """Return how many requests to send to a replica that runs them on threads.

    Parameters
    ----------
    threads
        How many it runs at a time.
    call_s
        Seconds that each takes on its thread; 0.0: unknown.
    most
        The limit (``max_ongoing_requests``).

    Examples
    --------
    >>> [slots_of_threads(1, s, 100) for s in (0.0, 0.02, 0.002, 1e-4, 1e-6)]
    [1, 1, 2, 11, 100]
    """
    ahead = 0
    if 0.0 < call_s < SHORT_S:
        ahead = int(TRAVEL_S * threads / call_s + 0.999)
    return min(threads + ahead, most)


class Admission(Generic[C]):
    """The slots of one replica.

    Parameters
    ----------
    limit
        How many there are.

    Examples
    --------
    >>> slots = Admission(1)
    >>> slots.take("near"), slots.take("far")
    (True, False)
    >>> slots.give_back("near")
    >>> slots.offer(), slots.take("near"), slots.take("far")
    ('far', False, True)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        #: Calls that nobody waits for any more, and that run on.
        self.abandoned = 0
        self._taken = 0
        #: How many slots each caller has, ...
        self._held: dict[C, int] = {}
        #: ... would like to have, in turn, ...
        self._wanted: OrderedDict[C, int] = OrderedDict()
        #: ... and are kept for it.
        self._kept: dict[C, int] = {}
        self._all_kept = 0

    @property
    def wanted(self) -> bool:
        """Whether anybody wants a slot."""
        return bool(self._wanted)

    @property
    def kept(self) -> bool:
        """Whether a slot is kept for anybody."""
        return self._all_kept > 0

    @property
    def callers(self) -> list[C]:
        """All that have sent anything, and not gone."""
        return list(self._held)

    def take(self, caller: C) -> bool:
        """Take a slot for a request; False: there is none, and the caller wants one."""
        kept = self._kept.get(caller, 0) if self._all_kept else 0
        if kept:
            self._keep(caller, kept - 1)
        free = self.limit - self._taken - self.abandoned - self._all_kept
        if free <= 0:
            self._wanted.setdefault(caller, 1)
            return False
        self._taken += 1
        self._held[caller] = self._held.get(caller, 0) + 1
        return True

    def give_back(self, caller: C) -> None:
        """Give the slot of a request back."""
        self._taken -= 1
        if caller in self._held:  # else it has gone
            self._held[caller] -= 1

    def want(self, caller: C, number: int) -> None:
        """Note that a caller has use for so many slots."""
        self._held.setdefault(caller, 0)
        self._wanted[caller] = number

    def offer(self) -> C | None:
        """Keep a free slot for the caller whose turn it is; return whom, or None."""
        free = self.limit - self._taken - self.abandoned - self._all_kept
        if free <= 0 or not self._wanted:
            return None
        caller, number = self._wanted.popitem(last=False)
        if number > 1:
            self._wanted[caller] = number - 1
        self._keep(caller, self._kept.get(caller, 0) + 1)
        return caller

    def withdraw(self, caller: C) -> None:
        """Note that a caller has no use for slots any more."""
        self._wanted.pop(caller, None)
        self._keep(caller, 0)

    def withdraw_kept(self) -> None:
        """Keep slots for nobody any more: those callers are too late."""
        self._kept.clear()
        self._all_kept = 0

    def forget(self, caller: C) -> None:
        """Forget a caller that has gone; what it has still to give back counts."""
        self.withdraw(caller)
        self._held.pop(caller, None)

    def others(self, caller: C) -> int:
        """Return how many slots others have than this caller, or nobody any more."""
        return self._taken + self.abandoned - self._held.get(caller, 0)

    def _keep(self, caller: C, number: int) -> None:
        self._all_kept += number - self._kept.pop(caller, 0)
        if number:
            self._kept[caller] = number
