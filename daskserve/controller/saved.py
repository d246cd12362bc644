"""What of a deployment outlives its scheduler: taken down, and brought back. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from daskserve.controller.deployment_state import ManagedDeployment, Shared
from daskserve.controller.goals import set_goal
from daskserve.controller.history import History, Version
from daskserve.controller.records import Goal, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedDeployment:
    """One deployment: what serves, and what is to serve if that is something else.

    Parameters
    ----------
    name
        Its name.
    serving
        The wish that was reached last. None: none ever was.
    target
        The wish after it. None: `serving` is what is wanted.
    failure
        Why the target was given up, if it was.
    versions
        The former ones.
    """

    name: str
    serving: Spec | None
    target: Spec | None
    failure: str | None
    versions: tuple[Version, ...]


def saved(deployments: Iterable[ManagedDeployment]) -> tuple[SavedDeployment, ...]:
    """Take down what is wanted; equal to what was taken before if nothing changed.

    Parameters
    ----------
    deployments
        Those that are not being deleted.

    Returns
    -------
    tuple of SavedDeployment
        In the same order.
    """
    return tuple(
        SavedDeployment(
            name=d.name,
            serving=None if d.serving is None else d.serving.spec,
            target=None if d.target.reached else d.target.spec,
            failure=d.target.failure,
            versions=d.history.versions,
        )
        for d in deployments
    )


def revive(saved: SavedDeployment, shared: Shared, now: float) -> ManagedDeployment:
    """Make a deployment again of what was taken down; nothing of it runs yet.

    Parameters
    ----------
    saved
        What was wanted.
    shared
        What the controller's deployments have in common.
    now
        Time in seconds.

    Returns
    -------
    ManagedDeployment
        What served is started again, and what was on its way goes on beside it.
    """
    first = saved.serving or saved.target
    assert first is not None
    d = ManagedDeployment(
        name=saved.name,
        shared=shared,
        target=Goal(
            spec=first,
            generation=1,
            config_generation=1,
            tickets=[],
            # Nobody waits for it: it takes the time until workers are there.
            deadline=math.inf,
            reached=saved.serving is not None,
        ),
        history=History(saved.versions),
    )
    if saved.serving is not None:
        d.serving = d.target
        if saved.target is not None:
            set_goal(d, saved.target, None, now)
            d.target.deadline = math.inf
    d.target.failure = saved.failure
    return d
