"""Who gets the next free place in a replica; pure.

Callers do not know what others have sent: one that is refused tries again, and others,
who see their own requests end, are always quicker. So a place that becomes free is kept
for a moment for whoever was refused first, and that caller is told.
"""

from __future__ import annotations

from typing import Generic, TypeVar

C = TypeVar("C")


class Places(Generic[C]):
    """The places of one replica.

    Parameters
    ----------
    limit
        How many there are (``max_ongoing_requests``).

    Examples
    --------
    >>> places = Places(1)
    >>> places.take("near", ongoing=1), places.offer(ongoing=0)
    (False, 'near')
    >>> places.take("far", ongoing=0), places.take("near", ongoing=0)
    (False, True)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        #: Callers that were refused, in that order.
        self._refused: dict[C, None] = {}
        #: Callers that a place is kept for.
        self._kept: set[C] = set()

    @property
    def wanted(self) -> bool:
        """Whether anybody was refused who has not been offered a place since."""
        return bool(self._refused)

    def take(self, caller: C, ongoing: int) -> bool:
        """Whether a request may begin while `ongoing` others have places."""
        if not self._kept:
            if ongoing < self._limit:
                return True
        elif caller in self._kept:
            self._kept.discard(caller)
            self._refused.setdefault(caller)  # until it says that it has no more
            if ongoing < self._limit:
                return True
        elif ongoing + len(self._kept) < self._limit:
            return True
        self._refused.setdefault(caller)
        return False

    def offer(self, ongoing: int) -> C | None:
        """Keep a place for who was refused first; return whom, or None."""
        if not self._refused or ongoing + len(self._kept) >= self._limit:
            return None
        caller = next(iter(self._refused))
        del self._refused[caller]
        self._kept.add(caller)
        return caller

    def withdraw(self, caller: C) -> None:
        """Stop keeping a place for `caller`, which does not want it or is too late."""
        self._kept.discard(caller)

    def forget(self, caller: C) -> None:
        """Forget a caller that has gone."""
        self._refused.pop(caller, None)
        self._kept.discard(caller)
