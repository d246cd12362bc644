"""Workers that are about to leave: noted, and forgotten. No I/O, scheduler process.

Who leaves is announced with a reason and a deadline. From then on nothing new is placed
there, and what is there moves elsewhere (:mod:`daskserve.controller.moving`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from daskserve.controller.placement import LASTS, Leaving, WorkerView, matches, offers
from daskserve.controller.records import Spec

#: How long a worker counts as leaving after the call that said so has ended: some are
#: closed only then. One that runs on for longer stays after all.
LINGER_S = 10.0
#: Workers that end within this time get new replicas only if no other will do; times
#: beyond are told apart by how often they are twice as long, and that up to `LASTS`.
NEAR_END_S = 600.0
#: A worker counts as ending, or as one to be replaced, for this part of its time at
#: most: jobs may be shorter than what usually comes before their end.
MOST_OF_IT = 0.25


@dataclass(frozen=True, slots=True)
class _End:
    """What a worker said of its end; times in seconds."""

    at: float
    leaving: Leaving
    #: From when on another worker is to be asked for.
    ask_at: float


@dataclass(slots=True)
class _Leave:
    leaving: Leaving
    #: Calls that wait until nothing of ours is left there.
    calls: int = 0
    #: When it is forgotten, if nothing calls.
    forget_at: float = float("inf")


class LeaveBoard:
    """Which workers leave, and until when they may be used.

    Parameters
    ----------
    margin_s
        Seconds before the end of its job at which what a worker serves moves.
    lead_s
        Seconds before that end at which another worker is asked for.
    """

    def __init__(self, margin_s: float = 60, lead_s: float = 300) -> None:
        self._margin_s = margin_s
        self._lead_s = lead_s
        self._leaves: dict[str, _Leave] = {}
        self._ends: dict[str, _End] = {}
        #: When each worker that ends was first heard of.
        self._known_since: dict[str, float] = {}

    def announce(self, worker: str, leaving: Leaving) -> None:
        """Note that a worker leaves, and that somebody waits for it.

        Parameters
        ----------
        worker
            Its address.
        leaving
            Why and until when. Of several, the one with the earliest deadline holds.
        """
        leave = self._leaves.get(worker)
        if leave is None:
            leave = self._leaves[worker] = _Leave(leaving)
        elif not leave.calls or leaving.deadline < leave.leaving.deadline:
            leave.leaving = leaving
        leave.calls += 1

    def let_be(self, worker: str, now: float) -> None:
        """Note that somebody does not wait any more; the last one starts the clock.

        Parameters
        ----------
        worker
            Its address.
        now
            Time in seconds.
        """
        leave = self._leaves.get(worker)
        if leave is not None:
            # Less than none for a call of before the worker was `gone`.
            leave.calls = max(0, leave.calls - 1)
            leave.forget_at = now + LINGER_S

    def __bool__(self) -> bool:
        return bool(self._leaves or self._ends)

    def ends(
        self,
        worker: str,
        *,
        in_s: float,
        killed_in_s: float,
        clock: str,
        now: float,
        needs_s: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        """Note that a worker knows when it ends.

        Parameters
        ----------
        worker
            Its address.
        in_s
            Seconds until its job ends.
        killed_in_s
            Seconds until it is killed; until then it goes on.
        clock
            When its job ends, as users read it.
        now
            Time in seconds.
        needs_s
            How long requests in its replicas may take, by the replica's number.
        """
        since = self._known_since.setdefault(worker, now)
        at = now + in_s
        most = (at - since) * MOST_OF_IT
        leaving = Leaving(
            reason=f"ends with its job at {clock}",
            since=at - min(self._margin_s, most),
            deadline=now + killed_in_s,
            killed=True,
            needs_s=needs_s,
        )
        self._ends[worker] = _End(at, leaving, at - min(self._lead_s, most))

    def never_ends(self, worker: str) -> None:
        """Note that a worker's job has no end, or none any more."""
        self._ends.pop(worker, None)

    def gone(self, worker: str) -> None:
        """Forget a worker that has left; one of its address may come.

        Parameters
        ----------
        worker
            Its address.
        """
        self._leaves.pop(worker, None)
        self._ends.pop(worker, None)
        self._known_since.pop(worker, None)

    def sweep(self, now: float, running: Collection[str]) -> None:
        """Forget those that stay after all.

        Parameters
        ----------
        now
            Time in seconds.
        running
            Workers that Dask lets run.
        """
        for worker, leave in list(self._leaves.items()):
            if not leave.calls and now >= leave.forget_at and worker in running:
                del self._leaves[worker]

    def get(self, worker: str, now: float) -> Leaving | None:
        """Look a worker up.

        Parameters
        ----------
        worker
            Its address.
        now
            Time in seconds.

        Returns
        -------
        Leaving or None
            None if it stays.
        """
        leave, end = self._leaves.get(worker), self._ends.get(worker)
        if end is None or now < end.leaving.since:
            return None if leave is None else leave.leaving
        if leave is None or end.leaving.deadline < leave.leaving.deadline:
            return end.leaving
        return leave.leaving

    def is_to_be_replaced(self, worker: str, now: float) -> bool:
        """Whether another worker is to be asked for, as this one is about to end."""
        leave, end = self._leaves.get(worker), self._ends.get(worker)
        if leave is not None and leave.leaving.killed:
            return True
        return end is not None and now >= end.ask_at

    def lasts(self, worker: str, now: float) -> int:
        """How long a worker's job goes on: a `WorkerView`'s ``lasts``."""
        end = self._ends.get(worker)
        left = math.inf if end is None else (end.at - now) / NEAR_END_S
        return -1 if left <= 1 else int(min(LASTS, math.log2(left)))


