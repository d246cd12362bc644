"""Callers and replicas in simulated time: the real `Dispatcher` and `Admission`.

Only what is between them is made up: a loop that jumps from event to event,
connections that take so long, and replicas that sleep, on some threads or on none.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from daskserve.replica import admission
from daskserve.replica.admission import Admission, slots_of_threads
from daskserve.replica.times import Times
from daskserve.transport.call import Call
from daskserve.transport.channel import Exchange
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.messages import (
    CALL,
    DECLINE,
    FULL,
    LOAD,
    REFUSED,
    RESULT,
    ROOM,
    WANT,
    Message,
)
from daskserve.transport.router import Slot


@dataclass(order=True)
class Timer:
    """What is due at a time."""

    when: float
    number: int
    function: Callable[..., Any] = field(compare=False)
    args: tuple[Any, ...] = field(compare=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """What a dispatcher needs of a loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[Timer] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, function: Callable[..., Any], *args: Any) -> Any:
        event = Timer(when, next(self._numbers), function, args)
        heapq.heappush(self._events, event)
        return event

    def call_later(self, delay: float, function: Callable[..., Any], *a: Any) -> Any:
        return self.call_at(self.now + delay, function, *a)

    def run(self, until: float) -> None:
        while self._events and self._events[0].when <= until:
            event = heapq.heappop(self._events)
            if not event.cancelled:
                self.now = event.when
                event.function(*event.args)
        self.now = until


@dataclass(eq=False)
class Replica:
    """A replica that runs `threads` calls at a time; 0: all that it takes."""

    loop: Loop
    replica_id: int
    #: Makes the seconds that a call takes, of what it was sent.
    service: Callable[[Any], float]
    threads: int = 1
    most: int = 100
    #: How many calls have ended.
    served: int = 0
    callers: dict[admission.Caller, Caller] = field(default_factory=dict)
    known: dict[str, admission.Caller] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = Admission(self.threads or self.most)
        self.queue: deque[tuple[Caller, Message]] = deque()
        self.running = 0
        self.times = Times()
        self.told: dict[str, tuple[int, int]] = {}

    def take(self, caller: Caller, message: Message) -> None:
        known = self.known.get(caller.name)
        if known is None:
            known = self.known[caller.name] = admission.Caller()
            self.callers[known] = caller
        if message[0] == CALL:
            if self.slots.take(known):
                self.queue.append((caller, message))
                self._run()
            else:
                caller.receive(self, (REFUSED, message[1], FULL))
                self._tell(caller)
        elif message[0] == WANT:
            self.slots.want(known, message[3])
            self._offer()
        elif message[0] == DECLINE:
            self.slots.withdraw(known)
            self._offer()

    def _run(self) -> None:
        while self.queue and (not self.threads or self.running < self.threads):
            caller, message = self.queue.popleft()
            self.running += 1
            seconds = self.service(message[3])
            self.loop.call_later(seconds, self._ended, caller, message, seconds)

    def _ended(self, caller: Caller, message: Message, seconds: float) -> None:
        self.running -= 1
        self.served += 1
        self.times.add(seconds)
        if self.threads:
            self.slots.limit = slots_of_threads(
                self.threads,
                self.times.mean_s,
                self.most,
                steady=self.times.steady,
            )
        self.slots.give_back(self.known[caller.name])
        caller.receive(self, (RESULT, message[1], message[3]))
        self._tell(caller)
        self._offer()
        self._run()

    def _offer(self) -> None:
        while (known := self.slots.offer()) is not None:
            self.callers[known].receive(self, (ROOM, 0, self.replica_id))

    def _tell(self, caller: Caller) -> None:
        others = self.slots.taken - self.known[caller.name].held
        news = others, self.slots.limit
        times_s = self.times.mean_s, self.times.typical_s
        times_us = [seconds * 1e6 / max(1, self.threads) for seconds in times_s]
        caller.hear(self, (LOAD, 0, self.replica_id, *news, *times_us, False))


