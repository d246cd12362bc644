"""Requests at a steady rate, whatever becomes of those before; which are lost."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.requests import Request

#: Requests of each method in a second.
RATE = 10
METHODS = ("GET", "POST")
#: What the handler sleeps, in turn.
SLEEPS_S = (0.2, 1.0)
#: How long a client looks for a server that takes its connection, or for an answer.
PATIENCE_S = 90
CONNECT_S = 2
OPTIONS: dict[str, Any] = {
    "timeout": httpx.Timeout(PATIENCE_S, connect=CONNECT_S),
    "trust_env": False,
    "verify": ssl.create_default_context(),
}


async def handler(request: Request) -> str:
    """Answer after a while; this is what is deployed."""
    seconds = request.query_params["s"]
    await asyncio.sleep(float(seconds))
    return seconds


@dataclass(slots=True)
class Fate:
    """One request; times are seconds since 1970, as in logs."""

    method: str
    sleeps_s: float
    began: float
    ended: float
    #: Why there was no good answer; None if there was one.
    lost: str | None = None

    def __str__(self) -> str:
        began, ended = (
            time.strftime("%H:%M:%S", time.localtime(at)) + f"{at % 1:.2f}"[1:]
            for at in (self.began, self.ended)
        )
        return f"{began}-{ended} {self.method} {self.sleeps_s} s: {self.lost}"


@dataclass
class Load:
    """Requests to one service.

    Parameters
    ----------
    urls
        Where it is, in several places maybe: a client whose connection is refused goes
        to the next one. What broke after that is not tried again.
    requests
        How many to send at least.
    """

    urls: Sequence[str]
    requests: int
    fates: list[Fate] = field(default_factory=list)
    #: Set when there may be an end.
    enough: threading.Event = field(default_factory=threading.Event)

    async def send(self) -> None:
        """Send all requests, and wait for what becomes of them."""
        async with asyncio.TaskGroup() as group:
            began = time.monotonic()
            for number in itertools.count():
                if number >= self.requests and self.enough.is_set():
                    break
                group.create_task(self._ask(number))
                due = began + (number + 1) / (RATE * len(METHODS))
                await asyncio.sleep(due - time.monotonic())

    async def _ask(self, number: int) -> None:
        method = METHODS[number % 2]
        sleeps_s = SLEEPS_S[number // 2 % 2]
        began = time.time()
        try:
            # No connection is used twice: to close an idle one is a server's right.
            # And with a thousand in flight a pool takes longer than they do.
            async with httpx.AsyncClient(**OPTIONS) as client:
                response = await self._find(client, number, method, sleeps_s)
            good = response.status_code == 200 and response.text == str(sleeps_s)
            lost = None if good else f"{response.status_code} {response.text[:200]}"
        except httpx.HTTPError as err:
            lost = repr(err)
        self.fates.append(Fate(method, sleeps_s, began, time.time(), lost))

    async def _find(
        self, client: httpx.AsyncClient, number: int, method: str, sleeps_s: float
    ) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE_S
        for turn in itertools.count():
            url = self.urls[(number + turn) % len(self.urls)]
            try:
                return await client.request(method, url, params={"s": sleeps_s})
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if time.monotonic() > deadline:
                    raise
            if (turn + 1) % len(self.urls) == 0:  # nobody is there
                # Hundreds wait: more haste takes the machine from what is to start.
                await asyncio.sleep(0.5)
        raise AssertionError

    @property
    def lost(self) -> list[Fate]:
        return [fate for fate in self.fates if fate.lost is not None]

    @property
    def longest_wait_s(self) -> float:
        """How long an answer took at most, beyond what the handler sleeps."""
        good = [fate for fate in self.fates if fate.lost is None]
        return max((f.ended - f.began - f.sleeps_s for f in good), default=0)

    @property
    def longest_gap_s(self) -> float:
        """For how long there was no good answer at all."""
        ends = sorted(fate.ended for fate in self.fates if fate.lost is None)
        return max((b - a for a, b in itertools.pairwise(ends)), default=0)

    def __str__(self) -> str:
        kinds = Counter(f"{f.method} {f.sleeps_s} s: {f.lost}" for f in self.lost)
        line = (
            f"sent {len(self.fates)}, lost {len(self.lost)}, "
            f"longest wait {self.longest_wait_s:.1f} s, "
            f"longest gap {self.longest_gap_s:.1f} s"
        )
        return "\n".join([line, *(f"  {n:4d} {kind}" for kind, n in kinds.items())])


@contextmanager
def loaded(load: Load) -> Iterator[Load]:
    """Send requests while the block runs, and until all are answered or lost."""

    def send(*args: Any) -> None:
        asyncio.run(load.send())

    with ThreadPoolExecutor(1, "load") as pool:
        sending = pool.submit(send)
        try:
            yield load
        finally:
            load.enough.set()
        sending.result()
