"""What happened to a replica, noted down. Plain functions, no I/O.

An event changes what is known; it starts and stops nothing (but that a replica whose
configuration is unknown is told to stop). :mod:`daskserve.controller.rollout` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.goals import count_failure, give_up, lost_worker, relapse
from daskserve.controller.records import Replica, ReplicaState, last_line

#: A replica that was sent to a worker so lately may have begun there unheard.
_NEWS_S = 5.0
#: One that ran for no longer may itself be why its worker is lost. If it is, the next
#: is not to take down another worker at once.
_YOUNG_S = 3.0


def initializing(replica: Replica, pid: int | None, now: float) -> None:
    """Note that the constructor has begun.

    Parameters
    ----------
    replica
        The replica.
    pid
        Its process.
    now
        Time in seconds.
    """
    if replica.state == ReplicaState.STARTING:
        replica.initializing = True
        replica.pid = pid
        replica.enter(ReplicaState.STARTING, "running the constructor", now)


def started(
    d: ManagedDeployment,
    replica: Replica,
    pid: int | None,
    now: float,
    direct: list[Any] | None = None,
    limit: int | None = None,
) -> None:
    """Note that the constructor, and the first reconfigure, are done.

    Parameters
    ----------
    d
        The deployment.
    replica
        The replica.
    pid
        Its process; None keeps what is known.
    now
        Time in seconds.
    direct
        Host, port and secret of its own port, if it has one.
    limit
        How many requests to send it before it has said more; None: as many as may be.
    """
    if replica.state != ReplicaState.STARTING:
        return
    d.at_rest = False
    replica.direct, replica.first_limit = direct, limit
    replica.pid = replica.pid if pid is None else pid
    replica.enter(ReplicaState.RUNNING, "", now)


def failed(
    d: ManagedDeployment, replica: Replica, text: str, cause: bytes | None, now: float
) -> None:
    """Note that the constructor or the first reconfigure raised.

    Parameters
    ----------
    d
        The deployment.
    replica
        The replica.
    text
        The traceback.
    cause
        What was raised, pickled by the replica, if it can be.
    now
        Time in seconds.
    """
    d.at_rest = False
    if replica.state != ReplicaState.STOPPING:
        d.note_death(replica, text, now)
    d.release(replica)
    if replica.state == ReplicaState.STARTING:
        count_failure(d, replica, text, now, cause)


def stopped(d: ManagedDeployment, replica: Replica) -> None:
    """Note that a replica has drained and ended.

    Parameters
    ----------
    d
        The deployment.
    replica
        The replica.
    """
    if replica.state == ReplicaState.STOPPING:
        d.release(replica)


def lost(
    d: ManagedDeployment,
    replicas: Iterable[Replica],
    reason: str,
    now: float,
    *,
    blame: bool,
    with_worker: bool = False,
) -> None:
    """Note that replicas are gone without having been told to stop.

    Parameters
    ----------
    d
        The deployment.
    replicas
        Replicas that had been sent to a worker.
    reason
        How, readable by users.
    now
        Time in seconds.
    blame
        Whether a constructor that ran at that moment may be the cause: one that takes
        its worker down must not take down one worker after the other. Counts once per
        worker, since the others there may be bystanders.
    with_worker
        Whether their worker is lost, too.
    """
    d.at_rest = False
    blamed: dict[str, Replica] = {}
    young = []
    for replica in replicas:
        if replica.state != ReplicaState.STOPPING:
            d.note_death(replica, reason, now)
        if blame and _may_be_the_cause(replica, now):
            blamed.setdefault(replica.worker, replica)
        elif blame and _is_young(replica, now):
            young.append(replica)
        d.release(replica)
    for replica in blamed.values():
        if with_worker and d.goal_of(replica) is d.target and _is_unproven(d):
            lost_worker(d, replica, reason)
        else:
            count_failure(d, replica, f"lost while its constructor ran: {reason}", now)
    for replica in young:
        relapse(d, replica, reason, now)


def _is_unproven(d: ManagedDeployment) -> bool:
    """Whether somebody waits for code of which nothing runs as yet."""
    return bool(d.target.tickets) and not d.running(d.target)


def _may_be_the_cause(replica: Replica, now: float) -> bool:
    if replica.state != ReplicaState.STARTING:
        return False
    # One that ends its process at once takes the news of its beginning along.
    return replica.initializing or now - replica.since < _NEWS_S


def _is_young(replica: Replica, now: float) -> bool:
    """Whether it may have taken its worker down soon after it began to run."""
    running = replica.state == ReplicaState.RUNNING
    return running and now - replica.since < _YOUNG_S


def reconfigured(
    d: ManagedDeployment,
    replica: Replica,
    config_generation: int,
    error: str | None,
    now: float,
) -> None:
    """Note a replica's answer to ``ReconfigureReplica``.

    Parameters
    ----------
    d
        The deployment.
    replica
        The replica.
    config_generation
        Which configuration the answer is about.
    error
        The traceback, or None if it went well.
    now
        Time in seconds.
    """
    awaited = replica.reconfiguring and replica.state == ReplicaState.RUNNING
    if not awaited or replica.config_generation != config_generation:
        return
    d.at_rest = False
    replica.reconfiguring = False
    replica.enter(ReplicaState.RUNNING, "", now)
    if error is None:
        return
    # Who knows what it has now: the next pass gives it what its goal then asks for.
    replica.config_generation = 0
    goal = d.goal_of(replica)
    if goal is None or goal.config_generation != config_generation:
        return
    if goal.in_progress:
        give_up(d, f"reconfigure() raised {last_line(error)}", error)
    else:
        # That was the former one being put back, so there is nothing else to try.
        d.note_death(replica, error, now)
        d.stop(replica, now)