class _Channel:
    """A connection from a caller to a replica."""

    def __init__(self, caller: Caller, replica: Replica, travel_s: float) -> None:
        self._caller, self._replica, self._travel_s = caller, replica, travel_s
        self._exchanges: dict[int, Exchange] = {}
        self._numbers = itertools.count(1)

    def open(self) -> Exchange:
        exchange = Exchange(next(self._numbers))
        self._exchanges[exchange.exchange_id] = exchange
        return exchange

    def close_exchange(self, exchange: Exchange) -> None:
        self._exchanges.pop(exchange.exchange_id, None)

    def send(self, message: Message) -> None:
        loop = self._replica.loop
        loop.call_later(self._travel_s, self._replica.take, self._caller, message)

    def arrive(self, message: Message) -> None:
        exchange = self._exchanges.get(message[1])
        if exchange is not None:
            exchange.push(message)


class Caller:
    """A process with a dispatcher that knows of some replicas.

    Parameters
    ----------
    travel_s, report_s
        Seconds until a message is there, and until what a replica says of its load is.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        replicas: Iterable[Replica],
        rng: random.Random,
        *,
        travel_s: float = 0.0002,
        report_s: float = 0.0002,
        first_limit: int | None = 1,
        max_queued: int | None = None,
    ) -> None:
        self.name = name
        self._loop = loop
        self._travel_s, self._report_s = travel_s, report_s
        self._replicas = {r.replica_id: r for r in replicas}
        self._channels: dict[int, _Channel] = {}
        self.dispatcher = Dispatcher(loop, None)  # type: ignore[arg-type]
        self.dispatcher.connections = self  # type: ignore[assignment]
        most = next(iter(self._replicas.values())).most
        info = {
            "replicas": [
                [i, f"D#{i}", f"tcp://w{i}:1", None, first_limit]
                for i in self._replicas
            ],
            "max_ongoing": most,
            "max_queued": max_queued,
            "max_websockets": 10,
            "timeout_s": None,
            "hopeless": False,
        }
        self.dispatcher.update(1, {"routes": {}, "deployments": {"D": info}})
        self.router = self.dispatcher.groups["D"].router
        self.router._random = rng.random
        #: Seconds that each request took, by what was sent.
        self.took: list[tuple[Any, float]] = []
        self.failed: list[BaseException] = []

    def request(self, what: Any, done: Callable[[], None] = lambda: None) -> None:
        """Send a request now; note how long it takes."""
        began = self._loop.now
        call = Call(self.dispatcher, "D")

        def news() -> None:
            message = call.peek()
            if message is not None and message[0] == REFUSED:
                call.try_again(message[2])
            else:
                assert message is not None
                call.finish()
                self.took.append((what, self._loop.now - began))
                done()

        call.begin(lambda exchange, replica: (CALL, exchange, replica, what), news)

    def receive(self, replica: Replica, message: Message) -> None:
        self._loop.call_later(self._travel_s, self._arrive, replica, message)

    def hear(self, replica: Replica, message: Message) -> None:
        self._loop.call_later(self._report_s, self._arrive, replica, message)

    def _arrive(self, replica: Replica, message: Message) -> None:
        if message[1] == 0:
            self.dispatcher._take_notice(message)
        else:
            self._channels[replica.replica_id].arrive(message)

    # What a dispatcher asks of its connections.

    def want(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            slot.reachable = True

    def channel(self, slot: Slot) -> _Channel:
        channel = self._channels.get(slot.replica_id)
        if channel is None:
            replica = self._replicas[slot.replica_id]
            channel = _Channel(self, replica, self._travel_s)
            self._channels[slot.replica_id] = channel
        return channel

    def update_direct(self, *infos: object) -> None:
        pass

    def forget(self, slots: object) -> None:
        pass

    def drop_idle(self) -> None:
        pass

    def is_connecting(self, slot: Slot) -> bool:
        return False


def poisson(
    rate: float, seconds: float, rng: random.Random, most: int = 10**6
) -> list[float]:
    """Return the times of arrivals."""
    times, now = [], 0.0
    while len(times) < most:
        now += rng.expovariate(rate)
        if now > seconds:
            break
        times.append(now)
    return times
