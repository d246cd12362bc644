"""Goals of one deployment: set, judged, given up. Plain functions, no I/O."""

from __future__ import annotations

import math
from dataclasses import replace

from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.records import (
    Goal,
    Replica,
    ReplicaState,
    Spec,
    last_line,
)

_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 5.0
#: The longest wait once a deployment was healthy.
_RETRY_MAX_REACHED_S = 30.0
_MAX_LISTED = 10


def set_goal(d: ManagedDeployment, spec: Spec, ticket: int | None, now: float) -> None:
    """Aim at another wish; the ``deploy()`` in progress, if any, is superseded.

    If it asked for just the same, it waits on, and both are told the outcome.

    Parameters
    ----------
    d
        The deployment.
    spec
        The wish.
    ticket
        Of the call that waits. None: nobody does.
    now
        Time in seconds.
    """
    d.at_rest = False
    tickets = [] if ticket is None else [ticket]
    if d.target.spec.same_wish(spec):
        tickets += d.target.tickets
    else:
        d.end_deploy(
            f"superseded by a newer deploy() of {d.name!r} (version {spec.version!r})"
        )
    # A goal that failed is no base: the same wish again means another try.
    goals = [g for g in (d.target, d.serving) if g and g.failure is None]
    base = next((g for g in goals if g.spec.same_code(spec)), None)
    if base is None:
        generation = config_generation = _next_generation(d)
    else:
        generation = base.generation
        config_generation = _config_generation(d, goals, generation, spec)
        # All replicas of a generation run the same bytes, later ones too.
        spec = replace(spec, code=base.spec.code)
    d.target = Goal(
        spec=spec,
        generation=generation,
        config_generation=config_generation,
        tickets=tickets,
        deadline=now + spec.deploy_timeout_s,
        # Old replicas that gave way to the same code are not started again.
        rolling=base is d.target and base.rolling,
    )


def _config_generation(
    d: ManagedDeployment, goals: list[Goal], generation: int, spec: Spec
) -> int:
    for goal in goals:
        same = goal.spec.user_config == spec.user_config
        if goal.generation == generation and same:
            return goal.config_generation
    return _next_generation(d)


def _next_generation(d: ManagedDeployment) -> int:
    d.last_generation += 1
    return d.last_generation


def begin_delete(d: ManagedDeployment, why: str) -> None:
    """Aim at nothing, for good.

    Parameters
    ----------
    d
        The deployment.
    why
        What to tell a ``deploy()`` that waits.
    """
    d.at_rest = False
    d.deleting = True
    d.end_deploy(why)


def judge(d: ManagedDeployment, now: float) -> None:
    """See whether the target is reached, or its time is over.

    Parameters
    ----------
    d
        A deployment with a ``deploy()`` in progress.
    now
        Time in seconds.
    """
    goal = d.target
    wanted = goal.spec.num_replicas
    ready = d.ready(goal)
    if ready >= wanted:
        goal.reached = True
        goal.spec = d.history.add(goal.spec, now)
        d.serving = goal
        for replica in d.alive(goal):
            replica.spec = goal.spec
        d.end_deploy(None)
    elif math.isinf(goal.deadline) and any(r.worker for r in d.alive(goal)):
        # A deployment brought back has no deadline before there are workers.
        goal.deadline = now + goal.spec.deploy_timeout_s
    elif now >= goal.deadline:
        after = f"after {goal.spec.deploy_timeout_s:g} s"
        give_up(d, f"{ready} of {wanted} replicas ready {after}", _missing(d, now))


def give_up(
    d: ManagedDeployment, what: str, details: str, cause: bytes | None = None
) -> None:
    """Let the target fail; what served before is the goal again.

    Parameters
    ----------
    d
        A deployment with a ``deploy()`` in progress.
    what
        What went wrong, in one line.
    details
        More lines, as a traceback.
    cause
        What a replica raised, pickled there, if it can be.
    """
    goal = d.target
    summary = f"deployment {d.name!r} failed: {what}"
    if d.former is not None:
        summary += f"; its former version {d.former.spec.version!r} goes on serving"
    elif d.serving is not None:
        summary += "; its former options are back in force"
    goal.failure = f"{summary}\n\n{details}"
    d.at_rest = False
    if cause is None:
        d.end_deploy(goal.failure)
    else:  # it has its traceback with it
        d.end_deploy(summary, cause, details)


