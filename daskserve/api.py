"""The functions that users call: start, connect, status, shutdown. Any process."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, cast

from distributed import Client

from daskserve import environment, local, pickling
from daskserve.config import DeploymentOptions, HTTPOptions
from daskserve.controller.plugin import NAME, ServeController
from daskserve.deployment import Deployment
from daskserve.exceptions import ServeConfigError, ServeNotRunningError
from daskserve.links import link
from daskserve.nanny import ServeNannyPlugin
from daskserve.session import ClientSession, Session, client_session, current_session
from daskserve.status import ServeStatus, Version
from daskserve.worker import ServeWorkerPlugin

logger = logging.getLogger(__name__)


class ServeInstance:
    """The instance of daskserve on a cluster; what `start` and `connect` return.

    A context manager, also with ``async with``: it shuts the instance down at its end.

    Attributes
    ----------
    http_urls : list of str
        The addresses that were bound; empty without an HTTP server.
    """

    def __init__(self, session: Session, info: Mapping[str, Any]) -> None:
        self._session = session
        self.http_urls: list[str] = list(info["http_urls"])
        self.detached: bool = info["detached"]

    def status(self) -> Any:
        """Return a `ServeStatus`, or an awaitable of one; see `daskserve.status`."""
        return self._session.run(_status, self._session)

    def shutdown(self) -> Any:
        """End the instance and all its deployments; may be called twice."""
        return self._session.run(_shutdown, self._session)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await _shutdown(self._session)

    def __repr__(self) -> str:
        urls = ", ".join(self.http_urls) or "no HTTP server"
        return f"<ServeInstance on {self._session.address}: {urls}>"

    def _repr_html_(self) -> str:
        links = ", ".join(link(f"{url}/-/routes", url) for url in self.http_urls)
        return (
            f"<b>daskserve</b> on <code>{html.escape(self._session.address)}</code>: "
            f"{links or 'no HTTP server'}"
        )


def start(
    client: Client | None = None,
    *,
    detached: bool = False,
    http_options: Mapping[str, Any] | None = None,
) -> ServeInstance:
    """Start daskserve on a Dask cluster, or connect to what runs there.

    There is one instance on a cluster. Starting again changes nothing that is deployed.

    Parameters
    ----------
    client
        The Dask client of the cluster; default: the current one. If there is none, a
        ``LocalCluster`` is started.
    detached
        Whether the instance outlives this client. If not, its deployments go when the
        client goes.
    http_options
        Where and how HTTP is served: ``host`` ("127.0.0.1"; None for no server),
        ``port`` (8000; 0 for any free one), ``location`` ("HeadOnly": on the
        scheduler's host, "EveryNode": on every worker, "NoServer" or None),
        ``root_path``, ``trusted_proxies``, ``middlewares``, ``request_timeout_s`` (60),
        ``keep_alive_timeout_s`` (90), ``max_request_body_bytes``, ``debug``,
        ``ssl_certfile``, ``ssl_keyfile``, ``ssl_keyfile_password``, ``ssl_ca_certs``,
        ``uds``, ``token``.

    Returns
    -------
    ServeInstance
        With an asynchronous client, an awaitable of one.

    Raises
    ------
    ProxyStartError
        An HTTP server could not be started: the text names worker, host and port.
        Nothing is left half-started.
    ServeConfigError
        An instance runs with other options: the text names the difference.
    EnvironmentMismatchError
        daskserve is missing on the scheduler or a worker, or of another version.
    ServeConfigError
        Plain HTTP would leave the machine of a cluster that has TLS.
    ValueError
        An option is unknown or its value is not allowed.

    Examples
    --------
    >>> client = Client("tcp://scheduler:8786")  # doctest: +SKIP
    >>> instance = serve.start(http_options={"port": 0})  # doctest: +SKIP
    >>> instance.http_urls  # doctest: +SKIP
    ['http://127.0.0.1:40513']
    """
    options = HTTPOptions.from_user(http_options)
    session = _session_for_start(client, detached)
    return cast(
        ServeInstance, session.run(_start, session, options, detached, http_options)
    )


def connect(client: Client | None = None) -> ServeInstance:
    """Connect to the instance that runs on a cluster.

    Parameters
    ----------
    client
        The Dask client of the cluster; default: the current one.

    Returns
    -------
    ServeInstance
        With an asynchronous client, an awaitable of one.

    Raises
    ------
    ServeNotRunningError
        None runs there.
    """
    session = current_session() if client is None else client_session(client)
    return cast(ServeInstance, session.run(_connect, session))


def shutdown() -> Any:
    """End the instance and all its deployments; may be called twice.

    Requests that run may finish, within their deployment's grace period. Dask actors
    that are not daskserve's are left alone. Apps that were run with ``local=True`` end
    too.
    """
    ended = local.shutdown()
    try:
        session = current_session()
    except ServeNotRunningError:
        if ended:
            return None
        raise
    return session.run(_shutdown, session)


def status() -> ServeStatus:
    """Return the state of the instance, its proxies, deployments and replicas.

    Returns
    -------
    ServeStatus
        With an asynchronous client, an awaitable of one.

    Raises
    ------
    ServeNotRunningError
        No instance runs.
    """
    session = current_session()
    return cast(ServeStatus, session.run(_status, session))


def get_deployment(name: str) -> Deployment:
    """Return what is deployed under a name.

    Parameters
    ----------
    name
        The deployment's name.

    Returns
    -------
    Deployment
        With an asynchronous client, an awaitable of one.

    Raises
    ------
    KeyError
        There is no such deployment.

    Examples
    --------
    >>> serve.get_deployment("Counter").options(num_replicas=4).deploy()
    ... # doctest: +SKIP
    """
    session = current_session()
    return cast(Deployment, session.run(_get_deployment, session, name))


def list_deployments() -> dict[str, Deployment]:
    """Return all deployments by name.

    Returns
    -------
    dict of str to Deployment
        With an asynchronous client, an awaitable of it.
    """
    session = current_session()
    return cast("dict[str, Deployment]", session.run(_list_deployments, session))


def history(name: str) -> list[Version]:
    """Return the last ten versions of a deployment that have served.

    Parameters
    ----------
    name
        The deployment's name.

    Returns
    -------
    list of Version
        The oldest first; the last one is what serves. With an asynchronous client, an
        awaitable of it.

    Raises
    ------
    KeyError
        There is no such deployment.

    Examples
    --------
    >>> serve.history("Counter")  # doctest: +SKIP
    [<Counter 1: version '1', 2 replicas, 2026-11-24 18:20:31>,
     <Counter 2: version '2', 2 replicas, 2026-11-24 18:31:07, current>]
    >>> Counter.rollback()  # doctest: +SKIP
    """
    session = current_session()
    return cast("list[Version]", session.run(_history, session, name))


def _session_for_start(client: Client | None, detached: bool) -> Session:
    if client is not None:
        if not isinstance(client, Client):
            raise TypeError(f"client={client!r} is not a distributed.Client")
        return client_session(client)
    try:
        return current_session()
    except ServeNotRunningError:
        pass
    session = client_session(Client())
    if detached:
        logger.warning(
            "detached=True, but the cluster at %s was started by this process and "
            "ends with it. Connect a Client to a cluster that runs on its own.",
            session.address,
        )
    return session


async def _start(
    session: Session,
    options: HTTPOptions,
    detached: bool,
    given: Mapping[str, Any] | None,
) -> ServeInstance:
    if not isinstance(session, ClientSession):  # inside the cluster: it runs
        return await _connect(session)
    client = session.client
    if options.exposed and not options.allow_plain_http:
        # A client's own address, as a gateway's, says nothing about the cluster.
        scheduler: Any = client.scheduler
        identity = await scheduler.identity(n_workers=0)
        _check_exposure(options, identity["address"])
    await environment.check(client)
    await client.register_plugin(ServeController(), name=NAME)
    info = await session.rpc(
        "serve_start",
        http={
            "options": pickling.dumps(options, what="http_options"),
            "enabled": options.server_enabled,
            "location": options.location,
            "host": options.host,
            "port": options.port,
            "uds": options.uds,
        },
        detached=detached,
        client=client.id,
        worker_plugin=environment.guarded(ServeWorkerPlugin()),
        nanny_plugin=environment.guarded(ServeNannyPlugin()),
    )
    if info["reason"]:
        logger.warning("%s", info["reason"])
    if not info["started"]:
        _check_same(info, options, detached, given)
    return ServeInstance(session, info)


def _check_exposure(options: HTTPOptions, scheduler: str) -> None:
    """Refuse to undo, by plain HTTP, what a cluster's TLS is there for."""
    if scheduler.startswith(("tls://", "wss://")):
        raise ServeConfigError(
            f"host={options.host!r} would serve HTTP beyond this machine without TLS, "
            f"from a cluster that has TLS ({scheduler}): give ssl_certfile and "
            f"ssl_keyfile, or allow_plain_http=True if that is meant"
        )


def _check_same(
    info: Mapping[str, Any],
    options: HTTPOptions,
    detached: bool,
    given: Mapping[str, Any] | None,
) -> None:
    """Refuse options that the running instance does not have."""
    running = pickling.loads(info["options"])
    assert isinstance(running, HTTPOptions)
    differences = [
        f"{name}: {theirs!r} runs, {ours!r} was asked for"
        for name, (ours, theirs) in options.difference(running).items()
        if name in (given or {})
    ]
    if detached and not info["detached"]:
        differences.append("detached: False runs, True was asked for")
    if differences:
        raise ServeConfigError(
            "an instance runs on this cluster with other options ("
            + "; ".join(differences)
            + "): call serve.shutdown() first, or leave the options out to connect"
        )


async def _connect(session: Session) -> ServeInstance:
    return ServeInstance(session, await session.rpc("serve_info"))


async def _status(session: Session) -> ServeStatus:
    return ServeStatus.from_message(await session.rpc("serve_status"))


async def _shutdown(session: Session) -> None:
    try:
        await session.rpc("serve_shutdown")
    except ServeNotRunningError:
        logger.debug("there was nothing to shut down on %s", session.address)
    if isinstance(session, ClientSession):
        await asyncio.to_thread(session.close)


async def _history(session: Session, name: str) -> list[Version]:
    found = await session.rpc("serve_history", name=name)
    return [Version.from_message(name, message) for message in found]


async def _get_deployment(session: Session, name: str) -> Deployment:
    return _deployment(await session.rpc("serve_get", name=name))


async def _list_deployments(session: Session) -> dict[str, Deployment]:
    found = await session.rpc("serve_list")
    return {name: _deployment(message) for name, message in found.items()}


def _deployment(message: Mapping[str, Any]) -> Deployment:
    options = pickling.loads(message["options"])
    assert isinstance(options, DeploymentOptions)
    return Deployment(message["code"], options)
