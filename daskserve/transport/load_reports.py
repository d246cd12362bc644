"""How many requests of this process wait or run: told now and then. Any process.

Runs on a process's transport loop, and only while there is a deployment whose number of
replicas follows its load. Requests themselves pay nothing but for being counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

#: How often in an interval it is looked how many there are; the average is told.
LOOKS = 5
#: What is told at least of a deployment that had any request meanwhile.
LEAST = 0.01

#: By deployment: how many requests, and how many of them are in which replica.
Loads: TypeAlias = dict[str, list[Any]]


class LoadReports:
    """One process's reports to the controller.

    Parameters
    ----------
    loop
        The transport loop; everything runs on it.
    count
        Returns a deployment's requests that wait, those in each replica, and a counter
        that rises with every request.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        count: Callable[[str], tuple[int, dict[int, int], int]],
    ) -> None:
        #: Sends an interval and loads to the controller; None: nobody is told.
        self.send: Callable[[float, Loads], object] | None = None
        self._loop = loop
        self._count = count
        self._interval_s = 0.0
        self._names: set[str] = set()
        self._looks = 0
        self._sums: dict[str, int] = {}
        self._counters: dict[str, int] = {}
        self._told = False
        self._timer: asyncio.TimerHandle | None = None

    def follow(self, deployments: Mapping[str, Mapping[str, Any]]) -> None:
        """Report on those deployments of a snapshot that want it."""
        intervals = {
            name: info["load_interval_s"]
            for name, info in deployments.items()
            if info.get("load_interval_s")
        }
        self._names = set(intervals)
        self._interval_s = min(intervals.values(), default=0.0)
        if intervals and self._timer is None and self.send is not None:
            self._sleep()

    def close(self) -> None:
        """Report no more."""
        self._names.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sleep(self) -> None:
        self._timer = self._loop.call_later(self._interval_s / LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        self._looks += 1
        due = self._looks >= LOOKS
        loads: Loads = {}
        for name in self._names:
            waiting, running, counter = self._count(name)
            total = self._sums.get(name, 0) + waiting + sum(running.values())
            self._sums[name] = total
            if due:
                least = LEAST if counter != self._counters.get(name, 0) else 0.0
                number = max(total / self._looks, least)
                if number:
                    pairs = [[r, in_flight] for r, in_flight in running.items()]
                    loads[name] = [number, pairs]
                self._counters[name] = counter
        if due:
            self._looks = 0
            self._sums.clear()
            if (loads or self._told) and self.send is not None:
                self.send(self._interval_s, loads)
            self._told = bool(loads)
        # What was told last is to be taken back when nobody asks any more.
        if self._names:
            self._sleep()
