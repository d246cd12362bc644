"""The level-triggered half: what is compared with what should be. No I/O.

For each deployment :func:`observe` runs first, for all, and then :func:`advance`: by
then it is known which replicas are gone, so that their room can be given away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from daskserve.controller import events, health
from daskserve.controller.actions import ReconfigureReplica, StartReplica
from daskserve.controller.deployment_state import ManagedDeployment
from daskserve.controller.goals import count_failure, judge, waits_for
from daskserve.controller.moving import lender, let_go, mark_outgoing
from daskserve.controller.placement import (
    Occupancy,
    Search,
    Unplaceable,
    WorkerView,
    fits,
    matches,
)
from daskserve.controller.records import Goal, Replica, ReplicaState
from daskserve.controller.spreading import end_moves

#: How many times as long as its trial a replica may take until its constructor begins.
TRIAL_MOST = 5


@dataclass(kw_only=True)
class Pass:
    """What one ``reconcile()`` works with."""

    now: float
    views: Mapping[str, WorkerView]
    deployments: Iterable[ManagedDeployment]

    @cached_property
    def occupancy(self) -> Occupancy:
        """What replicas take; counted when first needed, for mostly it is not."""
        occupancy = Occupancy()
        for d in self.deployments:
            for replica in d.replicas.values():
                if replica.worker:
                    resources = replica.spec.resources
                    occupancy.add(replica.worker, d.name, resources)
        return occupancy


def is_at_rest(d: ManagedDeployment, views: Mapping[str, WorkerView]) -> bool:
    """Whether nothing has happened to a deployment since it was in order.

    Parameters
    ----------
    d
        The deployment.
    views
        The workers of the cluster by address.

    Returns
    -------
    bool
        True if it can be passed over, which is what a big cluster lives on.
    """
    return d.at_rest and all(
        (view := views.get(r.worker)) is not None and view.leaving is None
        for r in d.replicas.values()
    )


# First half: what time and workers did


def observe(d: ManagedDeployment, now: float, views: Mapping[str, WorkerView]) -> None:
    """Find what is lost, late or done.

    Parameters
    ----------
    d
        The deployment.
    now
        Time in seconds.
    views
        The workers of the cluster by address.
    """
    _lose_workers(d, now, views)
    _give_up_draining(d, now, views)
    mark_outgoing(d, now, views)
    if d.deleting:
        return
    if d.target.in_progress:
        judge(d, now)
    _give_up_overdue(d, now)
    end_moves(d)
    for goal in d.upkeep():
        if goal.reached and goal.failures and d.ready(goal) >= goal.spec.num_replicas:
            goal.forget_failures()


def _lose_workers(
    d: ManagedDeployment, now: float, views: Mapping[str, WorkerView]
) -> None:
    gone: dict[str, list[Replica]] = {}
    for replica in d.replicas.values():
        if replica.worker and replica.worker not in views:
            gone.setdefault(replica.worker, []).append(replica)
    for worker, replicas in gone.items():
        reason = f"worker {worker} left the cluster"
        events.lost(d, replicas, reason, now, blame=True, with_worker=True)


def _give_up_draining(
    d: ManagedDeployment, now: float, views: Mapping[str, WorkerView]
) -> None:
    for replica in list(d.replicas.values()):
        if replica.state != ReplicaState.STOPPING:
            continue
        view = views.get(replica.worker)
        hurries = d.deleting or d.former or (view is not None and view.leaving)
        if replica.spreads and hurries:
            replica.spreads = False
            d.stop(replica, now)
        if now >= replica.stop_deadline:
            d.release(replica)


def _give_up_overdue(d: ManagedDeployment, now: float) -> None:
    """Replace what hangs, where no deadline of a ``deploy()`` watches over it."""
    for replica in list(d.replicas.values()):
        goal = d.goal_of(replica)
        if goal is None or goal.in_progress:
            continue
        starting = replica.state == ReplicaState.STARTING
        running = replica.state == ReplicaState.RUNNING
        # One that hangs in a configuration just given up is first given the former.
        current = replica.config_generation == goal.config_generation
        hangs = starting or (running and replica.reconfiguring and current)
        if hangs and now - replica.since >= goal.spec.deploy_timeout_s:
            text = waits_for(replica, now)
            d.note_death(replica, text, now)
            d.stop(replica, now)
            if starting:
                count_failure(d, replica, text, now)


# Second half: what is started and stopped


def advance(d: ManagedDeployment, this: Pass) -> None:
    """Start, reconfigure and stop replicas as the goals demand.

    Parameters
    ----------
    d
        The deployment.
    this
        The pass.
    """
    former = d.former
    if former is not None and d.running(d.target) and not d.running(former):
        # None of the old code is left to take requests: the new code does, for good.
        d.target.rolling = True
    goals = d.upkeep()
    _stop_unwanted(d, goals, this.now)
    let_go(d, goals, this.now, this.views)
    for goal in goals:
        _trim(d, goal, this)
        _reconfigure(d, goal, this.now)
        for _ in range(goal.spec.num_replicas - len(d.alive(goal))):
            d.add(goal, this.now)
    for goal in goals:
        crowded, held = _place_pending(d, goal, this)
        if former is not None and goal is d.target:
            if crowded:
                _make_room(d, former, crowded, this)
            if held and _take_turns(d, former, held, this):
                _place_pending(d, goal, this)
    health.watch(d)
    d.at_rest = _is_in_order(d)
    d.routing = None


def _stop_unwanted(d: ManagedDeployment, goals: list[Goal], now: float) -> None:
    wanted = {goal.generation for goal in goals}
    former = d.former
    # Old replicas that run go one by one, or all at once when the new ones are ready.
    waiting = former.generation if former is not None and not d.deleting else None
    for replica in list(d.replicas.values()):
        if replica.state == ReplicaState.STOPPING or replica.generation in wanted:
            continue
        running = replica.state == ReplicaState.RUNNING
        if not (running and replica.generation == waiting):
            d.stop(replica, now)


def _trim(d: ManagedDeployment, goal: Goal, this: Pass) -> None:
    """Stop what is too much: what does not run first, then the least loaded."""
    alive = d.alive(goal)
    surplus = len(alive) - goal.spec.num_replicas
    if surplus <= 0:
        return
    order = [ReplicaState.PENDING, ReplicaState.STARTING, ReplicaState.RUNNING]
    own = Counter(r.worker for r in alive)
    seen: Counter[str] = Counter()
    ranks = []
    for replica in alive:
        # The third one on its worker goes before the second one on any other, which
        # keeps the rest spread; then it counts what others have there.
        seen[replica.worker] += 1
        ranks.append(
            (
                order.index(replica.state),
                replica.ready_for(goal),
                d.scaling.loads.get(replica.replica_id, 0),
                -seen[replica.worker],
                own[replica.worker] - this.occupancy.load[replica.worker],
                -replica.replica_id,
            )
        )
    for *_, negative_id in sorted(ranks)[:surplus]:
        d.stop(d.replicas[-negative_id], this.now)


def _reconfigure(d: ManagedDeployment, goal: Goal, now: float) -> None:
    for replica in d.running(goal):
        if replica.config_generation != goal.config_generation:
            replica.config_generation = goal.config_generation
            replica.reconfiguring = True
            replica.enter(ReplicaState.RUNNING, "running reconfigure()", now)
            d.shared.actions.append(
                ReconfigureReplica(
                    replica.replica_id,
                    replica.worker,
                    goal.spec.user_config,
                    goal.config_generation,
                )
            )


def _place_pending(d: ManagedDeployment, goal: Goal, this: Pass) -> tuple[int, int]:
    """Send pending replicas to workers.

    Returns
    -------
    int, int
        How many found no room because replicas of this very deployment have it, and how
        many are held back by ``max_surge``.
    """
    due = [
        r
        for r in d.alive(goal)
        if r.state == ReplicaState.PENDING and r.not_before <= this.now
    ]
    for replica in due:
        replica.held = False
    if goal.in_progress and not _is_tried(d, goal, this.now):
        due = _first_alone(d, goal, due)
    due, held = _within_surge(d, goal, due)
    if not due:
        return 0, held
    # Old code beside it does not count: it goes, and what is left should be spread.
    placed = [r for r in d.alive(goal) if r.worker]
    own = Counter(r.worker for r in placed)
    own_hosts = Counter(r.host for r in placed)
    search = Search(
        resources=goal.spec.resources,
        workers=goal.spec.workers,
        views=this.views,
        occupancy=this.occupancy,
        own=own,
        own_hosts=own_hosts,
        failures=goal.failed_on,
        lender=lender(goal.spec, this.views, this.now),
    )
    for number, replica in enumerate(due):
        found = search.next()
        if isinstance(found, Unplaceable):
            # The others ask for the same, so they need not be tried.
            return _note_unplaceable(d, due[number:], found), held
        _start(d, goal, replica, this.views[found], this)
        own[found] += 1
        own_hosts[replica.host] += 1
    return 0, held


def _is_tried(d: ManagedDeployment, goal: Goal, now: float) -> bool:
    """Whether new code has run for a moment without taking its worker down."""
    trial_s = d.shared.trial_s
    return not trial_s or any(
        r.state == ReplicaState.RUNNING
        or (
            r.state == ReplicaState.STARTING
            and now - r.since >= (trial_s if r.initializing else TRIAL_MOST * trial_s)
        )
        for r in d.alive(goal)
    )


def _first_alone(d: ManagedDeployment, goal: Goal, due: list[Replica]) -> list[Replica]:
    later = due if any(r.worker for r in d.alive(goal)) else due[1:]
    for replica in later:
        replica.held = True
        replica.reason = "starts when the first one has, or a moment after it"
    return due[: len(due) - len(later)]


def _within_surge(
    d: ManagedDeployment, goal: Goal, due: list[Replica]
) -> tuple[list[Replica], int]:
    """Hold back what would be too much beside the old replicas; say how many."""
    former, given = d.former, goal.spec.max_surge
    if former is None or goal is not d.target or given is None:
        return due, 0
    wanted = goal.spec.num_replicas
    # Those that take the places of lost old ones, as long as they do, will be there.
    kept = former.generation if former in d.upkeep() else None
    there = sum(r.worker != "" or r.generation == kept for r in d.replicas.values())
    room = max(0, wanted + _part_of(wanted, given, up=True) - there)
    for replica in due[room:]:
        replica.held = True
        replica.reason = f"waits for an old replica to end: max_surge={given!r}"
    return due[:room], len(due[room:])


def _part_of(number: int, given: int | str, *, up: bool) -> int:
    """Return a number of replicas, or a part of them such as "25%"."""
    if not isinstance(given, str):
        return given
    hundredths = number * int(given.removesuffix("%"))
    return -(-hundredths // 100) if up else hundredths // 100


def _note_unplaceable(
    d: ManagedDeployment, replicas: list[Replica], found: Unplaceable
) -> int:
    hint = ""
    mine = d.former is not None and d.name in found.holders
    if d.former is not None and mine:
        hint = "; its old replicas give way where that makes room"
        if not _may_be_missing(d, d.former):
            hint = (
                "; its old replicas stop only after new ones run: make room for one "
                "more, set max_unavailable=1, or delete() it first"
            )
    for replica in replicas:
        replica.reason = f"waits for a worker: {found.reason}{hint}"
    return len(replicas) if mine else 0


def _has_no_surge(d: ManagedDeployment) -> bool:
    spec = d.target.spec
    surge = spec.max_surge
    return surge is not None and not _part_of(spec.num_replicas, surge, up=True)


def _may_be_missing(d: ManagedDeployment, former: Goal) -> int:
    """How many replicas fewer may serve while new code takes over."""
    given, before = d.target.spec.max_unavailable, former.spec.num_replicas
    if _has_no_surge(d):
        return max(1, _part_of(before, given or 0, up=False))
    if given is not None:
        return _part_of(before, given, up=False)
    # Where one more has room, none needs to be missing.
    there = sum(bool(r.worker) for r in d.replicas.values())
    return int(before > 1 and there <= before)


def _start(
    d: ManagedDeployment, goal: Goal, replica: Replica, view: WorkerView, this: Pass
) -> None:
    worker = view.address
    this.occupancy.send(view, d.name, goal.spec.resources)
    replica.worker = worker
    replica.host = view.host
    replica.spec = goal.spec
    replica.config_generation = goal.config_generation
    replica.watched = goal.spec.watch
    reason = f"waiting for a free thread on {worker}"
    replica.enter(ReplicaState.STARTING, reason, this.now)
    d.shared.actions.append(
        StartReplica(
            replica.replica_id,
            replica.tag,
            worker,
            goal.spec,
            goal.config_generation,
        )
    )


def _most_that_may_go(d: ManagedDeployment, former: Goal, serving: int) -> int:
    """How many old replicas may end if `serving` are to be left, old and new.

    The last old one goes only to the last new one: more of them might find no room
    ever, and the deployment would have nothing left to go back to.
    """
    old, new = d.running(former), d.running(d.target)
    missing = d.target.spec.num_replicas - d.ready(d.target)
    return min(len(old) + len(new) - serving, len(old) - (missing > 1))


def _take_turns(d: ManagedDeployment, former: Goal, held: int, this: Pass) -> bool:
    """Let old replicas end so that those come that ``max_surge`` holds back.

    Returns
    -------
    bool
        Whether any do: those that had no worker are gone at once.
    """
    olds = [r for r in d.replicas.values() if r.generation == former.generation]
    idle = [r for r in d.alive(former) if r.state != ReplicaState.RUNNING]
    going = sum(r.state == ReplicaState.STOPPING for r in olds)
    spec = d.target.spec
    serving = min(former.spec.num_replicas, spec.num_replicas)
    if spec.max_unavailable is not None or _has_no_surge(d):
        serving -= _may_be_missing(d, former)
    most = _most_that_may_go(d, former, serving)
    number = min(held - going - len(idle), most)
    # Those first that have to go anyway, then the newest.
    ranks = sorted(d.running(former), key=lambda r: (not r.outgoing, -r.replica_id))
    leaving = ranks[: max(0, number)]
    replaceable = idle and held > going and (d.running(d.target) or not ranks)
    if not leaving and not replaceable:
        return False
    d.target.rolling = True
    for replica in leaving:
        d.stop(replica, this.now)
    _stop_unwanted(d, d.upkeep(), this.now)
    return True


def _make_room(d: ManagedDeployment, former: Goal, crowded: int, this: Pass) -> None:
    """Let old replicas give way to new ones that have no room, one for one."""
    old, new = d.running(former), d.running(d.target)
    missing_too = _may_be_missing(d, former)
    if not new and not missing_too:
        return
    there = Counter(
        r.worker for r in d.replicas.values() if r.generation == former.generation
    )
    limit = _most_that_may_go(d, former, former.spec.num_replicas - missing_too)
    # What those that may go give back, and those that serve nobody as yet or any more.
    stays = Counter(r.worker for r in old)
    back = {w: n - max(0, stays[w] - max(0, limit)) for w, n in there.items()}
    helping = {w for w, n in back.items() if n and _helps(d, former, w, n, this)}
    useful = [r for r in d.alive(former) if r.worker in helping]
    # These hold room and serve nobody yet.
    idle = [r for r in useful if r.state != ReplicaState.RUNNING]
    going = sum(
        r.generation == former.generation and r.state == ReplicaState.STOPPING
        for r in d.replicas.values()
    )
    number = min(crowded - going - len(idle), limit)
    newest_first = [r for r in reversed(useful) if r.state == ReplicaState.RUNNING]
    if newest_first:
        worker = newest_first[0].worker
        one = there[worker] - stays[worker] + 1
        if not _helps(d, former, worker, one, this):
            newest_first = [r for r in newest_first if r.worker == worker]
            # It takes several of them, so many new ones cannot be waiting.
            number = min(limit, len(newest_first)) if number > 0 else number
    leaving = newest_first[: max(0, number)]
    if leaving or idle:
        d.target.rolling = True
        for replica in leaving:
            d.stop(replica, this.now)
        _stop_unwanted(d, d.upkeep(), this.now)


def _helps(
    d: ManagedDeployment, former: Goal, worker: str, there: int, this: Pass
) -> bool:
    """Whether a new replica fits on a worker once the old ones there are gone."""
    view = this.views.get(worker)
    if view is None:
        # A pending one, that is.
        return False
    spec = d.target.spec
    given_back = {
        name: there * amount for name, amount in former.spec.resources.items()
    }
    return (
        view.accepting
        and view.leaving is None
        and matches(view, spec.workers)
        and fits(view, spec.resources, this.occupancy, given_back)
    )


def _is_in_order(d: ManagedDeployment) -> bool:
    if d.deleting or d.target.in_progress:
        return False
    goal = d.target if d.target.reached else d.serving
    wanted = goal.spec.num_replicas if goal else 0
    return len(d.replicas) == wanted and all(
        goal is not None
        and r.generation == goal.generation
        and r.ready_for(goal)
        and not r.outgoing
        for r in d.replicas.values()
    )
