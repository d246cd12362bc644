"""Which requests a replica takes, and who gets the next free slot; pure.

Callers do not know what others have sent. One that finds the replica full, or thinks
so, says how many slots it wants; slots that become free are kept for those callers in
turn, one for each, and they are told.
"""

from __future__ import annotations

from collections import deque

#: Calls on threads that take longer than this, in seconds, are sent one at a time for
#: each thread: what waits can then go to whoever is free first. Of shorter ones there
#: are as many more as pass while one travels, so that threads have always one to run.
#: Where all take about as long, who waits here for one that is a little longer loses
#: nothing.
SHORT_S, SHORT_IF_STEADY_S, TRAVEL_S = 0.01, 0.03, 0.001


def slots_of_threads(
    threads: int, call_s: float, most: int, *, steady: bool = False
) -> int:
    """Return how many requests to send to a replica that runs them on threads.

    Parameters
    ----------
    threads
        How many it runs at a time.
    call_s
        Seconds that each takes on its thread; 0.0: unknown.
    most
        The limit (``max_ongoing_requests``).
    steady
        Whether all take about as long.

    Examples
    --------
    >>> [slots_of_threads(1, s, 100) for s in (0.0, 0.02, 0.002, 1e-4, 1e-6)]
    [1, 1, 2, 11, 100]
    """
    ahead = 0
    if 0.0 < call_s < (SHORT_IF_STEADY_S if steady else SHORT_S):
        ahead = int(TRAVEL_S * threads / call_s + 0.999)
    return min(threads + ahead, most)


class Caller:
    """A process that asks: how many slots it has, would like, and are kept for it."""

    __slots__ = ("held", "kept", "late", "wanted")

    def __init__(self) -> None:
        self.held = self.wanted = self.kept = 0
        #: It has used none of what is kept for it since the last look at that.
        self.late = False


class Admission:
    """The slots of one replica.

    Parameters
    ----------
    limit
        How many there are.

    Examples
    --------
    >>> slots, near, far = Admission(1), Caller(), Caller()
    >>> slots.take(near), slots.take(far)
    (True, False)
    >>> slots.give_back(near)
    >>> slots.offer() is far, slots.take(near), slots.take(far)
    (True, False, True)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._abandoned = 0
        #: What nobody has, and is kept for nobody; below 0 when the limit has sunk.
        self._free = limit
        #: Slots that callers have.
        self.taken = 0
        #: Slots that are kept for callers.
        self.kept = 0
        #: Callers that want slots, in turn; who has gone wants none.
        self._queue: deque[Caller] = deque()

    @property
    def limit(self) -> int:
        """How many slots there are."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._free += limit - self._limit
        self._limit = limit

    @property
    def abandoned(self) -> int:
        """Calls that nobody waits for any more, and that run on in slots."""
        return self._abandoned

    @abandoned.setter
    def abandoned(self, number: int) -> None:
        self._free -= number - self._abandoned
        self._abandoned = number

    @property
    def wanted(self) -> bool:
        """Whether anybody may want a slot."""
        return bool(self._queue)

    def take(self, caller: Caller) -> bool:
        """Take a slot for a request; False: there is none, and the caller wants one."""
        if caller.kept:
            caller.kept -= 1
            caller.late = False
            self.kept -= 1
        elif self._free > 0:
            self._free -= 1
        else:
            self.want(caller, max(1, caller.wanted))
            return False
        self.taken += 1
        caller.held += 1
        return True

    def give_back(self, caller: Caller) -> None:
        """Give the slot of a request back."""
        self._free += 1
        self.taken -= 1
        caller.held -= 1

    def want(self, caller: Caller, number: int) -> None:
        """Note that a caller has use for so many slots."""
        if not caller.wanted:
            self._queue.append(caller)
        caller.wanted = number

    def offer(self) -> Caller | None:
        """Keep a free slot for the caller whose turn it is; return whom, or None."""
        while self._free > 0 and self._queue:
            caller = self._queue.popleft()
            if not caller.wanted:
                continue
            caller.wanted -= 1
            if caller.wanted:
                self._queue.append(caller)
            caller.late = caller.late and caller.kept > 0
            caller.kept += 1
            self.kept += 1
            self._free -= 1
            return caller
        return None

    def withdraw_late(self, caller: Caller) -> None:
        """Withdraw if a caller has used nothing of what is kept since the last look."""
        if caller.late:
            self.withdraw(caller)
        caller.late = caller.kept > 0

    def withdraw(self, caller: Caller) -> None:
        """Note that a caller has no use for slots any more, or has gone."""
        if caller.wanted:
            self._queue.remove(caller)
        self._free += caller.kept
        self.kept -= caller.kept
        caller.wanted = caller.kept = 0
