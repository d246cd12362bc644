"""The controller's brain: events and observed workers in, actions out.

Runs in the scheduler process, but knows neither `distributed` nor a clock nor chance:
all of that is passed in. The plugin calls the events as they come, then
:meth:`ControllerState.reconcile`, and carries out what that returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

from daskserve.controller import events, health, reports
from daskserve.controller.actions import Action, Settle
from daskserve.controller.autoscaling import with_number
from daskserve.controller.deployment_state import ManagedDeployment, Shared
from daskserve.controller.goals import begin_delete, set_goal
from daskserve.controller.load import LoadBoard
from daskserve.controller.placement import WorkerView
from daskserve.controller.records import Goal, Replica, Spec
from daskserve.controller.rollout import Pass, advance, is_at_rest, observe
from daskserve.controller.saved import SavedDeployment, revive, saved
from daskserve.controller.scaler import Ask, missing_workers, scale
from daskserve.controller.spreading import Spreader


def default_max_failures(num_replicas: int) -> int:
    """How many failed constructors a ``deploy()`` may see.

    Parameters
    ----------
    num_replicas
        Number of replicas wanted.

    Returns
    -------
    int
        Three per replica, but 20 at most.
    """
    return min(20, 3 * num_replicas)


class ControllerState:
    """All deployments of an instance, and what to do about them.

    Parameters
    ----------
    new_suffix
        Makes the end of a replica's tag: about six random-looking characters.
    first_id
        Number of the first replica.
    max_failures
        How many failed constructors a ``deploy()`` may see, by ``num_replicas``.
    spread_after_s
        How long after a worker has come replicas spread. None: never.
    trial_s
        For how many seconds the first replica of new code starts alone.
    """

    def __init__(
        self,
        *,
        new_suffix: Callable[[], str],
        first_id: int = 1,
        max_failures: Callable[[int], int] = default_max_failures,
        spread_after_s: float | None = None,
        trial_s: float = 0.0,
    ) -> None:
        self._shared = Shared(
            ids=count(first_id),
            new_suffix=new_suffix,
            max_failures=max_failures,
            trial_s=trial_s,
        )
        self._tickets = count(1)
        self._live: dict[str, ManagedDeployment] = {}
        #: Deleted ones with replicas left; names may come twice and be live again.
        self._draining: list[ManagedDeployment] = []
        self._shutdown_tickets: list[int] = []
        self.spreader = Spreader(spread_after_s)

    # Wishes

    def deploy(self, spec: Spec, *, prev_version: str | None, now: float) -> int:
        """Want a deployment to be so.

        Parameters
        ----------
        spec
            The wish.
        prev_version
            The version that must be there now. None: whatever there is.
        now
            Time in seconds.

        Returns
        -------
        int
            A ticket that is settled when the outcome is known.

        Raises
        ------
        ValueError
            If the version is another, or another deployment has the route prefix.
        """
        there = self._live.get(spec.name)
        spec = with_number(spec, there.current.spec if there else None)
        self._check_version(spec.name, there, prev_version)
        self.check_prefix(spec)
        ticket = next(self._tickets)
        if there is not None:
            set_goal(there, spec, ticket, now)
            return ticket
        goal = Goal(
            spec=spec,
            generation=1,
            config_generation=1,
            tickets=[ticket],
            deadline=now + spec.deploy_timeout_s,
        )
        self._live[spec.name] = ManagedDeployment(
            name=spec.name, shared=self._shared, target=goal
        )
        return ticket

    def rollback(self, name: str, number: int | None, *, now: float) -> int:
        """Want a deployment to be as it was before.

        Parameters
        ----------
        name
            Its name.
        number
            Of the version. None: the former one, which is the one that serves as long
            as a ``deploy()`` after it has failed or is in progress.
        now
            Time in seconds.

        Returns
        -------
        int
            A ticket, as of `deploy`.

        Raises
        ------
        KeyError
            If there is no such deployment.
        ValueError
            If there is no such version, or as `deploy`.
        """
        d = self._there(name)
        if number is not None:
            spec = d.history.find(number, name)
        elif not d.target.reached and d.serving is not None:
            spec = d.serving.spec
        else:
            spec = d.history.former(name)
        return self.deploy(spec, prev_version=None, now=now)

    def _check_version(
        self, name: str, there: ManagedDeployment | None, wanted: str | None
    ) -> None:
        if wanted is None:
            return
        if there is None:
            raise ValueError(
                f"prev_version={wanted!r}, but there is no deployment {name!r}"
            )
        version = there.current.spec.version
        if version != wanted:
            raise ValueError(
                f"prev_version={wanted!r}, but deployment {name!r} "
                f"has version {version!r}"
            )

    def check_prefix(self, spec: Spec) -> None:
        """Refuse a route prefix that another deployment has.

        Parameters
        ----------
        spec
            The wish.

        Raises
        ------
        ValueError
            The text names the other one.
        """
        for other in self._live.values():
            if other.name != spec.name and spec.route_prefix in other.prefixes():
                raise ValueError(
                    f"route_prefix={spec.route_prefix!r} of {spec.name!r} is held by "
                    f"deployment {other.name!r}: take another, or delete that first"
                )

    def delete(self, name: str) -> int:
        """Want a deployment to be gone. One that drains already is waited for.

        Parameters
        ----------
        name
            Its name.

        Returns
        -------
        int
            A ticket that is settled when its last replica is gone.

        Raises
        ------
        KeyError
            If there is none.
        """
        d = self._live.pop(name, None)
        if d is not None:
            why = f"deployment {name!r} was deleted before its deploy() ended"
            begin_delete(d, why)
            self._draining.append(d)
        else:
            same = [other for other in self._draining if other.name == name]
            if not same:
                raise self._unknown(name)
            d = same[-1]
        ticket = next(self._tickets)
        d.delete_tickets.append(ticket)
        return ticket

    def shutdown(self) -> int:
        """Want everything to be gone.

        Returns
        -------
        int
            A ticket that is settled when nothing is left.
        """
        for d in self._live.values():
            why = f"the instance was shut down before the deploy() of {d.name!r} ended"
            begin_delete(d, why)
            self._draining.append(d)
        self._live.clear()
        ticket = next(self._tickets)
        self._shutdown_tickets.append(ticket)
        return ticket

    # Events; unknown and old numbers are ignored, for news may cross on the way

    def replica_initializing(
        self, replica_id: int, *, pid: int | None, now: float
    ) -> None:
        """Note that a replica's constructor has begun.

        Parameters
        ----------
        replica_id
            Number of the replica.
        pid
            Its process.
        now
            Time in seconds.
        """
        if found := self._find(replica_id):
            events.initializing(found[1], pid, now)

    def replica_started(
        self,
        replica_id: int,
        *,
        now: float,
        pid: int | None = None,
        direct: list[Any] | None = None,
        limit: int | None = None,
    ) -> None:
        """Note that a replica can take requests.

        Parameters
        ----------
        replica_id
            Number of the replica.
        now
            Time in seconds.
        pid
            Its process, if not told before.
        direct
            Host, port and secret of its own port, if it has one.
        limit
            How many requests to send it before it has said more; None: as many as may
            be.
        """
        if found := self._find(replica_id):
            events.started(*found, pid, now, direct, limit)

    def replica_failed(
        self, replica_id: int, text: str, cause: bytes | None = None, *, now: float
    ) -> None:
        """Note that a replica's constructor or first reconfigure raised.

        Parameters
        ----------
        replica_id
            Number of the replica.
        text
            The traceback.
        cause
            What was raised, pickled by the replica, if it can be.
        now
            Time in seconds.
        """
        if found := self._find(replica_id):
            events.failed(*found, text, cause, now)

    def replica_stopped(self, replica_id: int) -> None:
        """Note that a replica told to stop has ended.

        Parameters
        ----------
        replica_id
            Number of the replica.
        """
        if found := self._find(replica_id):
            events.stopped(*found)

    def replica_lost(self, replica_id: int, reason: str, *, now: float) -> None:
        """Note that a replica is gone, or must be given up.

        Parameters
        ----------
        replica_id
            Number of the replica.
        reason
            How, readable by users.
        now
            Time in seconds.
        """
        if found := self._find(replica_id):
            d, replica = found
            events.lost(d, [replica], reason, now, blame=True)

    def worker_lost(
        self, worker: str, reason: str, *, now: float, announced: bool = False
    ) -> None:
        """Note that a worker is gone; needed if it may be back under its address.

        Parameters
        ----------
        worker
            Its address.
        reason
            How, readable by users.
        now
            Time in seconds.
        announced
            Whether it was to leave: that is nobody's fault.
        """
        for d in self._all():
            there = [r for r in d.replicas.values() if r.worker == worker]
            if there:
                blame = not announced
                events.lost(d, there, reason, now, blame=blame, with_worker=True)

    def workers_silent(
        self, silent: Mapping[str, float], *, now: float
    ) -> list[tuple[str, int]]:
        """Give up what is on workers that say nothing, where patience has ended.

        Parameters
        ----------
        silent
            Addresses of workers, and for how many seconds they have said nothing.
        now
            Time in seconds.

        Returns
        -------
        list of (str, int)
            Worker and number of each replica given up; it may be there still.
        """
        found = (health.give_up_silent(d, silent, now) for d in self._all())
        return [lost for several in found for lost in several]

    def replica_ill(
        self, replica_id: int, *, fatal: bool, text: str, now: float
    ) -> None:
        """Note a health check that failed, or again one that did not.

        Parameters
        ----------
        replica_id
            Number of the replica.
        fatal
            Whether it must be replaced.
        text
            What is wrong; "" if it is well again.
        now
            Time in seconds.
        """
        if found := self._find(replica_id):
            health.note_trouble(*found, fatal, text, now)

    def all_lost(self, reason: str, *, now: float) -> None:
        """Note that every actor is gone, as after ``client.restart()``.

        Parameters
        ----------
        reason
            How, readable by users.
        now
            Time in seconds.
        """
        for d in self._all():
            sent = [r for r in d.replicas.values() if r.worker]
            if sent:
                events.lost(d, sent, reason, now, blame=False)

    def reconfigured(
        self, replica_id: int, config_generation: int, error: str | None, *, now: float
    ) -> None:
        """Note a replica's answer to ``ReconfigureReplica``.

        Parameters
        ----------
        replica_id
            Number of the replica.
        config_generation
            Which configuration the answer is about.
        error
            The traceback, or None if it went well.
        now
            Time in seconds.
        """
        if found := self._find(replica_id):
            events.reconfigured(*found, config_generation, error, now)

    def routing_known(self) -> None:
        """Note that everybody has what :meth:`routing` returned last."""
        for d in self._live.values():
            for replica_id, *_ in (d.routing or {}).get("replicas", ()):
                if replica_id in d.replicas:
                    d.replicas[replica_id].known = True

    def workers_in_use(self) -> set[str]:
        """Find where replicas are, stopping ones too.

        Returns
        -------
        set of str
            Addresses of workers.
        """
        return {r.worker for d in self._all() for r in d.replicas.values() if r.worker}

    def demands(self) -> list[tuple[Spec, Counter[str]]]:
        """Tell what all deployments need, and where they have it.

        Returns
        -------
        list of tuple
            Of each: what is wanted, and its number of replicas per worker.
        """
        return [
            (d.current.spec, Counter(r.worker for r in d.replicas.values() if r.worker))
            for d in self._live.values()
        ]

    def knows(self, replica_id: int) -> bool:
        """Whether a replica is one that is there for something.

        Parameters
        ----------
        replica_id
            Number of the replica.

        Returns
        -------
        bool
            False once it was released.
        """
        return self._find(replica_id) is not None

    def _find(self, replica_id: int) -> tuple[ManagedDeployment, Replica] | None:
        d = self._shared.owners.get(replica_id)
        if d is None or not d.replicas[replica_id].worker:
            return None
        return d, d.replicas[replica_id]

    def _all(self) -> list[ManagedDeployment]:
        return [*self._draining, *self._live.values()]

    def follow_load(
        self,
        loads: LoadBoard,
        queued: Mapping[str, int],
        ask: Ask,
        *,
        now: float,
    ) -> list[str]:
        """Want more or fewer replicas where the number follows the load.

        Parameters
        ----------
        loads
            Requests that wait or run, as reported.
        queued
            How many are known to wait, by deployment.
        ask
            Asks a deployment's policy.
        now
            Time in seconds.

        Returns
        -------
        list of str
            What has just gone wrong with policies.
        """
        troubles = [
            scale(d, loads.get(d.name, now), queued.get(d.name, 0), ask, now)
            for d in self._live.values()
            if d.target.spec.autoscaling or d.current.spec.autoscaling
        ]
        return [trouble for trouble in troubles if trouble is not None]

    def missing_workers(self, now: float, views: Mapping[str, WorkerView]) -> int:
        """Count the workers that replicas without room would fill.

        Parameters
        ----------
        now
            Time in seconds.
        views
            The workers of the cluster by address.

        Returns
        -------
        int
            0 if all have room, or more workers would not help.
        """
        return missing_workers(self._live.values(), views, now)

    # Outcome

    def reconcile(self, now: float, views: Mapping[str, WorkerView]) -> list[Action]:
        """Compare what is wanted with what is there.

        Parameters
        ----------
        now
            Time in seconds.
        views
            The workers of the cluster by address.

        Returns
        -------
        list
            What to do, in order. Asked again with nothing changed: nothing. Routing
            is as it should be before the calls named in ``Settle`` return.
        """
        everything = self._all()
        busy = [d for d in everything if not is_at_rest(d, views)]
        for d in busy:
            observe(d, now, views)
        this = Pass(now=now, views=views, deployments=everything)
        # What a version gave up for another is not for other deployments.
        for d in sorted(busy, key=lambda d: d.former is None):
            advance(d, this)
        moved = self.spreader.step(now, self._live, views, lambda: this.occupancy)
        if moved is not None:
            advance(moved, this)
        self._end_deletes()
        return self._shared.flush()

    def _end_deletes(self) -> None:
        gone = [d for d in self._draining if not d.replicas]
        self._draining = [d for d in self._draining if d.replicas]
        tickets = [ticket for d in gone for ticket in d.delete_tickets]
        if not self._draining:
            tickets += self._shutdown_tickets
            self._shutdown_tickets = []
        self._shared.settled += [Settle(ticket) for ticket in tickets]

    def routing(self) -> dict[str, Any]:
        """Describe where requests go, for proxies and handles.

        Returns
        -------
        dict
            ``routes`` (name by prefix) and ``deployments`` (by name: ``replicas`` as
            lists of number, tag, worker, own port and first limit, ``max_ongoing``,
            ``max_queued``, ``max_websockets``,
            ``timeout_s``, ``hopeless``). Plain values in a fixed
            order that depend on no clock: equal as long as nothing changes.
        """
        return reports.routing_of(self._live[name] for name in sorted(self._live))

    def status(self, *, now: float) -> dict[str, Any]:
        """Describe all deployments, those that drain too, for people.

        Parameters
        ----------
        now
            Time in seconds.

        Returns
        -------
        dict
            By name: ``state``, ``reason``, ``version``, ``route_prefix``,
            ``target_replicas``, ``running_replicas`` (that take requests),
            ``replicas``, ``deaths`` (the last ten) and ``autoscaling`` (what the
            number follows), all plain values.
        """
        return reports.status_of(self._live.values(), self._draining, now)

    def future_keys(self) -> set[Any]:
        """Return the keys of Dask's tasks whose values a version needs to start."""
        specs = [
            spec
            for d in self._live.values()
            for spec in (d.target.spec, *(v.spec for v in d.history.versions))
        ]
        return {key for spec in specs for key in spec.future_keys}

    def spec(self, name: str) -> Spec:
        """Look up what is wanted, or still serves if the last wish failed.

        Parameters
        ----------
        name
            Name of the deployment.

        Returns
        -------
        Spec
            The wish.

        Raises
        ------
        KeyError
            If there is none, or it is being deleted.
        """
        return self._there(name).current.spec

    def history(self, name: str, *, now: float) -> list[dict[str, Any]]:
        """Describe the versions of a deployment that have served, for people.

        Parameters
        ----------
        name
            Name of the deployment.
        now
            Time in seconds.

        Returns
        -------
        list of dict
            The last ten, the oldest first, as plain values; see `History.report`.

        Raises
        ------
        KeyError
            If there is no such deployment, or it is being deleted.
        """
        return self._there(name).history.report(now)

    def saved(self) -> tuple[SavedDeployment, ...]:
        """Take down what is wanted, for a scheduler after this one.

        Returns
        -------
        tuple of SavedDeployment
            Equal as long as nothing is wanted that was not.
        """
        return saved(self._live.values())

    def restore(self, deployments: Iterable[SavedDeployment], *, now: float) -> None:
        """Want what was wanted before; nothing is there yet.

        Parameters
        ----------
        deployments
            What `saved` took down.
        now
            Time in seconds.
        """
        for each in deployments:
            self._live[each.name] = revive(each, self._shared, now)

    def names(self) -> list[str]:
        """List the deployments that are not deleted.

        Returns
        -------
        list of str
            Their names, sorted.
        """
        return sorted(self._live)

    def _there(self, name: str) -> ManagedDeployment:
        if name not in self._live:
            raise self._unknown(name)
        return self._live[name]

    def _unknown(self, name: str) -> KeyError:
        known = ", ".join(self.names()) or "none"
        return KeyError(f"no deployment named {name!r}; there are: {known}")
