"""One deployment as a process sees it: its replicas, and who waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from daskserve.exceptions import DeploymentUnavailableError, QueueFullError
from daskserve.transport.affinity import Affinity, Bindings
from daskserve.transport.messages import NO_LIMIT
from daskserve.transport.router import Router, Slot

if TYPE_CHECKING:
    from daskserve.transport.call import Call

#: Calls that have left the queue stay in it for a while, but never more than so many
#: and as many as wait.
MAX_LEFT = 64


class Group:
    """One deployment.

    Parameters
    ----------
    name
        Its name.
    """

    __slots__ = ("_queue", "_returned", "affinity", "asleep", "bound", "by_model",
                 "connecting_until", "hopeless", "info", "max_queued", "max_websockets",
                 "models_until", "name", "reason", "router", "sessions", "timeout_s",
                 "timer", "timer_at", "waiting", "wanted")  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.router = Router()
        #: Whether connections are made; there may be no request from here ever.
        self.wanted = False
        #: Until when new replicas may not be reachable yet; 0: all are.
        self.connecting_until = 0.0
        #: Its part of the newest snapshot.
        self.info: Mapping[str, Any] | None = None
        self.hopeless = False
        #: It is scaled to zero, and wakes when there is a request.
        self.asleep = False
        #: Why it has no replica, if it has none.
        self.reason = ""
        self.max_queued: int | None = None
        self.max_websockets = 1000
        self.timeout_s: float | None = None
        #: Where its requests name their sessions, if replicas are chosen by them.
        self.affinity: Affinity | None = None
        self.sessions = Bindings()
        #: Whether there have been requests for models, and until when the first ones
        #: wait for replicas to tell which they have.
        self.by_model = False
        self.models_until = 0.0
        #: Those who wait for one replica only, by its number.
        self.bound: dict[int, deque[Call]] = {}
        #: Of the next look at replicas that are closed, or not reachable yet.
        self.timer: asyncio.TimerHandle | None = None
        self.timer_at = 0.0
        #: How many calls wait.
        self.waiting = 0
        # In the order in which they came; those that a replica has given back first.
        # Who has gone stays until it is its turn: to look for it would take longer.
        self._queue: deque[Call] = deque()
        self._returned: deque[Call] = deque()

    def update(
        self, info: Mapping[str, Any], local_address: str | None
    ) -> tuple[list[Slot], list[Slot]]:
        """Take this deployment's part of a snapshot; return new and former slots."""
        self.info = info
        self.hopeless, self.reason = info["hopeless"], info.get("reason", "")
        self.asleep = info.get("asleep", False)
        self.max_queued, self.timeout_s = info["max_queued"], info["timeout_s"]
        self.max_websockets = info["max_websockets"]
        self.affinity = Affinity.of(info.get("session_affinity"))
        former = self.router.slots
        self.router.update(
            (
                Slot(replica_id, tag, worker, worker == local_address, limit)
                for replica_id, tag, worker, _, limit in info["replicas"]
            ),
            info["max_ongoing"] or NO_LIMIT,
        )
        present = self.router.slots
        new = [slot for i, slot in present.items() if i not in former]
        return new, [slot for i, slot in former.items() if i not in present]

    def enqueue(self, call: Call, bound: Slot | None = None) -> None:
        """Let a call wait, perhaps for one replica only.

        One that a replica has given back had its turn before.
        """
        call.queued = True
        self.waiting += 1
        if bound is not None:
            self.bound.setdefault(bound.replica_id, deque()).append(call)
        else:
            (self._returned if call.returned else self._queue).append(call)

    def leave(self, call: Call) -> None:
        """Let a call wait no more."""
        if not call.queued:
            return
        call.queued = False
        self.waiting -= 1
        if len(self._queue) > 2 * self.waiting + MAX_LEFT:
            self._queue = deque(c for c in self._queue if c.queued)
        if len(self._returned) > 2 * self.waiting + MAX_LEFT:
            self._returned = deque(c for c in self._returned if c.queued)

    def next_call(self) -> Call | None:
        """Return the call whose turn it is, or None if none waits for any replica."""
        return _first(self._returned) or _first(self._queue)

    def next_bound(self, replica_id: int) -> Call | None:
        """Return the next call that waits for one replica, or None."""
        queue = self.bound.get(replica_id)
        call = None if queue is None else _first(queue)
        if call is None:
            self.bound.pop(replica_id, None)
        return call

    def calls(self) -> Iterator[Call]:
        """Return all calls that wait."""
        queues = [*self.bound.values(), self._returned, self._queue]
        return (call for queue in queues for call in list(queue) if call.queued)

    def hears_models(self, now: float) -> bool:
        """Whether replicas are about to tell which models they have."""
        if now >= self.models_until:
            return False
        models, slots = self.router.models, self.router.slots.values()
        return any(slot.reachable and not models.knows(slot) for slot in slots)

    def fair_share(self) -> int:
        """Return how many requests each replica gets if all get the same."""
        requests = self.router.in_flight + self.waiting
        return -(-requests // max(1, len(self.router.slots)))

    def unavailable(self) -> DeploymentUnavailableError | None:
        """Say why nothing can ever take a request, or None if waiting makes sense."""
        if self.hopeless and not self.router.slots:
            return DeploymentUnavailableError(
                f"Deployment {self.name!r} is unavailable because it failed to deploy."
            )
        return None

    def check_queue(self, elsewhere: int) -> None:
        """Raise `QueueFullError` if one more must not wait, with so many elsewhere."""
        if self.max_queued is None:
            return
        waiting = self.waiting + elsewhere
        if waiting < self.max_queued:
            return
        # Who waits here for what replicas may have at once does not count.
        router = self.router
        slots = sum(s.first_limit is not None for s in router.slots.values())
        if self.connecting_until:
            slots = len(router.slots)
        room = max(0, slots * router.max_ongoing - router.in_flight)
        if waiting >= self.max_queued + room:
            raise QueueFullError(
                f"Request dropped: {waiting} requests wait for deployment "
                f"{self.name!r} already (max_queued_requests={self.max_queued})."
            )


def _first(queue: deque[Call]) -> Call | None:
    """Return the first that waits; drop those before it, which have gone."""
    while queue:
        if queue[0].queued:
            return queue[0]
        queue.popleft()
    return None
