"""Which worker gets the next replica: plain values, no I/O, scheduler process.

What Dask tells about the workers comes in (:class:`WorkerView`) with what our own
replicas take there (:class:`Occupancy`); an address or a readable reason goes out.
Dask gives a task's resources back when the task ends, so it counts nothing for an
actor that merely exists; the counting for replicas is therefore done here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heapreplace
from operator import attrgetter
from typing import TypeAlias

# Resources are floats that users add up, as in three times 0.1 on a worker of 0.3.
_EPSILON = 1e-9
_MAX_LISTED = 5
#: Of workers that have no end, or none that matters.
LASTS = 8

#: How a worker compares with others for a deployment's next replica, the lowest being
#: the best; see `Search`.
Rank: TypeAlias = tuple[int, bool, int, int, int, int, int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """Why and when a worker leaves.

    Parameters
    ----------
    reason
        Half a sentence about the worker, such as ``"is retired"``.
    since
        When that was announced; time in seconds.
    deadline
        Until when it may be used.
    may_return
        Whether one like it may come back soon, as after ``--lifetime``.
    at_once
        Whether nothing need wait for what comes elsewhere, for nothing will.
    killed
        Whether its processes are killed then: it cannot wait for others.
    needs_s
        How long requests in each replica there may take, by its number. Where that is
        not known, it is the whole grace period.
    """

    reason: str
    since: float
    deadline: float
    may_return: bool = False
    at_once: bool = False
    killed: bool = False
    needs_s: Mapping[int, float] = field(default_factory=dict)

    def let_go_at(self, grace_s: float, replica_id: int | None = None) -> float:
        """When a replica has to stop taking requests, whatever is elsewhere.

        Parameters
        ----------
        grace_s
            Seconds that requests in it may take to end at most.
        replica_id
            Which one it is; None: something else.

        Returns
        -------
        float
            Time in seconds.
        """
        if self.at_once:
            return self.since
        need_s = (
            grace_s if replica_id is None else self.needs_s.get(replica_id, grace_s)
        )
        return self.deadline - min(need_s, grace_s, (self.deadline - self.since) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as the controller sees it at one moment.

    Parameters
    ----------
    address
        Address in Dask's form, such as ``tcp://10.0.0.1:4000``.
    host
        Host of that address.
    name
        Name of the worker, as text.
    nthreads
        Number of its threads.
    free_threads
        How many of them run no task now.
    resources
        Its Dask resources, as totals.
    accepting
        Whether it takes new work: running, neither paused nor closing.
    leaving
        Why and when it leaves; None if it stays.
    lasts
        How long its job goes on, roughly: the higher, the longer, up to `LASTS`. Below
        0 it ends so soon that any other is better.
    """

    address: str
    host: str
    name: str
    nthreads: int
    free_threads: int
    resources: Mapping[str, float]
    accepting: bool
    leaving: Leaving | None = None
    lasts: int = LASTS


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """There is no worker for a replica now.

    Parameters
    ----------
    reason
        What it waits for, readable by users.
    holders
        Names of the deployments that hold what is missing. Empty if nothing that
        they could give back would help.
    """

    reason: str
    holders: tuple[str, ...] = ()


@dataclass(slots=True)
class Occupancy:
    """What all our replicas take on each worker; kept current while placing."""

    #: Number of replicas per worker.
    load: Counter[str] = field(default_factory=Counter)
    #: Resources in use, per worker and resource.
    used: defaultdict[tuple[str, str], float] = field(
        default_factory=lambda: defaultdict(float)
    )
    #: Deployments that use them, likewise.
    holders: defaultdict[tuple[str, str], set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )
    #: Replicas sent since the views were taken; they will take a thread each.
    sent: Counter[str] = field(default_factory=Counter)
    #: All workers in the order that holds where a deployment has nothing yet.
    _ranks: list[Rank] | None = None

    def apart(self) -> Occupancy:
        """Return the same counts, for a look at other workers than this one's."""
        return replace(self, _ranks=None)

    def add(self, worker: str, name: str, resources: Mapping[str, float]) -> None:
        """Count a replica that is on a worker already.

        Parameters
        ----------
        worker
            Address of the worker.
        name
            Deployment of the replica.
        resources
            What the replica takes.
        """
        self.load[worker] += 1
        for resource, amount in resources.items():
            self.used[worker, resource] += amount
            self.holders[worker, resource].add(name)

    def send(self, view: WorkerView, name: str, resources: Mapping[str, float]) -> None:
        """Count a replica that is being sent to a worker right now.

        Parameters
        ----------
        view
            The worker.
        name
            Deployment of the replica.
        resources
            What the replica takes.
        """
        if self._ranks is not None:
            del self._ranks[bisect_left(self._ranks, self.rank(view))]
        self.add(view.address, name, resources)
        self.sent[view.address] += 1
        if self._ranks is not None:
            insort(self._ranks, self.rank(view))

    def rank(
        self, view: WorkerView, failures: int = 0, own_host: int = 0, own: int = 0
    ) -> Rank:
        """Compare a worker with others, for a deployment's next replica.

        Parameters
        ----------
        view
            The worker.
        failures
            How often the deployment's constructor failed there.
        own_host
            Number of replicas of the deployment on its host.
        own
            Number of replicas of the deployment on the worker itself.

        Returns
        -------
        tuple
            The lower, the better.
        """
        address = view.address
        busy = view.free_threads <= self.sent[address]
        last = 2 if view.leaving else int(view.lasts < 0)
        load = self.load[address]
        return last, busy, failures, own_host, own, -view.lasts, load, address

    def ranks(self, views: Mapping[str, WorkerView]) -> list[Rank]:
        """Rank all workers as for a deployment that has nothing anywhere.

        Parameters
        ----------
        views
            The workers of the cluster by address; the same ones each time.

        Returns
        -------
        list of tuple
            In order; the caller's own.
        """
        if self._ranks is None:
            self._ranks = sorted(self.rank(view) for view in views.values())
        return self._ranks.copy()

    def free(self, view: WorkerView, resource: str) -> float:
        """How much of a resource our replicas leave on a worker.

        Parameters
        ----------
        view
            The worker.
        resource
            Name of the resource.

        Returns
        -------
        float
            Total minus what is used; 0 if the worker has none.
        """
        used = self.used.get((view.address, resource), 0.0)
        return view.resources.get(resource, 0.0) - used


