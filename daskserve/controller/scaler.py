"""Let the number of replicas follow the load: what is done with decisions. No I/O.

A deployment's number is that of its goals' specs, wherever it came from: nothing else
in the controller knows of autoscaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from daskserve.config import AutoscalingConfig
from daskserve.controller.autoscaling import AutoscalingContext
from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.load import Load
from daskserve.controller.placement import WorkerView, matches
from daskserve.controller.records import Goal, ReplicaState, Spec

#: Asks a deployment's policy. An answer, what is wrong, or None: none yet.
Ask = Callable[[AutoscalingContext], int | str | None]


def scale(
    d: ManagedDeployment,
    load: Load,
    queued: int,
    ask: Ask,
    now: float,
) -> str | None:
    """Look at a deployment's load if that is due, and want another number if need be.

    Parameters
    ----------
    d
        The deployment.
    load
        Its requests, as all processes have reported them.
    queued
        How many are known to wait; that comes sooner.
    ask
        Asks the policy.
    now
        Time in seconds.

    Returns
    -------
    str or None
        What has just gone wrong with the policy, to be logged.
    """
    goals = _scaled(d)
    if not goals:
        return None
    scaling, goal = d.scaling, goals[0]
    config, there = scaling.config(goal.spec), goal.spec.num_replicas
    if d.ready(goal) >= there:
        scaling.floor = there
    if there == 0 and queued:
        # Whatever the delays: nobody else can take it.
        scaling.decide(now, 0, 1, config)
        _set(d, goals, 1, f"scaling up, {queued} requests wait for the first replica")
        return None
    if now < scaling.next_at:
        return None
    scaling.next_at = now + config.metrics_interval_s
    scaling.loads = load.replicas
    average = scaling.sample(now, load.requests, config)
    answer = ask(
        AutoscalingContext(
            deployment=d.name,
            current_replicas=there,
            running_replicas=d.ready(goal),
            requests=load.requests,
            average_requests=average,
            history=tuple((now - at, number) for at, number in scaling.samples),
            config=config,
        )
    )
    if answer is None:
        return None
    if isinstance(answer, str):
        text = f"autoscaling policy {config.policy!r} {answer}; the number stays"
        news, scaling.trouble = text != scaling.trouble, text
        return text if news else None
    scaling.trouble = ""
    if d.target.in_progress:
        # Nothing is taken away meanwhile, and delays begin when it is done.
        answer = max(answer, there)
    scaling.last = load.requests, average, config.clamp(answer)
    number = scaling.decide(now, there, answer, config)
    if number > there:
        _set(d, goals, number, f"scaling up, {_per_replica(average, config)}")
    elif number < there:
        if number:
            why = f"scaling down, {_per_replica(average, config)}"
        else:
            why = f"scaled to zero, no requests for {config.downscale_delay_s:g} s"
        _set(d, goals, number, why)
    return None


def _scaled(d: ManagedDeployment) -> list[Goal]:
    """Return the goals whose number follows the load, the newest first."""
    goals = [d.target]
    if d.serving is not None and d.serving is not d.target:
        goals.append(d.serving)
    return [g for g in goals if g.failure is None and g.spec.autoscaling is not None]


def _set(d: ManagedDeployment, goals: Iterable[Goal], number: int, why: str) -> None:
    d.scaling.note = why
    d.at_rest = False
    for goal in goals:
        assert goal.spec.autoscaling is not None
        own = AutoscalingConfig(**goal.spec.autoscaling).clamp(number)
        goal.spec = replace(goal.spec, num_replicas=own)
    if d.scaling.floor is not None:
        d.scaling.floor = min(d.scaling.floor, number)


def _per_replica(average: float, config: AutoscalingConfig) -> str:
    return f"{average:.3g} requests for {config.target_ongoing_requests:g} each"


def missing_workers(
    deployments: Iterable[ManagedDeployment],
    views: Mapping[str, WorkerView],
    now: float,
) -> int:
    """Count the workers that replicas without room would fill.

    Parameters
    ----------
    deployments
        Those that exist.
    views
        The workers of the cluster by address; more of them are taken to be alike.
    now
        Time in seconds.

    Returns
    -------
    int
        0 where more of them would not help.
    """
    workers = 0.0
    for d in deployments:
        for goal in d.upkeep():
            spec = goal.spec
            homeless = sum(
                r.state == ReplicaState.PENDING and r.not_before <= now and not r.held
                for r in d.alive(goal)
            )
            if not homeless or spec.workers:
                continue
            if not views:
                workers = max(workers, 1)
                continue
            most = max(_capacity(view, spec) for view in views.values())
            if most:
                workers += homeless / most
    return -int(-workers // 1)


def _capacity(view: WorkerView, spec: Spec) -> int:
    """Return how many replicas an empty worker takes; many if they take nothing."""
    if not matches(view, spec.workers):
        return 0
    counts = [
        int(view.resources.get(name, 0.0) / amount + 1e-9)
        for name, amount in spec.resources.items()
    ]
    return min(counts, default=1000)
