"""The functions by which users run apps of several deployments. Any process."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias, cast

from distributed import Future

from daskserve import local as local_apps
from daskserve.arguments import finished
from daskserve.composition import (
    DEFAULT_APP,
    Application,
    MakePickler,
    Node,
    build,
    qualified,
)
from daskserve.config import DEFAULT, Default
from daskserve.controller.records import Spec
from daskserve.deployment import Deployment
from daskserve.handle import DeploymentHandle
from daskserve.session import Session, current_session

#: What is wanted, the Dask futures among its arguments, and its ``prev_version``.
Made: TypeAlias = tuple[Spec, list[Future[Any]], str | None]


def run(
    target: Application,
    *,
    name: str = DEFAULT_APP,
    route_prefix: str | Default | None = DEFAULT,
    local: bool = False,
) -> DeploymentHandle:
    """Deploy an app, all that is bound in it, and return a handle of its ingress.

    Callees are deployed before their callers. An app that runs already is updated:
    deployments whose version and arguments are the same stay, others are replaced, and
    those that are not part of it any more are deleted.

    Parameters
    ----------
    target
        What `Deployment.bind` returned: the ingress.
    name
        The app's name. Deployments of all apps but ``"default"`` have it before their
        own names, as in ``"shop:Model"``.
    route_prefix
        Where HTTP finds the ingress; None: nowhere. Default: the deployment's own, and
        ``"/"`` if it has none. Only the ingress has a route.
    local
        Run all in this process, without a cluster and without HTTP, on threads where
        breakpoints work: for tests. The handle is used as ever.

    Returns
    -------
    DeploymentHandle
        With an asynchronous client, an awaitable of one.

    Raises
    ------
    DeploymentFailedError
        A deployment does not start. What was new is deleted, and what was there before
        goes on.
    ValueError
        Bound deployments lead back to themselves; a name or the route prefix is held by
        something else. Nothing has been deployed.
    PicklingError
        An argument cannot travel. Nothing has been deployed.

    Examples
    --------
    >>> app = Ingress.bind(Model.bind("v1"), threshold=0.5)  # doctest: +SKIP
    >>> serve.run(app).remote(3).result()  # doctest: +SKIP
    """
    _check_bound(target)
    _check_name(name)
    if local:
        return local_apps.run(target, name)
    stages = _stages(target, name, route_prefix)
    session = current_session()
    return cast(DeploymentHandle, session.run(_run, session, name, stages))


def delete(name: str) -> Any:
    """Delete an app, callers before callees, and wait until it is gone.

    Requests that run may finish, within ``graceful_shutdown_timeout_s``.

    Raises
    ------
    KeyError
        There is no such app.
    """
    _check_name(name)
    if local_apps.delete(name):
        return None
    session = current_session()
    return session.run(_delete, session, name)


def get_app_handle(name: str = DEFAULT_APP) -> DeploymentHandle:
    """Return a handle of an app's ingress.

    Returns
    -------
    DeploymentHandle
        With an asynchronous client, an awaitable of one.

    Raises
    ------
    KeyError
        There is no such app.
    """
    _check_name(name)
    there = local_apps.get(name)
    if there is not None:
        return there.handle()
    session = current_session()
    return cast(DeploymentHandle, session.run(_app_handle, session, name))


def get_deployment_handle(
    deployment_name: str, app_name: str | None = None
) -> DeploymentHandle:
    """Return a handle of a deployment that is there.

    Parameters
    ----------
    deployment_name
        Its name, within the app if there is one.
    app_name
        The app that it is a part of; None: the name says all.

    Returns
    -------
    DeploymentHandle
        With an asynchronous client, an awaitable of one.

    Raises
    ------
    KeyError
        There is no such deployment.
    """
    if app_name is not None:
        _check_name(app_name)
        there = local_apps.get(app_name)
        if there is not None:
            return there.handle(qualified(app_name, deployment_name))
        deployment_name = qualified(app_name, deployment_name)
    session = current_session()
    return cast(
        DeploymentHandle, session.run(_deployment_handle, session, deployment_name)
    )


def _check_bound(target: object) -> None:
    if not isinstance(target, Application):
        hint = "which Deployment.bind() returns"
        if isinstance(target, Deployment):
            hint = f"{target.name}.bind(...)"
        raise TypeError(f"run() takes a bound deployment, {hint}; not {target!r}")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"name={name!r}: an app's name is a string that is not empty")
    if ":" in name:
        raise ValueError(f"name={name!r}: an app's name has no ':'")


def _stages(
    target: Application, app: str, route_prefix: str | Default | None
) -> list[list[Node[Made]]]:
    """Name and pickle all that is bound: all errors of what users wrote come here."""

    def make(node: Node[Made], pickler: MakePickler) -> Made:
        deployment: Deployment = node.application.deployment
        prefix = None
        if node.application is target:
            prefix = route_prefix
            if isinstance(prefix, Default):
                own = deployment._options.route_prefix
                prefix = "/" if isinstance(own, Default) else own
        named = deployment.options(name=node.name, route_prefix=prefix)
        return *named._spec(pickler), deployment.prev_version

    def handle(name: str) -> Any:
        return DeploymentHandle, (name,)

    return build(target, app, handle, make)


async def _run(
    session: Session, app: str, stages: list[list[Node[Made]]]
) -> DeploymentHandle:
    places = count()
    awaited: list[Future[Any]] = []

    def message(node: Node[Made]) -> dict[str, Any]:
        assert node.made is not None
        spec, futures, prev_version = node.made
        awaited.extend(futures)
        placed = replace(spec, app=app, app_place=next(places))
        return {"spec": placed.to_message(), "prev_version": prev_version}

    messages = [[message(node) for node in stage] for stage in stages]
    await finished(awaited)
    await session.rpc("serve_run", app=app, stages=messages)
    return DeploymentHandle(stages[-1][0].name)


async def _delete(session: Session, app: str) -> None:
    await session.rpc("serve_delete_app", app=app)


async def _app_handle(session: Session, app: str) -> DeploymentHandle:
    return DeploymentHandle((await session.rpc("serve_app", app=app))[-1])


async def _deployment_handle(session: Session, name: str) -> DeploymentHandle:
    await session.rpc("serve_get", name=name)
    return DeploymentHandle(name)
