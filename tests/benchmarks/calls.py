"""Calls that take time: when they start, how they are made, and what came of them.

In whatever process calls: nothing here knows how a call reaches a replica. In an open
loop calls start when they are due, whether others have ended or not, and their latency
counts from then, so that a stall shows in all that came during it. In a closed loop
each client waits for its answer before it calls again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

#: After so long without an answer a call has failed.
TIMEOUT_S = 30
#: Given the milliseconds that a call is to take; returns a status, and who answered.
Send = Callable[[float], Awaitable[tuple[int, str]]]
#: How many of each class of calls there are, for so many of the others, and its time.
Mix = Sequence[tuple[int, float]]


class Call(NamedTuple):
    """A call to come: seconds from the start of the load, and what it takes."""

    at: float
    ms: float


class Done(NamedTuple):
    """A call that was made; `at` and `seconds` count from when it was due."""

    at: float
    ms: float
    seconds: float
    status: int
    who: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be called; `clients`, `rate` or `burst` says which kind of load.

    Parameters
    ----------
    mix
        The classes of calls: ``((1, 200), (19, 10))`` is one of 200 ms in each 20.
    seconds
        How long calls start; of no meaning for a burst.
    clients
        Of a closed loop.
    rate
        Of an open loop: calls a second in the mean.
    burst
        So many calls at once, and no more.
    even
        Whether calls of an open loop come evenly, not by a Poisson process.
    """

    mix: Mix
    seconds: float
    seed: int
    clients: int = 0
    rate: float = 0
    burst: int = 0
    even: bool = False

    def calls(self) -> list[Call]:
        """Return the calls of an open loop or a burst: always the same ones."""
        times = self._times(Random(self.seed)) if self.rate else [0.0] * self.burst
        drawn = self.draw()
        return [Call(at, next(drawn)) for at in times]

    def draw(self) -> Iterator[float]:
        """Give the milliseconds of one call after the other, without end."""
        # Not the generator of the times: the classes do not depend on the kind of load.
        rng = Random(f"mix {self.seed}")
        # Shuffled, not drawn one by one: else short runs offer more or less than meant.
        deck = [ms for number, ms in self.mix for _ in range(number)]
        while True:
            rng.shuffle(deck)
            yield from deck

    def _times(self, rng: Random) -> Iterator[float]:
        at = 0.0
        while (at := at + self._pause(rng)) < self.seconds:
            yield at

    def _pause(self, rng: Random) -> float:
        return 1 / self.rate if self.even else rng.expovariate(self.rate)


async def make(send: Send, load: Load) -> list[Done]:
    """Make the calls of a load; return them in the order in which they ended."""
    done: list[Done] = []
    began = time.perf_counter()

    async def one(at: float, ms: float) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, who = await send(ms)
        except Exception as error:  # also of user code, through a handle
            status, who = 0, repr(error)
        passed = time.perf_counter() - began
        done.append(Done(at, ms, passed - at, status, who))

    async def client(drawn: Iterator[float]) -> None:
        while (at := time.perf_counter() - began) < load.seconds:
            await one(at, next(drawn))

    async with asyncio.TaskGroup() as tasks:
        drawn = load.draw()
        for _ in range(load.clients):
            tasks.create_task(client(drawn))
        for call in load.calls() if not load.clients else ():
            # Loops wake up to a millisecond late, which counts as latency.
            if (pause := call.at - (time.perf_counter() - began)) > 0:
                await asyncio.sleep(pause)
            tasks.create_task(one(*call))
    return done
