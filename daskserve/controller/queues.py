"""How many requests wait, summed over all processes; scheduler process, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

#: Totals that stay as they are said again after this many seconds: who does not hear
#: of them any longer forgets them.
REPEAT_S = 1.0


class QueueBoard:
    """What processes last said of their queues, and when totals are to go out."""

    def __init__(self) -> None:
        self._reports: dict[str, dict[str, int]] = {}
        self._sent: dict[str, int] = {}
        self._sent_at = 0.0

    def report(self, subscriber: str, queued: Mapping[str, int]) -> None:
        """Take one process's report: deployment to number, without the zeros."""
        if queued:
            self._reports[subscriber] = dict(queued)
        else:
            self.forget(subscriber)

    def forget(self, subscriber: str) -> None:
        """Forget a process that has gone."""
        self._reports.pop(subscriber, None)

    def totals(self) -> dict[str, int]:
        """Return how many wait for each deployment."""
        totals: Counter[str] = Counter()
        for queued in self._reports.values():
            totals.update(queued)
        return dict(totals)

    def elsewhere(self, subscriber: str) -> dict[str, int]:
        """Return how many wait in other processes than one, without the zeros.

        Only here is it known which of its reports the totals have.
        """
        own = self._reports.get(subscriber, {})
        others = {name: n - own.get(name, 0) for name, n in self._sent.items()}
        return {name: n for name, n in others.items() if n > 0}

    def due(self, now: float) -> dict[str, int] | None:
        """Return the totals if all processes are to be told, else None."""
        totals = self.totals()
        repeat = bool(totals) and now - self._sent_at >= REPEAT_S
        if totals == self._sent and not repeat:
            return None
        self._sent, self._sent_at = totals, now
        return totals
