"""Which workers bind an HTTP server: a plain function, no I/O, scheduler process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from daskserve.controller.placement import WorkerView

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
    if location == "EveryNode" and one_per_host:
        hosts = {view.host for view in views.values()}
        return {_one_of(host, views, current) for host in hosts}
    if location == "EveryNode":
        return set(views)
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
    local = [view for view in views.values() if _canonical(view.host) in hosts]
    holding = [view.address for view in local if view.address in current]
    willing = [view.address for view in local if view.accepting]
    return min(holding or willing, default=SCHEDULER)


def _one_of(
    host: str, views: Mapping[str, WorkerView], current: Collection[str]
) -> str:
    there = [view.address for view in views.values() if view.host == host]
    return min((a for a in there if a in current), default=min(there))


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
