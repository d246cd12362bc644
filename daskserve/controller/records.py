"""The plain data of the controller's brain: wishes, goals, replicas. No decisions."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Self, TypeAlias

from daskserve.exceptions import EnvironmentMismatchError

#: What pickled code is good for: bytecode of another Python kills who runs it.
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

#: Period and timeout of health checks, and the timeout of abandoned calls.
Watch: TypeAlias = tuple[float, float, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What one ``deploy()`` wishes. Bytes are opaque here and never unpickled.

    Parameters
    ----------
    name
        Name of the deployment.
    version
        Its version. None: never the same as any other.
    code
        The pickled callable.
    init
        The pickled arguments of its constructor.
    user_config
        The pickled configuration for ``reconfigure()``, or None.
    route_prefix
        HTTP path prefix, or None for no HTTP.
    num_replicas
        How many replicas should run.
    max_ongoing_requests
        Requests that one replica takes at a time. None: no limit.
    max_queued_requests
        Requests that may wait at one caller. None: no limit.
    resources
        Dask resources that each replica takes as long as it lives.
    workers
        Addresses, hosts or names of workers that are allowed. Empty: all.
    request_timeout_s
        Seconds until a request times out. None: the instance's value.
    deploy_timeout_s
        Seconds that a ``deploy()`` may take.
    health_check_period_s
        Seconds between two health checks.
    health_check_timeout_s
        Seconds that a health check may take.
    graceful_shutdown_timeout_s
        Seconds that a stopping replica may go on with its requests.
    graceful_shutdown_wait_loop_s
        Seconds between two looks whether they have ended.
    options
        The pickled options as the user gave them, for ``get_deployment()``.
    app
        The app that it is a part of, or None.
    app_place
        Its place there: callees come before their callers, the ingress is last.
    autoscaling
        An `AutoscalingConfig` as a dict, if `num_replicas` follows the load: then that
        is how many are wanted now.
    max_websockets
        WebSockets that one replica has open at a time.
    threads
        Sync calls that run at once in a replica.
    abandoned_call_timeout_s
        Seconds that a sync call may run on for which nobody waits. None: for ever.
    session_affinity
        The kind of what has a session's id, and its name. None: no affinity.
    future_keys
        Of Dask's tasks whose values are among the constructor's arguments.
    max_unavailable
        How many replicas fewer may serve during an update, or a part such as "25%".
        None: 1 of two or more.
    max_surge
        How many replicas more than wanted may run during an update, or a part. None: as
        many as have room.
    """

    name: str
    version: str | None
    code: bytes
    init: bytes
    user_config: bytes | None
    route_prefix: str | None
    num_replicas: int
    max_ongoing_requests: int | None
    max_queued_requests: int | None
    resources: Mapping[str, float]
    workers: tuple[str, ...]
    request_timeout_s: float | None
    deploy_timeout_s: float
    health_check_period_s: float
    health_check_timeout_s: float
    graceful_shutdown_timeout_s: float
    graceful_shutdown_wait_loop_s: float
    options: bytes
    app: str | None = None
    app_place: int = 0
    autoscaling: Mapping[str, Any] | None = None
    # What is new has a default: it is not in the state files that there are.
    threads: int = 1
    max_websockets: int = 1000
    abandoned_call_timeout_s: float | None = 600.0
    session_affinity: Mapping[str, str] | None = None
    future_keys: tuple[Any, ...] = ()
    max_unavailable: int | str | None = None
    max_surge: int | str | None = None

    @property
    def watch(self) -> Watch:
        """What the worker is told of how to watch over replicas."""
        return (
            self.health_check_period_s,
            self.health_check_timeout_s,
            self.abandoned_call_timeout_s,
        )

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Self:
        """Build one from what :meth:`to_message` made.

        Parameters
        ----------
        message
            Field names and values. Lists may stand for tuples, as after msgpack.

        Returns
        -------
        Spec
            The wish.

        Raises
        ------
        TypeError
            If a field is missing or unknown.
        EnvironmentMismatchError
            If another Python has pickled the code.
        """
        plain = dict(message)
        plain["future_keys"] = tuple(plain.get("future_keys", ()))
        python = plain.pop("python", PYTHON)  # state files of old do not say
        if python != PYTHON:
            raise EnvironmentMismatchError(
                f"deployment {plain['name']!r} comes from Python {python}, and the "
                f"scheduler has {PYTHON}, which cannot run its code: use the same "
                f"minor version everywhere"
            )
        if "workers" in plain:
            plain["workers"] = tuple(plain["workers"])
        if "resources" in plain:
            plain["resources"] = dict(plain["resources"])
        return cls(**plain)

    def to_message(self) -> dict[str, Any]:
        """Give a dict of values that msgpack can carry.

        Returns
        -------
        dict
            Field names and values.
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["workers"] = list(self.workers)
        plain["resources"] = dict(self.resources)
        plain["python"] = PYTHON
        return plain

    def same_code(self, other: Spec) -> bool:
        """Whether running replicas of this one can serve as replicas of another.

        Equal versions stand for equal code: the bytes are not compared, because
        pickling the same code twice may give different bytes. A ``user_config`` that
        is taken away needs new replicas: nothing makes a running one forget it.

        Parameters
        ----------
        other
            A later wish for the same deployment.

        Returns
        -------
        bool
            True if no replica has to be replaced.
        """
        return (
            self.version is not None
            and self.version == other.version
            and self.init == other.init
            and self.threads == other.threads
            and dict(self.resources) == dict(other.resources)
            and self.workers == other.workers
            and self.session_affinity == other.session_affinity
            and (other.user_config is not None or self.user_config is None)
        )

    def same_wish(self, other: Spec) -> bool:
        """Whether another ``deploy()`` asks for just the same.

        Parameters
        ----------
        other
            A wish for the same deployment.

        Returns
        -------
        bool
            True if who waits for the one can be content with the other. As ever, equal
            versions stand for equal code; without a version the bytes do.
        """
        code = self.code if self.version is None else other.code
        return replace(self, code=code, options=other.options) == other


#: The fields of a `Spec` that may be large; equal ones are kept and written once.
OPAQUE = ("code", "init", "user_config", "options")


class ReplicaState(StrEnum):
    """Where a replica is in its life."""

    #: There is no worker for it yet.
    PENDING = "PENDING"
    #: Sent to a worker; the constructor has not ended yet.
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    #: Told to stop; it drains.
    STOPPING = "STOPPING"


class DeploymentState(StrEnum):
    """How a deployment does."""

    #: A ``deploy()`` is in progress.
    UPDATING = "UPDATING"
    HEALTHY = "HEALTHY"
    #: Was healthy, and has fewer replicas than wanted now.
    UNHEALTHY = "UNHEALTHY"
    #: The last ``deploy()`` failed; a former version may go on serving.
    DEPLOY_FAILED = "DEPLOY_FAILED"
    DELETING = "DELETING"


@dataclass(slots=True, kw_only=True, eq=False)
class Replica:
    """One incarnation of a deployment's code; replaced, never restarted."""

    replica_id: int
    tag: str
    #: What it runs; ``resources`` are its own until it is released.
    spec: Spec
    #: Which code it runs; replicas of one generation are interchangeable.
    generation: int
    #: The configuration that it was last given.
    config_generation: int
    state: ReplicaState = ReplicaState.PENDING
    #: What it waits for; "" when running.
    reason: str
    #: When it entered this state or began this step.
    since: float
    #: No attempt to place it before that time.
    not_before: float
    worker: str = ""
    host: str = ""
    pid: int | None = None
    #: Host, port and secret of its own port, for those who can reach it.
    direct: list[Any] | None = None
    #: How many requests to send it before it has said more; None: as many as may be.
    first_limit: int | None = None
    #: Whether it is not to have a worker yet, though there may be one.
    held: bool = False
    #: Whether its constructor has begun.
    initializing: bool = False
    #: Whether it has not yet answered to its last ``ReconfigureReplica``.
    reconfiguring: bool = False
    #: When a stopping one is given up.
    stop_deadline: float = 0.0
    #: Whether all proxies and handles have been told of it.
    known: bool = False
    #: Whether its worker leaves, so that another is to take its place.
    outgoing: bool = False
    #: Whether another is to take its place where there are fewer.
    spreads: bool = False
    #: Whether its worker leaves, but nobody else would have it.
    lent: bool = False
    #: How to watch over it, as its worker was last told.
    watched: Watch | None = None
    #: How often in a row the ones before it fell ill soon after their start.
    relapses: int = 0

    def ready_for(self, goal: Goal) -> bool:
        """Whether it runs with a goal's configuration.

        Parameters
        ----------
        goal
            A goal of the replica's generation.

        Returns
        -------
        bool
            True if nothing is left to be done.
        """
        return (
            self.state == ReplicaState.RUNNING
            and not self.reconfiguring
            and self.config_generation == goal.config_generation
        )

    def enter(self, state: ReplicaState, reason: str, now: float) -> None:
        """Go to a state or begin another step within it.

        Parameters
        ----------
        state
            The state.
        reason
            What the replica waits for from now on.
        now
            Time in seconds.
        """
        self.state = state
        self.reason = reason
        self.since = now


