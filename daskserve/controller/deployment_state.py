"""What the controller knows of one deployment, and what follows at a glance.

What should run is told by two goals: ``target`` is the last ``deploy()``, ``serving``
the last one that was reached (often the same).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from daskserve.controller.actions import (
    Action,
    Failure,
    ReleaseReplica,
    Settle,
    StopReplica,
)
from daskserve.controller.autoscaling import Scaling
from daskserve.controller.history import History
from daskserve.controller.records import (
    Death,
    DeploymentState,
    Goal,
    Replica,
    ReplicaState,
    last_line,
)

#: How long after its grace period a stopping replica is given up.
STOP_MARGIN_S = 5.0

_MAX_DEATHS = 10


@dataclass(slots=True, kw_only=True)
class Shared:
    """What all deployments of one controller have in common."""

    ids: Iterator[int]
    #: Makes the random-looking end of a tag.
    new_suffix: Callable[[], str]
    #: Failed constructors that a goal may see, by ``num_replicas``.
    max_failures: Callable[[int], int]
    #: For how many seconds the first replica of new code starts alone.
    trial_s: float = 0.0
    #: Which deployment a replica belongs to.
    owners: dict[int, ManagedDeployment] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    #: Kept apart: callers are told when all else has been asked for.
    settled: list[Settle] = field(default_factory=list)

    def flush(self) -> list[Action]:
        """Hand out what has gathered.

        Returns
        -------
        list
            Actions in order, those that end waiting calls last.
        """
        actions = [*self.actions, *self.settled]
        self.actions.clear()
        self.settled.clear()
        return actions


@dataclass(slots=True, kw_only=True, eq=False)
class ManagedDeployment:
    """One deployment, from its first ``deploy()`` until its last replica is gone."""

    name: str
    shared: Shared
    target: Goal
    serving: Goal | None = None
    #: By number, and so in the order in which they were made.
    replicas: dict[int, Replica] = field(default_factory=dict)
    deaths: deque[Death] = field(default_factory=lambda: deque(maxlen=_MAX_DEATHS))
    history: History = field(default_factory=History)
    deleting: bool = False
    #: The ``delete()`` calls that wait.
    delete_tickets: list[int] = field(default_factory=list)
    #: Nothing to do until an event comes or a worker leaves.
    at_rest: bool = False
    #: What `reports` found for proxies and handles; holds while the deployment rests.
    routing: dict[str, Any] | None = None
    #: Code and configurations are numbered together.
    last_generation: int = 1
    #: What its number of replicas follows, if it is not fixed.
    scaling: Scaling = field(default_factory=Scaling)

    # What is wanted

    @property
    def current(self) -> Goal:
        """The goal whose options ``get_deployment()`` shows: wanted, else serving."""
        if self.target.failure is not None and self.serving is not None:
            return self.serving
        return self.target

    @property
    def routed(self) -> Goal:
        """The goal whose prefix and limits count for requests now."""
        return self.serving or self.target

    @property
    def former(self) -> Goal | None:
        """The serving goal, while a target of other code is on the way."""
        old = self.serving
        if old is None or not self.target.in_progress:
            return None
        return old if old.generation != self.target.generation else None

    def upkeep(self) -> list[Goal]:
        """Goals whose replicas are kept at full number, the most urgent first.

        Returns
        -------
        list of Goal
            None, one, or two while new code is on the way beside the old.
        """
        if self.deleting:
            return []
        if self.target.failure is not None:
            return [self.serving] if self.serving else []
        former = self.former
        if former is None or self.target.rolling:
            return [self.target]
        return [self.target, former]

    def goal_of(self, replica: Replica) -> Goal | None:
        """Find the goal that a replica is there for.

        Parameters
        ----------
        replica
            One of this deployment.

        Returns
        -------
        Goal or None
            None if it is there for none any more.
        """
        for goal in (self.target, self.serving):
            if goal and goal.generation == replica.generation and not goal.failure:
                return goal
        return None

    def prefixes(self) -> set[str]:
        """Route prefixes that nobody else may take.

        Returns
        -------
        set of str
            Those of the current goal and of the one that serves.
        """
        goals = (self.current, self.routed)
        return {g.spec.route_prefix for g in goals if g.spec.route_prefix is not None}

    # What is there

    def alive(self, goal: Goal) -> list[Replica]:
        """Replicas of a goal's code, but for those told to stop or to be replaced.

        Parameters
        ----------
        goal
            The goal.

        Returns
        -------
        list of Replica
            In order of their numbers.
        """
        return [
            r
            for r in self.replicas.values()
            if r.generation == goal.generation
            and r.state != ReplicaState.STOPPING
            and not r.outgoing
        ]

    def running(self, goal: Goal) -> list[Replica]:
        """Replicas of a goal's code that can take requests.

        Parameters
        ----------
        goal
            The goal.

        Returns
        -------
        list of Replica
            In order of their numbers.
        """
        return [
            r
            for r in self.replicas.values()
            if r.generation == goal.generation and r.state == ReplicaState.RUNNING
        ]

    def ready(self, goal: Goal) -> int:
        """Count the running replicas that have a goal's configuration.

        Parameters
        ----------
        goal
            The goal.

        Returns
        -------
        int
            Their number.
        """
        return sum(r.ready_for(goal) for r in self.running(goal))

    def routable(self) -> list[Replica]:
        """Replicas that requests may be sent to.

        Returns
        -------
        list of Replica
            Those of one goal; of two while one gives way to the other.
        """
        if self.serving is None:
            return [] if self.target.failure else self.running(self.target)
        old = self.running(self.serving)
        if self.former is None:
            return old
        if self.target.rolling:
            return old + self.running(self.target)
        return old or self.running(self.target)

    @property
    def state(self) -> DeploymentState:
        """How the deployment does."""
        if self.deleting:
            return DeploymentState.DELETING
        if self.target.failure is not None:
            return DeploymentState.DEPLOY_FAILED
        if not self.target.reached:
            return DeploymentState.UPDATING
        if self.ready(self.target) < self.scaling.needed(self.target):
            return DeploymentState.UNHEALTHY
        return DeploymentState.HEALTHY

    @property
    def reason(self) -> str:
        """Why it is in that state; tells no durations, so that snapshots keep."""
        if self.deleting:
            return f"{len(self.replicas)} replicas draining"
        goal = self.target
        if goal.failure is not None:
            return goal.failure
        ready, wanted = self.ready(goal), goal.spec.num_replicas
        scaling = self.scaling.describe(goal, ready, len(self.replicas))
        if ready >= wanted:
            return scaling
        waits = "; ".join(filter(None, [scaling, self._first_wait(goal)]))
        return f"{ready} of {wanted} replicas running: {waits}"

    def _first_wait(self, goal: Goal) -> str:
        for replica in self.alive(goal):
            if not replica.ready_for(goal):
                return f"{replica.tag} {replica.reason or 'is to be reconfigured'}"
        if self.deaths:
            death = self.deaths[-1]
            return f"{death.tag} ended: {death.reason}"
        return "none asked for yet"

    # Single moves, made by decisions elsewhere

    def add(self, goal: Goal, now: float) -> Replica:
        """Make the record of another replica.

        Parameters
        ----------
        goal
            What it is for.
        now
            Time in seconds.

        Returns
        -------
        Replica
            A pending one.
        """
        replica = Replica(
            replica_id=next(self.shared.ids),
            tag=f"{self.name}#{self.shared.new_suffix()}",
            spec=goal.spec,
            generation=goal.generation,
            config_generation=goal.config_generation,
            reason="waits for a worker",
            since=now,
            not_before=now,
        )
        self.replicas[replica.replica_id] = replica
        self.shared.owners[replica.replica_id] = self
        return replica

    def stop(
        self,
        replica: Replica,
        now: float,
        at_most_s: float = float("inf"),
        at_least_s: float = 0.0,
    ) -> None:
        """Tell a replica to drain; one that was never sent just vanishes.

        Parameters
        ----------
        replica
            Any that is not stopping yet.
        now
            Time in seconds.
        at_most_s, at_least_s
            Limits of its grace period.
        """
        if replica.state == ReplicaState.PENDING:
            self._forget(replica)
            return
        grace_s = max(replica.spec.graceful_shutdown_timeout_s, at_least_s)
        grace_s = min(grace_s, at_most_s)
        poll_s = replica.spec.graceful_shutdown_wait_loop_s
        replica.enter(ReplicaState.STOPPING, "draining", now)
        replica.stop_deadline = now + grace_s + STOP_MARGIN_S
        self.shared.actions.append(
            StopReplica(replica.replica_id, replica.worker, grace_s, poll_s)
        )

    def release(self, replica: Replica) -> None:
        """Be done with a replica that had been sent to a worker.

        Parameters
        ----------
        replica
            The replica.
        """
        self._forget(replica)
        self.shared.actions.append(ReleaseReplica(replica.replica_id))

    def _forget(self, replica: Replica) -> None:
        del self.replicas[replica.replica_id]
        del self.shared.owners[replica.replica_id]

    def note_death(self, replica: Replica, reason: str, now: float) -> None:
        """Remember that a replica ended by itself.

        Parameters
        ----------
        replica
            The replica.
        reason
            Why; the last line is kept.
        now
            Time in seconds.
        """
        death = Death(replica.tag, replica.worker, last_line(reason), now)
        self.deaths.append(death)

    def end_deploy(
        self, failure: str | None, cause: bytes | None = None, traceback: str = ""
    ) -> None:
        """Tell the ``deploy()`` calls that wait, if there are any, how it ended.

        Parameters
        ----------
        failure
            None if it went well.
        cause
            What a replica's constructor raised, pickled there, if it can be.
        traceback
            Of the cause.
        """
        tickets, self.target.tickets = self.target.tickets, []
        error = None
        if failure is not None:
            error = Failure("DeploymentFailedError", failure, cause, traceback)
        self.shared.settled += [Settle(ticket, error) for ticket in tickets]
