"""Values of Dask's tasks that constructors take stay on the cluster. Scheduler."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

#: Who wants them, as Dask sees it; published datasets are kept in this way, too.
CLIENT = "daskserve-arguments"


def keep_values(scheduler: Any, keys: Set[Any]) -> None:
    """Keep the values of exactly these tasks, as far as they are there."""
    client = scheduler.clients.get(CLIENT)
    kept = set() if client is None else {ts.key for ts in client.wants_what}
    if new := (keys - kept) & scheduler.tasks.keys():
        scheduler.client_desires_keys(list(new), CLIENT)
    if old := kept - keys:
        scheduler.client_releases_keys(list(old), CLIENT)
