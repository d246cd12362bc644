"""The Dask actor that a replica is; in a worker.

The actor pins user code to its worker for Dask; calls do not go through it. Creating it
takes a thread of the worker for a moment only: the user's constructor runs on the
replica's own thread and reports from there. While tasks have all threads, the
controller starts the replica without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed import get_worker

#: Under which name the worker plugin is found on a worker.
PLUGIN_NAME = "daskserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What a replica needs to know of its deployment; travels with the actor."""

    replica_id: int
    tag: str
    deployment: str
    #: Pickled class or function.
    code: bytes
    #: Pickled ``(args, kwargs)`` of the constructor.
    init: bytes
    #: Pickled, or None for no ``reconfigure``.
    user_config: bytes | None
    config_generation: int
    max_ongoing_requests: int | None
    health_check_period_s: float
    health_check_timeout_s: float
    max_websockets: int = 1000
    #: How many sync calls run at once.
    threads: int = 1
    #: For how many seconds one may run on that nobody waits for; None: for ever.
    abandoned_call_timeout_s: float | None = None
    session_affinity: Mapping[str, str] | None = None
    #: Of Dask's tasks whose values are in `init`.
    future_keys: tuple[Any, ...] = ()


class Replica:
    """One replica as Dask sees it.

    Parameters
    ----------
    spec
        What to run.

    Raises
    ------
    RuntimeError
        The worker lacks daskserve's plugin.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        worker = get_worker()
        plugin: Any = worker.plugins.get(PLUGIN_NAME)
        if plugin is None:
            raise RuntimeError(
                f"worker {worker.address} has no plugin {PLUGIN_NAME!r}; it has "
                f"{sorted(worker.plugins)}"
            )
        plugin.start_replica(spec)
        self.replica_tag = spec.tag