class Search:
    """The search for workers for one deployment's replicas, one after the other.

    Of the workers that match and have room, the first in this order is taken:

    0. one that stays, then one whose time ends soon, then one that leaves but is the
       last to do so (`lender`);
    1. one with a free thread: without, the actor is not even created until some task
       ends, which may take hours. A replica that serves now is worth more than a
       better spread, so this goes before everything else;
    2. where the constructor failed least often;
    3. on the host with the fewest replicas of this deployment (a host dies whole);
    4. with the fewest replicas of this deployment itself;
    5. whose job goes on for longest, roughly;
    6. with the fewest replicas of all deployments;
    7. the lowest address, so that the outcome is predictable.

    Parameters
    ----------
    resources
        Amounts that each replica needs on one worker.
    workers
        Addresses, hosts or names that are allowed, as in Dask. Empty: all.
    views
        The workers of the cluster by address.
    occupancy
        What all replicas take.
    own
        Number of replicas of this deployment (and of its generation) per worker.
    own_hosts
        The same per host.
    failures
        How often the constructor failed per worker.
    lender
        A worker that leaves and is to be used all the same.
    """

    def __init__(
        self,
        *,
        resources: Mapping[str, float],
        workers: tuple[str, ...],
        views: Mapping[str, WorkerView],
        occupancy: Occupancy,
        own: Mapping[str, int],
        own_hosts: Mapping[str, int],
        failures: Mapping[str, int],
        lender: str | None = None,
    ) -> None:
        self._lender = lender
        self._resources = resources
        self._workers = workers
        self._views = views
        self._occupancy = occupancy
        self._own = own
        self._own_hosts = own_hosts
        self._failures = failures
        # Ranks only ever rise while replicas are placed, so each of these is at most
        # what it would be if looked at again. Thus only what comes to the top of the
        # heap needs a look, and not all workers for each replica.
        self._heap = occupancy.ranks(views)

    def next(self) -> str | Unplaceable:
        """Choose the worker for the next replica.

        What is placed there is to be counted, in `Occupancy.send` and the other counts,
        before this is called again.

        Returns
        -------
        str or Unplaceable
            The worker's address, or the reason why there is none.
        """
        heap = self._heap
        while heap:
            view = self._views[heap[0][-1]]
            if not self._has_room(view):
                heappop(heap)
                continue
            rank = self._rank(view)
            if rank == heap[0]:
                return view.address
            heapreplace(heap, rank)
        return _why_nowhere(
            self._resources, self._workers, self._views, self._occupancy
        )

    def _has_room(self, view: WorkerView) -> bool:
        return (
            view.accepting
            and (view.leaving is None or view.address == self._lender)
            and matches(view, self._workers)
            and fits(view, self._resources, self._occupancy, {})
        )

    def _rank(self, view: WorkerView) -> Rank:
        return self._occupancy.rank(
            view,
            self._failures.get(view.address, 0),
            self._own_hosts.get(view.host, 0),
            self._own.get(view.address, 0),
        )


def matches(view: WorkerView, workers: tuple[str, ...]) -> bool:
    """Whether a worker is allowed by a restriction.

    Parameters
    ----------
    view
        The worker.
    workers
        Addresses (with or without protocol), hosts or names. Empty: all.

    Returns
    -------
    bool
        True if it is.
    """
    if not workers:
        return True
    bare = view.address.partition("://")[2]
    return not {view.address, bare, view.host, view.name}.isdisjoint(workers)


