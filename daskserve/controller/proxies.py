"""Which workers bind an HTTP server: a plain function, no I/O, scheduler process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from daskserve.controller.placement import WorkerView

#: How long a server on a worker that leaves needs at most to be rid of its clients.
DRAIN_S = 5.0
#: And how much longer than requests in its worker's replicas take.
_SPARE_S = 1.0

#: Stands for a server in a thread of its own in the scheduler process.
SCHEDULER = "scheduler"

_LOOPBACK = "loopback"


def desired_proxies(
    *,
    location: str | None,
    enabled: bool,
    one_per_host: bool = False,
    scheduler_hosts: frozenset[str],
    views: Mapping[str, WorkerView],
    current: Collection[str],
    now: float = 0.0,
) -> set[str]:
    """Decide who should run an HTTP server.

    Parameters
    ----------
    location
        ``"HeadOnly"``: exactly one, on the scheduler's host. ``"EveryNode"``: every
        worker, paused ones too, for they still serve what they have.
        ``"NoServer"`` or None: nobody.
    enabled
        False: nobody, whatever the location (``host=None``).
    one_per_host
        Whether workers of one host cannot share an address: a Unix socket's.
    scheduler_hosts
        All names and addresses of the scheduler's host.
    views
        The workers of the cluster by address.
    current
        Who runs one now: addresses of workers and :data:`SCHEDULER`.
    now
        Time in seconds.

    Returns
    -------
    set of str
        Addresses of workers, or :data:`SCHEDULER`.

    Raises
    ------
    ValueError
        If the location is none of those.
    """
    if location not in ("HeadOnly", "EveryNode", "NoServer", None):
        raise ValueError(
            f"location={location!r} is not one of "
            "'HeadOnly', 'EveryNode', 'NoServer', None"
        )
    if not enabled or location in ("NoServer", None):
        return set()
    if views and all(v.leaving and v.leaving.at_once for v in views.values()):
        return {SCHEDULER} & set(current)
    if location == "EveryNode" and one_per_host:
        hosts = {view.host for view in views.values()}
        return {_one_of(host, views, current) for host in hosts}
    if location == "EveryNode":
        return {a for a, view in views.items() if _goes_on(view, views, current, now)}
    return {_head(scheduler_hosts, views, current)}


def reachable_url(url: str, host: str) -> str:
    """Return a server's URL with `host` for an address that stands for all it has."""
    parts = urlsplit(url)
    if parts.hostname not in ("0.0.0.0", "::"):
        return url
    name = f"[{host}]" if ":" in host else host
    return parts._replace(netloc=f"{name}:{parts.port}").geturl()


def _head(
    scheduler_hosts: frozenset[str],
    views: Mapping[str, WorkerView],
    current: Collection[str],
) -> str:
    """Pick one; what runs already stays, so that its port does not move."""
    if SCHEDULER in current:
        return SCHEDULER
    hosts = {_canonical(host) for host in scheduler_hosts}
    # A worker known by a loopback address can only be on the scheduler's own host.
    hosts.add(_LOOPBACK)
    local = [
        view
        for view in views.values()
        if view.leaving is None and _canonical(view.host) in hosts
    ]
    holding = [view.address for view in local if view.address in current]
    willing = [view.address for view in local if view.accepting]
    return min(holding or willing, default=SCHEDULER)


def _one_of(
    host: str, views: Mapping[str, WorkerView], current: Collection[str]
) -> str:
    there = [view for view in views.values() if view.host == host]
    there = [view for view in there if view.leaving is None] or there
    holding = [view.address for view in there if view.address in current]
    return min(holding or [view.address for view in there])


def _goes_on(
    view: WorkerView,
    views: Mapping[str, WorkerView],
    current: Collection[str],
    now: float,
) -> bool:
    """Whether a worker is to serve, though it may be about to leave.

    The last one of its host goes on while another may come, or as long as there is no
    other worker at all, for somebody has to hold the port.
    """
    leaving = view.leaving
    if leaving is None:
        return True
    need_s = max(leaving.needs_s.values(), default=DRAIN_S) + _SPARE_S
    if view.address not in current:
        return False
    if now >= leaving.let_go_at(min(DRAIN_S, need_s)):
        return False
    rank = (leaving.deadline, leaving.since, view.address)
    for other in views.values():
        if other.host != view.host or other.address not in current:
            continue
        after = other.leaving
        if after is None or (after.deadline, after.since, other.address) > rank:
            return False
    return leaving.may_return or all(other.leaving for other in views.values())


def _canonical(host: str) -> str:
    """Give all spellings of one host the same text."""
    bare = host.strip("[]").lower()
    if bare == "localhost":
        return _LOOPBACK
    try:
        address = ip_address(bare)
    except ValueError:
        return bare
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return _LOOPBACK if address.is_loopback else str(address)
