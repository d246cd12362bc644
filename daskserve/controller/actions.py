"""What the controller's brain asks for: plain values, carried out by the plugin."""

from __future__ import annotations

from dataclasses import dataclass

from daskserve.controller.records import Spec


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Submit the actor of a replica to a worker.

    Parameters
    ----------
    replica_id
        Number of the replica, unique on the cluster.
    tag
        Its name for users.
    worker
        Address of the worker.
    spec
        What to run.
    config_generation
        Number of the ``user_config`` in ``spec`` that the replica starts with.
    """

    replica_id: int
    tag: str
    worker: str
    spec: Spec
    config_generation: int


@dataclass(frozen=True, slots=True)
class ReconfigureReplica:
    """Give a running replica another ``user_config``.

    Parameters
    ----------
    replica_id
        Number of the replica.
    worker
        Address of its worker.
    user_config
        The configuration, opaque; None if the deployment has none any more.
    config_generation
        Number of this configuration, to be named in the answer. It goes back to a
        former one when that is put back: an identity, not a clock.
    """

    replica_id: int
    worker: str
    user_config: bytes | None
    config_generation: int


@dataclass(frozen=True, slots=True)
class WatchReplica:
    """Watch over a replica in another way from now on.

    Parameters
    ----------
    replica_id
        Number of the replica.
    worker
        Address of its worker.
    period_s
        Seconds between two checks.
    timeout_s
        Seconds that one may take.
    abandoned_call_timeout_s
        Seconds that a sync call may run on for which nobody waits. None: for ever.
    """

    replica_id: int
    worker: str
    period_s: float
    timeout_s: float
    abandoned_call_timeout_s: float | None


@dataclass(frozen=True, slots=True)
class StopReplica:
    """Tell a replica to drain and end. Sent once.

    Parameters
    ----------
    replica_id
        Number of the replica.
    worker
        Address of its worker.
    grace_s
        Seconds that requests in it may still take.
    poll_s
        Seconds between two looks whether they have ended.
    """

    replica_id: int
    worker: str
    grace_s: float
    poll_s: float


@dataclass(frozen=True, slots=True)
class ReleaseReplica:
    """Forget the actor; always the last action for a replica that was started.

    Parameters
    ----------
    replica_id
        Number of the replica.
    """

    replica_id: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a waiting call failed.

    Parameters
    ----------
    kind
        Name of the exception class to raise.
    text
        Its text: one line of summary, then the details.
    cause
        Its cause, pickled by a replica: not for the scheduler to read.
    traceback
        What the text lacks if the cause cannot be shown in its place.
    """

    kind: str
    text: str
    cause: bytes | None = None
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Settle:
    """End a waiting ``deploy()``, ``delete()`` or ``shutdown()``; once per ticket.

    Parameters
    ----------
    ticket
        What the call returned.
    error
        None on success.
    """

    ticket: int
    error: Failure | None = None


Action = (
    StartReplica
    | ReconfigureReplica
    | WatchReplica
    | StopReplica
    | ReleaseReplica
    | Settle
)