def count_failure(
    d: ManagedDeployment,
    dead: Replica,
    text: str,
    now: float,
    cause: bytes | None = None,
) -> None:
    """Try again a little later, or give the target up.

    Parameters
    ----------
    d
        The deployment.
    dead
        The replica whose constructor failed; no longer in the deployment, or told to
        stop.
    text
        The traceback.
    now
        Time in seconds.
    cause
        What was raised, pickled by the replica, if it can be.
    """
    goal = d.goal_of(dead)
    if goal is None or goal not in d.upkeep():
        return
    if len(d.alive(goal)) >= goal.spec.num_replicas:
        # One too many anyway, as after scaling down.
        return
    goal.failures += 1
    goal.failed_on[dead.worker] += 1
    goal.last_failure = text
    limit = d.shared.max_failures(goal.spec.num_replicas)
    if goal.in_progress and goal.failures >= limit:
        what = f"{goal.failures} of {limit} tries to start a replica failed, the last"
        give_up(d, f"{what} on {dead.worker} with {last_line(text)}", text, cause)
        return
    most = _RETRY_MAX_S if goal.in_progress else _RETRY_MAX_REACHED_S
    retry(d, goal, goal.failures, most, text, now)


def lost_worker(d: ManagedDeployment, dead: Replica, reason: str) -> None:
    """Give the target up, whose constructor may have cost a worker: one is enough.

    Parameters
    ----------
    d
        The deployment, whose ``deploy()`` somebody waits for.
    dead
        The replica whose constructor ran there; no longer in the deployment.
    reason
        How the worker was lost, readable by users.
    """
    if d.target.in_progress:
        d.target.last_failure = text = f"{dead.tag}: {reason}"
        what = f"{reason} while the constructor ran there, so it is not tried elsewhere"
        give_up(d, what, f"{text}\nIf something else was the cause, deploy() again.")


def retry(
    d: ManagedDeployment,
    goal: Goal,
    times: int,
    most_s: float,
    text: str,
    now: float,
) -> Replica:
    """Add a replica that is started a little later, or a little later still.

    Parameters
    ----------
    d
        The deployment.
    goal
        What it is for.
    times
        How often in a row that went wrong, 1 or more.
    most_s
        The longest wait.
    text
        What went wrong; the last line is kept.
    now
        Time in seconds.

    Returns
    -------
    Replica
        The pending one.
    """
    # The exponent is bounded, for this may go on for months.
    delay = min(most_s, _RETRY_FIRST_S * 2 ** min(times - 1, 20))
    again = d.add(goal, now)
    again.not_before = now + delay
    again.reason = f"waits {delay:g} s for another try after {last_line(text)}"
    return again


def relapse(d: ManagedDeployment, dead: Replica, text: str, now: float) -> None:
    """Replace one that ended soon after its start; the second in a row, later.

    Parameters
    ----------
    d
        The deployment.
    dead
        The one before, which just ended; no longer in the deployment, or told to stop.
    text
        Why it ended.
    now
        Time in seconds.
    """
    goal = d.goal_of(dead)
    if goal is None or goal not in d.upkeep():
        return
    if len(d.alive(goal)) < goal.spec.num_replicas:
        if dead.relapses == 0:
            again = d.add(goal, now)
        else:
            again = retry(d, goal, dead.relapses, _RETRY_MAX_REACHED_S, text, now)
        again.relapses = dead.relapses + 1


def waits_for(replica: Replica, now: float) -> str:
    """Say what a replica waits for and how long it has done so.

    Parameters
    ----------
    replica
        One that is not ready.
    now
        Time in seconds.

    Returns
    -------
    str
        Half a sentence for users.
    """
    elapsed = f"{now - replica.since:.0f} s"
    if replica.state == ReplicaState.PENDING:
        return replica.reason
    if replica.state == ReplicaState.RUNNING:
        return f"reconfigure() still running after {elapsed} on {replica.worker}"
    if replica.initializing:
        return f"constructor still running after {elapsed} on {replica.worker}"
    return f"{replica.reason} for {elapsed}"


def _missing(d: ManagedDeployment, now: float) -> str:
    """Say of each replica that is not ready what it waits for."""
    late = [r for r in d.alive(d.target) if not r.ready_for(d.target)]
    lines = [f"{r.tag}: {waits_for(r, now)}" for r in late[:_MAX_LISTED]]
    if len(late) > _MAX_LISTED:
        lines.append(f"and {len(late) - _MAX_LISTED} more")
    if d.target.last_failure:
        lines.append(f"\nThe last one that failed:\n{d.target.last_failure}")
    return "\n".join(lines)
