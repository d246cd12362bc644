"""Apps: several deployments that come and go together. Scheduler.

Each carries the app's name and its place in it, callees before callers; there is no
other record of apps. Callees are deployed before callers, and callers deleted before
callees. If one fails, what a run had changed is put back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from daskserve.controller.actions import Failure
from daskserve.controller.records import Spec

logger = logging.getLogger(__name__)

#: A wish, and the version that must be there now.
Wish = tuple[Spec, str | None]


class Deployer(Protocol):
    """What `Apps` asks of the instance."""

    async def deploy(self, spec: Spec, prev_version: str | None) -> Failure | None:
        """Want a deployment and wait until that is settled."""

    async def delete(self, name: str) -> Failure | None:
        """Want a deployment to be gone and wait until it is."""

    def names(self) -> list[str]:
        """Return the names of all deployments."""

    def spec(self, name: str) -> Spec:
        """Return what is wanted of a deployment."""

    def check_route(self, spec: Spec) -> None:
        """Raise `ValueError` if another deployment has the route prefix."""


class _Run:
    """A run in progress, and what was there before it."""

    def __init__(self, former: dict[str, Spec]) -> None:
        self.former = former


class Apps:
    """The apps of an instance.

    Parameters
    ----------
    deployer
        The instance.
    """

    def __init__(self, deployer: Deployer) -> None:
        self._deployer = deployer
        self._runs: dict[str, _Run] = {}

    def names(self, app: str) -> list[str]:
        """Return the names of an app's deployments, the ingress last.

        Raises
        ------
        KeyError
            There is no such app.
        """
        parts = self._parts(app)
        if not parts:
            specs = map(self._deployer.spec, self._deployer.names())
            there_are = sorted({spec.app for spec in specs if spec.app is not None})
            raise KeyError(
                f"no app named {app!r}; there are: {', '.join(there_are) or 'none'}"
            )
        return [spec.name for spec in parts]

    def kept_together(self, spec: Spec) -> Spec:
        """Return the wish for a single deployment, which stays in the app it is in."""
        if spec.app is None and spec.name in self._deployer.names():
            there = self._deployer.spec(spec.name)
            return replace(spec, app=there.app, app_place=there.app_place)
        return spec

    async def run(self, app: str, stages: Sequence[Sequence[Wish]]) -> Failure | None:
        """Deploy an app, in the place of what there may be of it.

        Parameters
        ----------
        app
            Its name.
        stages
            Callees first; those of a stage are deployed at once.

        Raises
        ------
        ValueError
            A name or the route prefix is held by something else; nothing was deployed.
        """
        wishes = [wish for stage in stages for wish in stage]
        self._check(app, [spec for spec, _ in wishes])
        before = self._runs.get(app)
        if before is None:
            former = {spec.name: spec for spec in self._parts(app)}
        else:  # it has been superseded: what it had changed is not what was there
            former = before.former
        run = self._runs[app] = _Run(former)
        try:
            for stage in stages:
                failure = await self._deploy(stage)
                if failure is not None:
                    if self._runs.get(app) is run:
                        failure = await self._put_back(app, run, failure)
                    return failure
                if self._runs.get(app) is not run:
                    text = f"superseded by another run() or delete() of app {app!r}"
                    return Failure("DeploymentFailedError", text)
            wanted = {spec.name for spec, _ in wishes}
            return await self._delete(
                spec.name for spec in self._parts(app) if spec.name not in wanted
            )
        finally:
            if self._runs.get(app) is run:
                del self._runs[app]

    async def delete(self, app: str) -> Failure | None:
        """Delete an app, callers before callees.

        Raises
        ------
        KeyError
            There is no such app.
        """
        names = self.names(app)
        self._runs.pop(app, None)
        return await self._delete(names)

    async def delete_all(self) -> None:
        """Delete all apps, each with its callers before their callees."""
        specs = map(self._deployer.spec, self._deployer.names())
        apps = {spec.app for spec in specs if spec.app is not None}
        await asyncio.gather(*map(self.delete, apps))

    # Parts.

    def _parts(self, app: str) -> list[Spec]:
        specs = map(self._deployer.spec, self._deployer.names())
        parts = [spec for spec in specs if spec.app == app]
        return sorted(parts, key=lambda spec: spec.app_place)

    def _check(self, app: str, specs: Sequence[Spec]) -> None:
        there = self._deployer.names()
        for spec in specs:
            if spec.name in there:
                other = self._deployer.spec(spec.name).app
                if other != app:
                    whose = "no app" if other is None else f"app {other!r}"
                    raise ValueError(
                        f"deployment {spec.name!r} is there and belongs to {whose}: "
                        f"delete it, or give the one in app {app!r} another name"
                    )
        self._deployer.check_route(specs[-1])

    async def _deploy(self, wishes: Iterable[Wish]) -> Failure | None:
        """Deploy a stage; return as soon as one of it has failed."""
        tasks = [
            asyncio.ensure_future(self._deployer.deploy(spec, prev_version))
            for spec, prev_version in wishes
        ]
        for next_done in asyncio.as_completed(tasks):
            try:
                failure = await next_done
            except (ValueError, KeyError) as err:  # as of a `prev_version`
                failure = Failure(type(err).__name__, str(err.args[0]))
            if failure is not None:
                for task in tasks:  # whoever else fails says so in its status
                    task.add_done_callback(_look_away)
                return failure
        return None

    async def _put_back(self, app: str, run: _Run, failure: Failure) -> Failure:
        """Undo what a run has changed; what ran before goes on."""
        parts = self._parts(app)
        problem = await self._delete(
            spec.name for spec in parts if spec.name not in run.former
        )
        changed = [
            former
            for spec in parts
            if (former := run.former.get(spec.name)) is not None and former != spec
        ]
        if self._runs.get(app) is run:
            problem = await self._deploy((spec, None) for spec in changed) or problem
        if problem is None:
            return failure
        logger.error("App %s could not be put back: %s", app, problem.text)
        note = f"What was there before could not be put back:\n{problem.text}"
        return replace(failure, text=f"{failure.text}\n\n{note}")

    async def _delete(self, names: Iterable[str]) -> Failure | None:
        """Delete deployments one after the other, the last one first."""
        problem = None
        for name in reversed(list(names)):
            try:
                problem = await self._deployer.delete(name) or problem
            except KeyError:
                logger.debug("deployment %s was deleted meanwhile", name)
        return problem


def _look_away(task: asyncio.Task[Failure | None]) -> None:
    if not task.cancelled():
        task.exception()
