"""The brain's state as plain data: for proxies and handles, and for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.records import Death, DeploymentState, Replica


def routing_of(deployments: Iterable[ManagedDeployment]) -> dict[str, Any]:
    """Collect what proxies and handles must know.

    Parameters
    ----------
    deployments
        Those that exist, in the order in which they shall appear.

    Returns
    -------
    dict
        ``routes`` by prefix, ``deployments`` by name; depends on no clock.
    """
    routes: dict[str, str] = {}
    entries: dict[str, Any] = {}
    for d in deployments:
        prefix = d.routed.spec.route_prefix
        if prefix is not None:
            routes[prefix] = d.name
        if d.routing is None or not d.at_rest:
            d.routing = _routing_entry(d)
        entries[d.name] = d.routing
    return {"routes": dict(sorted(routes.items())), "deployments": entries}


def _routing_entry(d: ManagedDeployment) -> dict[str, Any]:
    spec = d.routed.spec
    replicas = sorted(d.routable(), key=lambda r: r.replica_id)
    entry: dict[str, Any] = {
        "replicas": [
            [r.replica_id, r.tag, r.worker, r.direct, r.first_limit] for r in replicas
        ],
        "max_ongoing": spec.max_ongoing_requests,
        "max_queued": spec.max_queued_requests,
        "max_websockets": spec.max_websockets,
        "timeout_s": spec.request_timeout_s,
        # Nothing comes any more: requests need not wait for a replica.
        "hopeless": not d.upkeep(),
    }
    if not replicas:  # in one line, for it goes to HTTP clients
        entry["reason"] = d.reason.partition("\n")[0]
    if spec.session_affinity is not None:
        entry["session_affinity"] = dict(spec.session_affinity)
    if spec.autoscaling is not None:
        entry["load_interval_s"] = spec.autoscaling["metrics_interval_s"]
        if spec.num_replicas == 0:
            entry["asleep"] = True
    return entry


def status_of(
    live: Iterable[ManagedDeployment],
    draining: Iterable[ManagedDeployment],
    now: float,
) -> dict[str, Any]:
    """Collect what people want to know.

    Parameters
    ----------
    live
        Deployments that exist.
    draining
        Deleted ones with replicas left. One of the same name as a live one only adds
        its replicas there.
    now
        Time in seconds.

    Returns
    -------
    dict
        Deployments by name.
    """
    report = {d.name: _status_entry(d, now) for d in live}
    for d in draining:
        if d.name in report:
            rest = [_replica_entry(r, now) for r in d.replicas.values()]
            report[d.name]["replicas"] += rest
        else:
            report[d.name] = _status_entry(d, now)
    return dict(sorted(report.items()))


def _status_entry(d: ManagedDeployment, now: float) -> dict[str, Any]:
    spec = d.current.spec
    state = d.state
    deleting = state == DeploymentState.DELETING
    return {
        "state": state.value,
        "reason": d.reason,
        "app": spec.app,
        "version": spec.version,
        "route_prefix": spec.route_prefix,
        "target_replicas": 0 if deleting else spec.num_replicas,
        "running_replicas": 0 if deleting else len(d.routable()),
        "replicas": [_replica_entry(r, now) for r in d.replicas.values()],
        "deaths": [_death_entry(death, now) for death in d.deaths],
        "autoscaling": d.scaling.explain(d.current, now),
    }


def _replica_entry(replica: Replica, now: float) -> dict[str, Any]:
    return {
        "replica_id": replica.replica_id,
        "replica_tag": replica.tag,
        "worker": replica.worker or None,
        "host": replica.host or None,
        "pid": replica.pid,
        "state": replica.state.value,
        "reason": replica.reason,
        "since_s": now - replica.since,
    }


def _death_entry(death: Death, now: float) -> dict[str, Any]:
    return {
        "replica_tag": death.tag,
        "worker": death.worker,
        "reason": death.reason,
        "ago_s": now - death.at,
    }
