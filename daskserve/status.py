"""What `serve.status()` returns: plain attributes, dicts and lists. Any process."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self

from daskserve import pickling
from daskserve.config import DeploymentOptions


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """The instance: its scheduler's address, whether it is detached, where HTTP is.

    `reason` says what is wrong with the state file, and which processes have hardly any
    files left to open; or "".
    """

    scheduler: str
    detached: bool
    location: str | None
    http_urls: list[str]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """One HTTP proxy; `state`: ``STARTING``, ``HEALTHY``, ``FAILED``, ``DRAINING``."""

    worker: str
    host: str
    url: str | None
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica.

    `state` is ``PENDING``, ``STARTING``, ``RUNNING`` or ``STOPPING``, and `reason` what
    it waits for; `since_s` the seconds that it has been so.
    """

    replica_id: int
    replica_tag: str
    worker: str | None
    host: str | None
    pid: int | None
    state: str
    reason: str
    since_s: float


@dataclass(frozen=True, slots=True)
class DeathStatus:
    """A replica that ended without having been told to, `ago_s` seconds ago."""

    replica_tag: str
    worker: str
    reason: str
    ago_s: float


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One deployment.

    `state` is ``UPDATING``, ``HEALTHY``, ``UNHEALTHY``, ``DEPLOY_FAILED`` or
    ``DELETING``; `reason` says why it is not ``HEALTHY``. `deaths` are the last ten.
    """

    state: str
    reason: str
    version: str | None
    route_prefix: str | None
    target_replicas: int
    running_replicas: int
    replicas: list[ReplicaStatus] = field(default_factory=list)
    deaths: list[DeathStatus] = field(default_factory=list)
    #: The app that it is a part of; see `daskserve.run`.
    app: str | None = None
    #: What the number of replicas follows, if it is not fixed, and what it asks for.
    autoscaling: str = ""


@dataclass(frozen=True, slots=True)
class ServeStatus:
    """Everything there is to know of an instance; prints as a table.

    Examples
    --------
    >>> status = serve.status()  # doctest: +SKIP
    >>> status.proxies[0].url, status.deployments["Counter"].state  # doctest: +SKIP
    ('http://127.0.0.1:8000', 'HEALTHY')
    """

    instance: InstanceStatus
    proxies: list[ProxyStatus]
    deployments: dict[str, DeploymentStatus]

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Self:
        """Make one of the controller's plain data."""
        return cls(
            _instance(message["instance"]),
            [ProxyStatus(**proxy) for proxy in message["proxies"]],
            {name: _deployment(d) for name, d in message["deployments"].items()},
        )

    def __str__(self) -> str:
        return "\n".join("".join(line) for line in self._lines())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _lines(self) -> list[list[str]]:
        kind = "detached" if self.instance.detached else "ends with its client"
        lines = [[f"daskserve on {self.instance.scheduler} ({kind})"]]
        lines += _reason(self.instance.reason, 2)
        if not self.proxies:
            lines.append(["  no HTTP server"])
        for proxy in self.proxies:
            where = proxy.url or "-"
            lines.append([f"  {where}  {proxy.state}  {proxy.worker}"])
            lines += _reason(proxy.reason, 4)
        if not self.deployments:
            lines.append(["  no deployments"])
        for name, deployment in self.deployments.items():
            lines += _deployment_lines(name, deployment)
        return lines


@dataclass(frozen=True, slots=True, repr=False)
class Version:
    """One version of a deployment that has served; see `daskserve.history`.

    `number` counts them, and is what ``Deployment.rollback`` takes; `when` it was
    reached, in local time.
    """

    name: str
    number: int
    version: str | None
    when: datetime
    num_replicas: int
    route_prefix: str | None
    current: bool
    _options: bytes

    @classmethod
    def from_message(cls, name: str, message: Mapping[str, Any]) -> Self:
        """Make one of the controller's plain data."""
        plain = dict(message)
        when = datetime.now().astimezone() - timedelta(seconds=plain.pop("ago_s"))
        return cls(name=name, when=when, _options=plain.pop("options"), **plain)

    @property
    def options(self) -> dict[str, Any]:
        """The options as they were given, by name.

        Raises
        ------
        PicklingError
            They need a module that is missing here.
        """
        options: DeploymentOptions = pickling.loads(self._options)
        return dict(options)

    def __repr__(self) -> str:
        current = ", current" if self.current else ""
        return (
            f"<{self.name} {self.number}: version {self.version!r}, "
            f"{self.num_replicas} replicas, {self.when:%Y-%m-%d %H:%M:%S}{current}>"
        )


def _deployment_lines(name: str, deployment: DeploymentStatus) -> list[list[str]]:
    count = f"{deployment.running_replicas}/{deployment.target_replicas}"
    version = "" if deployment.version is None else f"  version {deployment.version}"
    route = deployment.route_prefix or "no HTTP"
    app = "" if deployment.app is None else f"  app {deployment.app}"
    lines = [[f"  {name}  {deployment.state}  {count} replicas  {route}{version}{app}"]]
    lines += _reason(deployment.reason, 4)
    lines += _reason(deployment.autoscaling, 4)
    for replica in deployment.replicas:
        where = f"{replica.worker or '-'}  pid {replica.pid or '-'}"
        lines.append([f"    {replica.replica_tag}  {replica.state}  {where}"])
        lines += _reason(replica.reason, 6)
    for death in deployment.deaths:
        lines.append([f"    {death.replica_tag}  died {death.ago_s:.0f} s ago"])
        lines += _reason(death.reason, 6)
    return lines


def _reason(text: str, indent: int) -> list[list[str]]:
    return [[" " * indent, line] for line in text.rstrip().splitlines()]


def _instance(message: Mapping[str, Any]) -> InstanceStatus:
    return InstanceStatus(**{**message, "http_urls": list(message["http_urls"])})


def _deployment(message: Mapping[str, Any]) -> DeploymentStatus:
    return DeploymentStatus(
        **{
            **message,
            "replicas": [ReplicaStatus(**r) for r in message["replicas"]],
            "deaths": [DeathStatus(**d) for d in message["deaths"]],
        }
    )