def addresses_of(wanted: Iterable[object], names: Mapping[str, str]) -> list[str]:
    """Find the workers that a call to retire some means.

    `SpecCluster` passes the names of its specs for addresses, and Dask then finds
    nobody, but the cluster closes them all the same. Where one spec stands for several
    workers, as a job with ``processes=2`` does, their names have a number behind it.

    Parameters
    ----------
    wanted
        Addresses, names, or what names begin with.
    names
        Names of the workers by address.

    Returns
    -------
    list of str
        Addresses of workers that are there.
    """
    wishes = {str(wish) for wish in wanted}
    known = {name for name in names.values()}
    groups = wishes - known - set(names)

    def is_meant(address: str, name: str) -> bool:
        group, dash, number = name.rpartition("-")
        if address in wishes or name in wishes:
            return True
        return bool(dash) and number.isdigit() and group in groups

    return [address for address, name in names.items() if is_meant(address, name)]


def needed_workers(
    demands: Iterable[tuple[Spec, Mapping[str, int]]],
    views: Mapping[str, WorkerView],
    proxies: Collection[str],
    ending: Collection[str] = (),
) -> set[str]:
    """Choose the workers that are to stay when a cluster is made smaller.

    As many as a deployment has replicas, so that they stay spread, and as few as
    possible over all deployments. Who holds one that takes resources stays, too.

    Parameters
    ----------
    demands
        Of each deployment: what is wanted, and its number of replicas per worker.
    views
        The workers of the cluster by address.
    proxies
        Workers with an HTTP server; better than others.
    ending
        Workers that are about to be replaced; worse than others.

    Returns
    -------
    set of str
        Addresses. All others can go, all at once.
    """
    needed: set[str] = set()
    most_first = sorted(demands, key=lambda demand: -demand[0].num_replicas)
    load: Counter[str] = Counter()
    for _, there in most_first:
        load.update(there)
    for spec, there in most_first:
        if spec.resources:
            needed.update(there)
            continue
        fit = [v.address for v in views.values() if _may_stay(v, spec)]
        ranks = [
            (
                a in ending,
                a not in needed,
                -there.get(a, 0),
                a not in proxies,
                -load[a],
                a,
            )
            for a in fit
        ]
        needed.update(a for *_, a in sorted(ranks)[: spec.num_replicas])
    return needed


def _may_stay(view: WorkerView, spec: Spec) -> bool:
    return (
        view.accepting
        and view.leaving is None
        and matches(view, spec.workers)
        and offers(view, spec.resources)
    )
