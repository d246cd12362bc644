"""Which replicas have which models, as a caller knows it: pure. Any process.

Replicas tell when that changes. What a caller has sent for a model counts until then:
many requests for one that is not loaded yet are not to load it everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)

#: How long it is believed that a replica loads what it was sent a request for, and how
#: long that takes before any replica has said, in seconds.
EXPECTED_S, UNKNOWN_LOAD_S = 5.0, 1.0
#: Loading one more is never thought to be cheaper, since it takes memory for long.
LEAST_LOAD_S = 0.25


class ModelPlaces(Generic[S]):
    """The models of one deployment's replicas.

    Examples
    --------
    >>> models = ModelPlaces()
    >>> models.expect("replica 1", "a", now=0.0)
    >>> models.report("replica 1", 1, 2.5, ["a"], now=0.1)
    >>> models.holders("a"), models.has_room("replica 1", now=0.2)
    ({'replica 1'}, False)
    >>> models.has_room("replica 2", now=0.2)
    True
    """

    def __init__(self) -> None:
        #: Seconds that it takes to load one.
        self.load_s = UNKNOWN_LOAD_S
        #: How many each replica keeps; 0: all.
        self._limit = 0
        self._loaded: dict[S, set[str]] = {}
        self._expected: dict[S, dict[str, float]] = {}
        self._holders: dict[str, set[S]] = {}

    def holders(self, model_id: str) -> Collection[S]:
        """Return the replicas that have a model, or are about to."""
        return self._holders.get(model_id, ())

    def knows(self, slot: S) -> bool:
        """Whether a replica has told of its models."""
        return slot in self._loaded

    def has_room(self, slot: S, now: float) -> bool:
        """Whether a replica can load one more without pushing another out."""
        if not self._limit:
            return True
        expected = self._expected.get(slot)
        if expected:
            for model_id in [m for m, until in expected.items() if until <= now]:
                del expected[model_id]
                self._drop_holder(slot, model_id)
        number = len(self._loaded.get(slot, ())) + len(expected or ())
        return number < self._limit

    def expect(self, slot: S, model_id: str, now: float) -> None:
        """Note that a replica is sent a request for a model."""
        if model_id not in self._loaded.get(slot, ()):
            self._expected.setdefault(slot, {})[model_id] = now + EXPECTED_S
            self._holders.setdefault(model_id, set()).add(slot)

    def report(
        self, slot: S, limit: int, load_s: float, ids: Collection[str], now: float
    ) -> None:
        """Take what a replica says of its models.

        Parameters
        ----------
        slot
            The replica.
        limit
            How many it keeps; 0: all.
        load_s
            Seconds that it takes to load one; 0: it has not loaded any yet.
        ids
            Those that it has, or loads.
        now
            Time in seconds.
        """
        if limit or load_s or ids:  # else it does not know yet itself
            self._limit = limit
        if load_s:
            self.load_s = max(load_s, LEAST_LOAD_S)
        expected = self._expected.get(slot, {})
        over = {m for m, until in expected.items() if m in ids or until < now}
        for model_id in over:
            del expected[model_id]
        former, self._loaded[slot] = self._loaded.get(slot, set()), set(ids)
        for model_id in self._loaded[slot]:
            self._holders.setdefault(model_id, set()).add(slot)
        for model_id in (former | over) - self._loaded[slot]:
            self._drop_holder(slot, model_id)

    def forget(self, slot: S) -> None:
        """Forget a replica that is gone."""
        ids = [*self._loaded.pop(slot, ()), *self._expected.pop(slot, ())]
        for model_id in ids:
            self._drop_holder(slot, model_id)

    def _drop_holder(self, slot: S, model_id: str) -> None:
        here = model_id in self._loaded.get(slot, ())
        holders = self._holders.get(model_id)
        if holders is None or here or model_id in self._expected.get(slot, ()):
            return
        holders.discard(slot)
        if not holders:
            del self._holders[model_id]
