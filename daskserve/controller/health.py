"""What ails replicas and workers: who says nothing, who is ill. Plain, no I/O.

Workers report in (`HealthBoard`), each once in a while for all its replicas. One that
says nothing for longer than a deployment is patient loses the deployment's replicas,
though Dask still counts on it; when it is back, what it has left of them is stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from daskserve.controller import events
from daskserve.controller.actions import WatchReplica
from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.goals import count_failure, relapse
from daskserve.controller.records import Replica, ReplicaState, Spec
from daskserve.transport.messages import (
    IDLE_PATIENCE_S,
    IDLE_PERIOD_S,
    LEAST_PATIENCE_S,
)

#: Of a replica: its number, whether it must be replaced, and what is wrong; "" when
#: it is well again.
Trouble: TypeAlias = tuple[int, bool, str]

#: What time of ours counts between two looks: while the scheduler itself stood still,
#: no worker could be heard.
_MAX_LOOK_S = 1.0
#: By how much a report is late, and fewer late workers than how many are never taken
#: for a fault of the network, unless they are all.
_LATE_S = 1.0
_FEW = 3
#: A replica that falls ill before it has run for so many periods of its checks is one
#: more of a row, and the next one has to wait.
_PROVEN_PERIODS = 10


@dataclass(slots=True)
class _Worker:
    heard_at: float
    #: How often it reports.
    period_s: float = IDLE_PERIOD_S
    #: How long it may say nothing before anything of it is given up.
    patience_s: float = IDLE_PATIENCE_S
    troubles: dict[int, Trouble] = field(default_factory=dict)
    #: What is said of its files.
    files: str = ""


class HealthBoard:
    """Who was heard of when, and what is wrong with whom."""

    def __init__(self) -> None:
        #: Workers that say nothing, and for how many seconds they have not.
        self.silent: dict[str, float] = {}
        #: Whether so many are late that the fault may well be on our side. When the
        #: scheduler's host is cut off, the workers go on serving, and the few that are
        #: left here could not take over from all the others.
        self.widespread = False
        self._workers: dict[str, _Worker] = {}
        #: Seconds in which workers could have been heard.
        self._clock = 0.0
        self._looked_at: float | None = None

    def heard(self, worker: str) -> None:
        """Note a sign of life.

        Parameters
        ----------
        worker
            Address of the worker.
        """
        found = self._workers.setdefault(worker, _Worker(self._clock))
        found.heard_at = self._clock
        self.silent.pop(worker, None)

    def report(
        self,
        worker: str,
        period_s: float,
        patience_s: float,
        troubles: Iterable[Trouble],
        files: str = "",
    ) -> list[Trouble]:
        """Take a worker's report.

        Parameters
        ----------
        worker
            Address of the worker.
        period_s
            How often it reports.
        patience_s
            How long it may say nothing before anything of it is given up.
        troubles
            All that is wrong with its replicas now.
        files
            Whether hardly any files are left to it, for people; "" if not.

        Returns
        -------
        list of Trouble
            What is new, and who is well again.
        """
        self.heard(worker)
        found = self._workers[worker]
        found.period_s, found.patience_s, found.files = period_s, patience_s, files
        # Lists, after msgpack.
        former, found.troubles = found.troubles, {n: (n, f, t) for n, f, t in troubles}
        well = [(n, False, "") for n in former if n not in found.troubles]
        news = [t for n, t in found.troubles.items() if former.get(n) != t]
        return well + news

    def short_of_files(self) -> list[str]:
        """Return what is said of workers to which hardly any files are left."""
        return [worker.files for worker in self._workers.values() if worker.files]

    def forget(self, worker: str) -> None:
        """Forget a worker that has left.

        Parameters
        ----------
        worker
            Address of the worker.
        """
        self._workers.pop(worker, None)
        self.silent.pop(worker, None)

    def look(self, now: float) -> dict[str, float]:
        """Find who says nothing.

        Parameters
        ----------
        now
            Time in seconds.

        Returns
        -------
        dict
            `silent`.
        """
        if self._looked_at is not None:
            self._clock += min(now - self._looked_at, _MAX_LOOK_S)
        self._looked_at = now
        late = 0
        for address, worker in self._workers.items():
            silence = self._clock - worker.heard_at
            # Sooner than silent: else the first ones to be so would not seem many.
            late += silence > min(worker.period_s + _LATE_S, worker.patience_s)
            if silence > worker.patience_s:
                self.silent[address] = silence
        number = len(self._workers)
        self.widespread = late == number or late >= max(_FEW, number / 2)
        return self.silent


def patience_s(spec: Spec) -> float:
    """Say for how long a worker may say nothing before a deployment leaves it.

    Parameters
    ----------
    spec
        The deployment's.

    Returns
    -------
    float
        Seconds.
    """
    return max(
        LEAST_PATIENCE_S, spec.health_check_period_s + spec.health_check_timeout_s
    )


def give_up_silent(
    d: ManagedDeployment, silent: Mapping[str, float], now: float
) -> list[tuple[str, int]]:
    """Take replicas for lost whose workers say nothing.

    A constructor that runs is left alone: it may hold the interpreter's lock for
    minutes, as when it reads a large model, and has a time limit of its own.

    Parameters
    ----------
    d
        The deployment.
    silent
        Workers that say nothing, and for how many seconds they have not.
    now
        Time in seconds.

    Returns
    -------
    list of (str, int)
        Worker and number of each replica that was given up; they may well be there,
        and take requests once their workers are back.
    """
    lost: dict[str, list[Replica]] = {}
    for r in d.replicas.values():
        if r.worker in silent and silent[r.worker] > patience_s(r.spec):
            waits = r.state == ReplicaState.STARTING and not r.initializing
            if waits or r.state == ReplicaState.RUNNING:
                lost.setdefault(r.worker, []).append(r)
    for worker, replicas in lost.items():
        reason = (
            f"worker {worker} has said nothing for {silent[worker]:.0f} s: "
            f"its process is stopped, or something in it holds the interpreter's lock"
        )
        events.lost(d, replicas, reason, now, blame=False)
    return [(r.worker, r.replica_id) for replicas in lost.values() for r in replicas]


def note_trouble(
    d: ManagedDeployment, replica: Replica, fatal: bool, text: str, now: float
) -> None:
    """Note the outcome of a health check that is news.

    Parameters
    ----------
    d
        The deployment.
    replica
        The replica.
    fatal
        Whether it must be replaced.
    text
        What is wrong; "" if it is well again.
    now
        Time in seconds.
    """
    if replica.state != ReplicaState.RUNNING or replica.reconfiguring:
        return
    if not fatal:
        replica.reason = text
        return
    period_s = replica.spec.health_check_period_s
    proven_s = _PROVEN_PERIODS * period_s + replica.spec.health_check_timeout_s
    proven = now - replica.since >= proven_s
    d.at_rest = False
    d.note_death(replica, text, now)
    d.stop(replica, now)
    goal = d.goal_of(replica)
    if goal is not None and goal.in_progress:
        count_failure(d, replica, text, now)
    elif not proven:
        relapse(d, replica, text, now)
    # One that was well for long is replaced at once, by the next pass.


def watch(d: ManagedDeployment) -> None:
    """Tell workers when replicas are to be watched in another way.

    Parameters
    ----------
    d
        The deployment.
    """
    for r in d.replicas.values():
        told = r.state in (ReplicaState.STARTING, ReplicaState.RUNNING)
        if told and r.watched != r.spec.watch:
            r.watched = r.spec.watch
            d.shared.actions.append(WatchReplica(r.replica_id, r.worker, *r.watched))


def note_silence(status: dict[str, Any], silent: Mapping[str, float]) -> dict[str, Any]:
    """Add to a status which replicas are on workers that say nothing.

    Parameters
    ----------
    status
        Deployments by name; what `reports.status_of` made.
    silent
        Workers that say nothing, and for how many seconds they have not.

    Returns
    -------
    dict
        The same.
    """
    for deployment in status.values() if silent else ():
        for replica in deployment["replicas"]:
            if replica["worker"] in silent:
                text = (
                    f"its worker has said nothing for {silent[replica['worker']]:.0f} s"
                )
                replica["reason"] = "; ".join(filter(None, [replica["reason"], text]))
    return status
