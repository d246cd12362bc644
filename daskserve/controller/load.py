"""Requests in progress, summed over all processes; scheduler process, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A report that is not repeated for so many of its intervals, and this many seconds, is
#: forgotten: who sent it may be stopped.
VALID_INTERVALS = 3
VALID_S = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """One deployment's requests that wait or run."""

    requests: float = 0.0
    #: Those that run, by the number of the replica.
    replicas: Mapping[int, float] = field(default_factory=dict)


class LoadBoard:
    """What processes last said of their requests."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Mapping[str, Sequence[Any]]]] = {}

    def report(
        self,
        subscriber: str,
        interval_s: float,
        loads: Mapping[str, Sequence[Any]],
        now: float,
    ) -> None:
        """Take one process's report.

        Parameters
        ----------
        subscriber
            The process.
        interval_s
            When the next one is due, if there is anything to tell then.
        loads
            By deployment: the number of requests, and pairs of a replica and how many
            are in it.
        now
            Time in seconds.
        """
        if loads:
            valid_until = now + VALID_INTERVALS * interval_s + VALID_S
            self._reports[subscriber] = valid_until, loads
        else:
            self.forget(subscriber)

    def forget(self, subscriber: str) -> None:
        """Forget a process that has gone."""
        self._reports.pop(subscriber, None)

    def get(self, deployment: str, now: float) -> Load:
        """Return the sum of what is known of one deployment."""
        requests = 0.0
        replicas: Counter[int] = Counter()
        for valid_until, loads in self._reports.values():
            if deployment in loads and now <= valid_until:
                number, pairs = loads[deployment]
                requests += number
                for replica_id, running in pairs:
                    replicas[replica_id] += running
        return Load(requests, replicas)
