"""The routing table of a proxy: from a path to a deployment. Pure."""

from __future__ import annotations

from collections.abc import Mapping


class RouteTable:
    """Route prefixes and the deployments that hold them; never changed once made.

    Parameters
    ----------
    routes
        Route prefix to deployment name.

    Examples
    --------
    >>> table = RouteTable({"/api": "A", "/": "B"})
    >>> table.match("/api/x"), table.match("/apiv2")
    (('/api', 'A'), ('/', 'B'))
    """

    def __init__(self, routes: Mapping[str, str]) -> None:
        self.routes = dict(routes)

    def match(self, path: str) -> tuple[str, str] | None:
        """Return ``(prefix, deployment)`` of the longest prefix of `path`, or None.

        Prefixes end at a segment's boundary: ``/api`` takes ``/api`` and ``/api/x``,
        not ``/apiv2``.
        """
        routes = self.routes
        prefix = path
        while prefix:
            name = routes.get(prefix)
            if name is not None:
                return prefix, name
            prefix = prefix.rpartition("/")[0]
        name = routes.get("/")
        return None if name is None else ("/", name)
