"""What changed from one snapshot of the routing to the next. Pure; any process.

The controller sends a whole snapshot to who has none, and to all others what changed:
with 10,000 replicas a whole one has a megabyte, and goes to each process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Snapshot: TypeAlias = Mapping[str, Any]
#: What is new or other, and the keys of what is gone.
Difference: TypeAlias = tuple[dict[Any, Any], list[Any]]
#: What `follow` takes for a snapshot that only has another number.
NO_CHANGES: dict[str, Any] = {"routes": ({}, []), "deployments": ({}, [])}


def difference(old: Snapshot, new: Snapshot) -> dict[str, Any] | None:
    """Return what turns one snapshot into another, in values that msgpack can carry.

    Parameters
    ----------
    old, new
        Whole snapshots. Deployments that are the very same object are not looked into.

    Returns
    -------
    dict or None
        To be given to `follow`; None if there is no difference.
    """
    routes = _compare(old["routes"], new["routes"])
    deployments, gone = _compare(old["deployments"], new["deployments"])
    if not (any(routes) or deployments or gone):
        return None
    parts = {
        name: _part(old["deployments"].get(name), entry)
        for name, entry in deployments.items()
    }
    return {"routes": routes, "deployments": (parts, gone)}


def follow(old: Snapshot, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the snapshot that comes after another one.

    Parameters
    ----------
    old
        The whole snapshot that `changes` is based on. It is not changed.
    changes
        What `difference` returned.

    Returns
    -------
    dict
        A whole snapshot; deployments that did not change are the same objects.
    """
    routes = _patch(old["routes"], *changes["routes"])
    parts, gone = changes["deployments"]
    entries = {
        name: _whole(old["deployments"].get(name), part) for name, part in parts.items()
    }
    return {
        "routes": dict(sorted(routes.items())),
        "deployments": _patch(old["deployments"], entries, gone),
    }


def _compare(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> Difference:
    changed = {
        key: value for key, value in new.items() if key not in old or old[key] != value
    }
    return changed, [key for key in old if key not in new]


def _patch(
    old: Mapping[Any, Any], changed: Mapping[Any, Any], gone: list[Any]
) -> dict[Any, Any]:
    new = {**old, **changed}
    for key in gone:
        del new[key]
    return new


def _part(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Cut a deployment's entry down to the replicas that changed."""
    changed, gone = _compare(_by_id(old), _by_id(new))
    return {**new, "replicas": list(changed.values()), "gone": gone}


def _whole(old: Mapping[str, Any] | None, part: Mapping[str, Any]) -> dict[str, Any]:
    replicas = _patch(_by_id(old), _by_id(part), part["gone"])
    whole = {**part, "replicas": [replicas[key] for key in sorted(replicas)]}
    del whole["gone"]
    return whole


def _by_id(entry: Mapping[str, Any] | None) -> dict[int, Any]:
    return {replica[0]: replica for replica in entry["replicas"]} if entry else {}
