"""What a single queue would give: no I/O, no clock. The yardstick of open loops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil


def single_queue(
    arrivals: Sequence[float], services: Iterable[float], speeds: Sequence[float]
) -> list[float]:
    """Serve calls first come first served, by whichever server is free first.

    Parameters
    ----------
    arrivals
        When each call comes, in order; seconds.
    services
        How long each takes on a server of speed 1; seconds.
    speeds
        Of the servers. Of several that are idle, the fastest takes the call: nobody who
        knows speeds beforehand would choose another.

    Returns
    -------
    list of float
        From the arrival of each call to its end; seconds.
    """
    free_at = [0.0] * len(speeds)
    responses = []
    for at, service in zip(arrivals, services, strict=True):
        idle = [n for n, free in enumerate(free_at) if free <= at]
        if idle:
            server = max(idle, key=speeds.__getitem__)
        else:
            server = min(range(len(speeds)), key=free_at.__getitem__)
        free_at[server] = max(at, free_at[server]) + service / speeds[server]
        responses.append(free_at[server] - at)
    return responses


def quantile(values: Iterable[float], q: float) -> float:
    """Return the least value that a share `q` of all does not exceed."""
    ordered = sorted(values)
    # Rounded, for 0.99 * 100 is above 99 in floating point.
    return ordered[max(0, ceil(round(q * len(ordered), 9)) - 1)]