def fits(
    view: WorkerView,
    resources: Mapping[str, float],
    occupancy: Occupancy,
    given_back: Mapping[str, float],
) -> bool:
    """Whether a worker has room, once some resources are given back there.

    Parameters
    ----------
    view
        The worker.
    resources
        Amounts needed.
    occupancy
        What all replicas take now.
    given_back
        Amounts that would be released. Empty: none.

    Returns
    -------
    bool
        True if all of them fit.
    """
    return all(
        occupancy.free(view, resource) + given_back.get(resource, 0.0)
        >= amount - _EPSILON
        for resource, amount in resources.items()
    )


def _why_nowhere(
    resources: Mapping[str, float],
    workers: tuple[str, ...],
    views: Mapping[str, WorkerView],
    occupancy: Occupancy,
) -> Unplaceable:
    """Filter step by step, so that the reason names the step that left nothing."""
    if not views:
        return Unplaceable("no worker on the cluster")
    matching = [v for v in views.values() if matches(v, workers)]
    if not matching:
        known = _listed(f"{v.address} ({v.name})" for v in _sorted(views.values()))
        return Unplaceable(f"no worker matches workers={workers!r}; there are {known}")
    offering = [v for v in matching if offers(v, resources)]
    if not offering:
        return Unplaceable(_nobody_offers(resources, matching, restricted=workers))
    accepting = [v for v in offering if v.accepting]
    if not accepting:
        known = _listed(v.address for v in _sorted(offering))
        reason = f"paused, closing or silent: {known}, and no other worker will do"
        return Unplaceable(reason)
    staying = [v for v in accepting if v.leaving is None]
    if not staying:
        known = _listed(v.address for v in _sorted(accepting))
        return Unplaceable(f"about to leave: {known}, and no other worker will do")
    return _crowded(resources, staying, occupancy)


def offers(view: WorkerView, resources: Mapping[str, float]) -> bool:
    """Whether a worker has enough in principle, if nothing of it is in use.

    Parameters
    ----------
    view
        The worker.
    resources
        Amounts needed.

    Returns
    -------
    bool
        True if it has.
    """
    return all(
        view.resources.get(name, 0.0) >= amount - _EPSILON
        for name, amount in resources.items()
    )


def _nobody_offers(
    resources: Mapping[str, float],
    views: list[WorkerView],
    *,
    restricted: tuple[str, ...],
) -> str:
    wish = ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
    facts = []
    for name in resources:
        amounts = [v.resources[name] for v in views if v.resources.get(name, 0.0) > 0]
        fact = f"{len(amounts)} of {len(views)} workers have {name}"
        facts.append(f"{fact}, at most {max(amounts):g}" if amounts else fact)
    among = f" among workers={restricted!r}" if restricted else ""
    return (
        f"no worker{among} offers {wish} ({'; '.join(facts)}); "
        f"start one with `dask worker --resources '{wish.replace(',', '')}'`"
    )


def _crowded(
    resources: Mapping[str, float], views: list[WorkerView], occupancy: Occupancy
) -> Unplaceable:
    """Say which resources are short on the workers that have them in principle."""
    short = [
        name
        for name, amount in resources.items()
        if not any(fits(v, {name: amount}, occupancy, {}) for v in views)
    ]
    # Each may be free somewhere, though all of them on no single worker.
    short = short or list(resources)
    texts = []
    all_holders: set[str] = set()
    for name in short:
        holders = _holders(name, views, occupancy)
        if holders:
            all_holders |= holders
            texts.append(_in_use(name, resources[name], views, occupancy, holders))
    return Unplaceable("; ".join(texts), tuple(sorted(all_holders)))


def _holders(name: str, views: list[WorkerView], occupancy: Occupancy) -> set[str]:
    held = (occupancy.holders.get((v.address, name), set()) for v in views)
    return set().union(*held)


def _in_use(
    name: str,
    amount: float,
    views: list[WorkerView],
    occupancy: Occupancy,
    holders: set[str],
) -> str:
    free = [occupancy.free(v, name) for v in views]
    total = sum(v.resources.get(name, 0.0) for v in views)
    if max(free) <= _EPSILON:
        what = f"all {name} in use"
    else:
        most = f"asked for {amount:g}, at most {max(free):g} free"
        what = f"too little {name} free on one worker ({most})"
    held = total - sum(free)
    who = _listed(sorted(holders))
    return f"{what}: {held:g} of {total:g} held by replicas of {who}"


def _sorted(views: Iterable[WorkerView]) -> list[WorkerView]:
    return sorted(views, key=attrgetter("address"))


def _listed(items: Iterable[str]) -> str:
    names = list(items)
    rest = len(names) - _MAX_LISTED
    shown = ", ".join(names[:_MAX_LISTED])
    return f"{shown} and {rest} more" if rest > 0 else shown