@dataclass(slots=True, kw_only=True, eq=False)
class Goal:
    """What one ``deploy()`` set out to reach, and how that goes."""

    spec: Spec
    generation: int
    config_generation: int
    #: The ``deploy()`` calls that wait; none when they were told the outcome.
    tickets: list[int]
    deadline: float
    #: All replicas ran at once; from then on replicas are replaced for ever.
    reached: bool = False
    #: Why it was given up.
    failure: str | None = None
    #: Old replicas give way before all new ones run, and both get requests.
    rolling: bool = False
    #: Failed constructors since the beginning, or since all replicas ran.
    failures: int = 0
    last_failure: str = ""
    #: Where they failed.
    failed_on: Counter[str] = field(default_factory=Counter)

    @property
    def in_progress(self) -> bool:
        """Whether its ``deploy()`` is neither done nor failed."""
        return not self.reached and self.failure is None

    def forget_failures(self) -> None:
        """Start counting anew, since all replicas run."""
        self.failures = 0
        self.last_failure = ""
        self.failed_on.clear()


@dataclass(frozen=True, slots=True)
class Death:
    """A replica that ended without being told to."""

    tag: str
    worker: str
    #: One line.
    reason: str
    at: float


def last_line(text: str) -> str:
    """Take the last line, which is the exception itself in a traceback.

    Parameters
    ----------
    text
        Text of one line or more.

    Returns
    -------
    str
        Its last line that is not blank.
    """
    return text.rstrip().rpartition("\n")[2].strip()
