"""Replicas that piled up while workers were few spread over those that came. No I/O.

One replica of a deployment at a time: another is started where there are fewer, as if
the old one did not count, and the old one stops when everybody knows of the new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.placement import Occupancy, Search, WorkerView
from daskserve.controller.records import Goal, Replica

#: What is in a replica that moves without need may take so long to end, in seconds.
GRACE_S = 600.0
#: Of so many crowded workers at most one replica each is looked at.
_MAX_LOOKS = 8


def spread(
    d: ManagedDeployment, views: Mapping[str, WorkerView], occupancy: Occupancy
) -> None:
    """Find one replica that is better elsewhere, once all is in order.

    What keeps sessions stays where it is.

    Parameters
    ----------
    d
        A deployment that is to spread.
    views
        The workers of the cluster by address.
    occupancy
        What all replicas take.
    """
    goal = d.target
    if not goal.reached or goal.failure or goal.spec.session_affinity is not None:
        d.spreading = False
        return
    replicas = list(d.replicas.values())
    settled = all(
        r.generation == goal.generation
        and r.ready_for(goal)
        and r.known
        and not r.outgoing
        for r in replicas
    )
    if not settled or len(replicas) != goal.spec.num_replicas:
        return
    hosts = Counter(r.host for r in replicas)
    own = Counter(r.worker for r in replicas)
    newest = {r.worker: r for r in replicas}.values()
    crowded = sorted(newest, key=lambda r: (-hosts[r.host], -own[r.worker], r.worker))
    for replica in crowded[:_MAX_LOOKS]:
        if _is_better_elsewhere(goal, replica, hosts, own, views, occupancy):
            replica.outgoing = replica.spreads = True
            replica.reason = "serves until another replica does, where there are fewer"
            return
    d.spreading = False


def _is_better_elsewhere(
    goal: Goal,
    replica: Replica,
    hosts: Counter[str],
    own: Counter[str],
    views: Mapping[str, WorkerView],
    occupancy: Occupancy,
) -> bool:
    search = Search(
        resources=goal.spec.resources,
        workers=goal.spec.workers,
        views=views,
        occupancy=occupancy,
        own=own - Counter([replica.worker]),
        own_hosts=hosts - Counter([replica.host]),
        failures=goal.failed_on,
    )
    found = search.next()
    if not isinstance(found, str) or views[found].lasts < 0:
        return False
    if views[found].host != replica.host:
        return hosts[views[found].host] + 1 < hosts[replica.host]
    return own[found] + 1 < own[replica.worker]


def give_up_spreading(d: ManagedDeployment) -> None:
    """Leave a deployment as it is if what was to take a place fails to start.

    Parameters
    ----------
    d
        The deployment.
    """
    moving = [r for r in d.replicas.values() if r.spreads]
    if moving and d.target.failures:
        d.spreading = False
        for replica in moving:
            replica.outgoing = replica.spreads = False
            replica.reason = ""
