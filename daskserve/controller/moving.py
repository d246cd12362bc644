"""Replicas move away from workers that leave: which, when. No I/O, scheduler process.

Another replica is started elsewhere, as if the old one did not count, and the old one
stops only when everybody knows of the new one, or when its worker's time is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.placement import Leaving, WorkerView, matches, offers
from daskserve.controller.records import Goal, Replica, ReplicaState, Spec
from daskserve.controller.spreading import GRACE_S

#: A worker that is killed so much later is worth moving to, in seconds.
WORTH_S = 30.0


def lender(spec: Spec, views: Mapping[str, WorkerView], now: float) -> str | None:
    """Choose the worker that is used though it leaves, where all that would do leave.

    The last one to go waits for the others, or what comes in their place, and is the
    place where their replicas move to.

    Parameters
    ----------
    spec
        What needs a place.
    views
        The workers of the cluster by address.
    now
        Time in seconds.

    Returns
    -------
    str or None
        Its address. None if some worker stays, or no leaving one has time left.
    """
    latest: tuple[float, float, str] | None = None
    for view in views.values():
        if not (view.accepting and matches(view, spec.workers)):
            continue
        if not offers(view, spec.resources):
            continue
        if view.leaving is None:
            return None
        if now < view.leaving.let_go_at(spec.graceful_shutdown_timeout_s):
            rank = (view.leaving.deadline, view.leaving.since, view.address)
            latest = rank if latest is None else max(latest, rank)
    return None if latest is None else latest[-1]


def mark_outgoing(
    d: ManagedDeployment, now: float, views: Mapping[str, WorkerView]
) -> None:
    """Find the replicas that are to be replaced since their workers leave.

    Parameters
    ----------
    d
        The deployment.
    now
        Time in seconds.
    views
        The workers of the cluster by address.
    """
    lenders: dict[int, str | None] = {}
    leaves = {a: view.leaving for a, view in views.items() if view.leaving is not None}
    for replica in d.replicas.values():
        view = views.get(replica.worker)
        if view is None or view.leaving is None:
            if replica.spreads:
                continue
            if replica.outgoing or replica.lent:
                replica.outgoing = replica.lent = False
                _explain(replica, "")
            continue
        replica.spreads = False
        goal = d.goal_of(replica)
        spec = replica.spec if goal is None else goal.spec
        if id(spec) not in lenders:
            lenders[id(spec)] = lender(spec, views, now)
        to = lenders[id(spec)]
        replica.lent = to == replica.worker or (
            to is not None and not _outlives(leaves[to], view.leaving)
        )
        replica.outgoing = not replica.lent
        text = f"worker {replica.worker} {view.leaving.reason}"
        more = "no other worker will do" if replica.lent else _wait_of(d, replica)
        _explain(replica, f"{text}; {more}")


def _outlives(other: Leaving, leaving: Leaving) -> bool:
    """Whether moving there is worth it: jobs that begin together end together."""
    if not (other.killed and leaving.killed):
        return True
    return other.deadline >= leaving.deadline + WORTH_S


def _wait_of(d: ManagedDeployment, replica: Replica) -> str:
    for other in d.replicas.values():
        pending = other.state == ReplicaState.PENDING
        if pending and other.generation == replica.generation:
            return f"the replica in its place {other.reason}"
    return "serves until another replica does"


def _explain(replica: Replica, reason: str) -> None:
    if replica.state == ReplicaState.RUNNING and not replica.reconfiguring:
        replica.reason = reason


def let_go(
    d: ManagedDeployment,
    goals: list[Goal],
    now: float,
    views: Mapping[str, WorkerView],
) -> None:
    """Stop replicas on leaving workers that are not needed, or have no more time.

    Parameters
    ----------
    d
        The deployment.
    goals
        Those whose replicas are kept at full number.
    now
        Time in seconds.
    views
        The workers of the cluster by address.
    """
    held: dict[int, list[Replica]] = {}
    for replica in list(d.replicas.values()):
        if not (replica.outgoing or replica.lent):
            continue
        if replica.state == ReplicaState.STOPPING:
            continue
        late = not replica.spreads and now >= _leaving(replica, views).let_go_at(
            replica.spec.graceful_shutdown_timeout_s, replica.replica_id
        )
        if late or (replica.outgoing and replica.state != ReplicaState.RUNNING):
            _stop(d, replica, now, views)
        elif replica.outgoing:
            held.setdefault(replica.generation, []).append(replica)
    for goal in goals:
        outgoing = held.get(goal.generation, [])
        if outgoing:
            settled = [r for r in d.running(goal) if r.known and not r.outgoing]
            ready = sum(r.ready_for(goal) for r in settled)
            outgoing.sort(
                key=lambda r: inf if r.spreads else _leaving(r, views).deadline
            )
            surplus = ready + len(outgoing) - goal.spec.num_replicas
            for replica in outgoing[: max(0, surplus)]:
                _stop(d, replica, now, views)


def _leaving(replica: Replica, views: Mapping[str, WorkerView]) -> Leaving:
    leaving = views[replica.worker].leaving
    assert leaving is not None
    return leaving


def _stop(
    d: ManagedDeployment,
    replica: Replica,
    now: float,
    views: Mapping[str, WorkerView],
) -> None:
    if replica.spreads:
        d.stop(replica, now, at_least_s=0.0 if replica.spec.resources else GRACE_S)
        replica.reason = "draining: another replica serves where there are fewer"
        return
    leaving = _leaving(replica, views)
    d.stop(replica, now, at_most_s=max(0.1, leaving.deadline - now))
    replica.reason = f"draining: worker {replica.worker} {leaving.reason}"
