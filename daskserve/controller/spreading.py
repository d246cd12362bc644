"""Replicas that piled up while workers were few spread over those that came. No I/O.

One replica at a time: another is started where there are fewer, as if the old one did
not count, and the old one stops when everybody knows of the new one. Whatever else is
to be done goes before, and ends the move.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping

from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.placement import Occupancy, Search, WorkerView
from daskserve.controller.records import Goal, Replica, ReplicaState

#: What is in a replica that moves without need may take so long to end, in seconds, if
#: it holds no resources that others may want.
GRACE_S = 600.0
#: Deployments looked at in one step, and crowded workers of each.
_MAX_LOOKS = 8


class Spreader:
    """Which deployments may have replicas that are better elsewhere.

    Parameters
    ----------
    after_s
        How long after a worker has come. None: never.
    """

    def __init__(self, after_s: float | None) -> None:
        self._after_s = after_s
        self._known: frozenset[str] = frozenset()
        #: When to look because of workers that have come.
        self._due: dict[str, float] = {}
        self._waiting: deque[str] = deque()
        self._moving: tuple[ManagedDeployment, Replica] | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting or self._moving)

    def step(
        self,
        now: float,
        deployments: Mapping[str, ManagedDeployment],
        views: Mapping[str, WorkerView],
        occupancy: Callable[[], Occupancy],
    ) -> ManagedDeployment | None:
        """Look whether there is something to move, once all else was seen to.

        Parameters
        ----------
        now
            Time in seconds.
        deployments
            Those that are not deleted, by name.
        views
            The workers of the cluster by address.
        occupancy
            Counts what all replicas take.

        Returns
        -------
        ManagedDeployment or None
            The one where a move begins or ends, which needs another look.
        """
        self._note_workers(now, deployments, views)
        if self._moving is not None:
            moved, replica = self._moving
            stops = replica.state == ReplicaState.STOPPING
            if stops or not replica.spreads or replica.replica_id not in moved.replicas:
                self._moving = None
                if not stops and not moved.target.in_progress:
                    # It did not go well: not again before other workers come.
                    self._waiting = deque(n for n in self._waiting if n != moved.name)
            elif any(_has_no_room(r, now) for r in moved.alive(moved.current)):
                cancel(moved)
                return moved
            return None
        for _ in range(min(_MAX_LOOKS, len(self._waiting))):
            name = self._waiting.popleft()
            d, looks_again = deployments.get(name), False
            if d is not None and _may_move(d):
                if not _is_settled(d):
                    looks_again = True
                elif found := _crowded_one(d, views, occupancy()):
                    found.outgoing = found.spreads = True
                    found.reason = "serves until another does, where there are fewer"
                    d.at_rest = False
                    self._moving = d, found
                    looks_again = True
            if looks_again:
                self._waiting.append(name)
            if self._moving:
                return d
        return None

    def _note_workers(
        self,
        now: float,
        deployments: Mapping[str, ManagedDeployment],
        views: Mapping[str, WorkerView],
    ) -> None:
        if self._after_s is None:
            return
        there = frozenset(a for a, v in views.items() if v.accepting and not v.leaving)
        if there != self._known:
            self._due |= dict.fromkeys(there - self._known, now + self._after_s)
            self._known = there
        if self._due and now >= min(self._due.values()):
            self._due = {a: at for a, at in self._due.items() if at > now}
            self._waiting = deque(deployments)


def _may_move(d: ManagedDeployment) -> bool:
    return not d.deleting and d.current.spec.session_affinity is None


def _has_no_room(replica: Replica, now: float) -> bool:
    return replica.state == ReplicaState.PENDING and replica.not_before <= now


def _is_settled(d: ManagedDeployment) -> bool:
    goal = d.current
    return (
        not d.target.in_progress
        and len(d.replicas) == goal.spec.num_replicas
        and all(
            r.generation == goal.generation
            and r.ready_for(goal)
            and r.known
            and not r.outgoing
            for r in d.replicas.values()
        )
    )


def _crowded_one(
    d: ManagedDeployment, views: Mapping[str, WorkerView], occupancy: Occupancy
) -> Replica | None:
    """Find a replica that is better elsewhere, hosts first and then workers."""
    replicas = d.replicas.values()
    hosts = Counter(r.host for r in replicas)
    own = Counter(r.worker for r in replicas)
    newest = {r.worker: r for r in replicas}.values()
    crowded = sorted(newest, key=lambda r: (-hosts[r.host], -own[r.worker], r.worker))
    for replica in crowded[:_MAX_LOOKS]:
        if own[replica.worker] < 2 and hosts[replica.host] < 2:
            continue
        beside = {a: v for a, v in views.items() if v.host == replica.host}
        for among in (views, beside):
            if _is_better_among(among, d.current, replica, hosts, own, occupancy):
                return replica
    return None


def _is_better_among(
    views: Mapping[str, WorkerView],
    goal: Goal,
    replica: Replica,
    hosts: Counter[str],
    own: Counter[str],
    occupancy: Occupancy,
) -> bool:
    found = Search(
        resources=goal.spec.resources,
        workers=goal.spec.workers,
        views=views,
        occupancy=occupancy.apart(),
        own=own - Counter([replica.worker]),
        own_hosts=hosts - Counter([replica.host]),
        failures=goal.failed_on,
    ).next()
    if not isinstance(found, str) or views[found].lasts < 0:
        return False
    if views[found].host != replica.host:
        return hosts[views[found].host] + 1 < hosts[replica.host]
    return own[found] + 1 < own[replica.worker]


def cancel(d: ManagedDeployment) -> None:
    """Leave replicas where they are that were to move; what came for them goes.

    Parameters
    ----------
    d
        The deployment.
    """
    for replica in d.replicas.values():
        if replica.spreads and replica.state != ReplicaState.STOPPING:
            replica.outgoing = replica.spreads = False
            replica.reason = ""
            d.at_rest = False


def end_moves(d: ManagedDeployment) -> None:
    """Give up moves where something else is to be done, or what came has failed.

    Parameters
    ----------
    d
        The deployment.
    """
    if d.deleting or d.target.in_progress or d.current.failures:
        cancel(d)
