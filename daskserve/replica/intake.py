"""What a replica takes of its callers, and what it tells them of its load; on its loop.

All that is done for each request is done here in a few steps: empty requests are told
from those of a plain server by what they cost.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from time import perf_counter

from daskserve.replica.actor import ReplicaSpec
from daskserve.replica.admission import Admission, Caller, slots_of_threads
from daskserve.replica.servable import Servable
from daskserve.replica.times import Times
from daskserve.transport.channel import ReplyTo
from daskserve.transport.messages import LOAD, MODELS, NO_LIMIT, ROOM, Message

#: How long free slots are kept for callers that want them, and say nothing.
KEPT_S = 1.0
#: How often a caller is told at most, and how often again, what others have here.
TELL_S, TELL_AGAIN_S = 0.001, 0.5
#: What the time of a call has to become, of what was told last, to be told again.
LESS, MORE = 0.8, 1.25
#: What requests in progress need at least to end, in seconds: for their way, too. And
#: how much longer than the longest of late one may take.
LEAST_NEED_S, LONGER = 0.5, 1.5
#: Of calls that are briefer, in seconds, so many are not measured between two that are.
BRIEF_S, UNMEASURED = 1e-3, 7


class _Caller(Caller):
    """A process that asks, and what it was told."""

    __slots__ = ("others", "told_at", "version", "way")

    def __init__(self, way: ReplyTo) -> None:
        super().__init__()
        #: The channel that it used last.
        self.way = way
        #: How many requests of others it knows of, and since when.
        self.others = 0
        self.told_at = -math.inf
        #: Of what it was told besides.
        self.version = 0


class Intake:
    """A replica's slots, and who has them.

    Parameters
    ----------
    loop
        The replica's.
    spec
        The replica's; it has the limits.
    servable
        Says how long sync calls take, and which of them nobody waits for.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, spec: ReplicaSpec, servable: Servable
    ) -> None:
        limit = spec.max_ongoing_requests
        self._most = NO_LIMIT if limit is None else limit
        self.slots = Admission(self._most)
        #: How many requests callers send before they have heard; None: all there are.
        self.first_limit: int | None = None
        self._loop = loop
        self._replica_id = spec.replica_id
        self._threads = spec.threads
        self._servable = servable
        self._callers: dict[str, _Caller] = {}
        #: How long calls take: on their threads, or those that are async.
        self._times = Times()
        #: What of that was told last, mean and typical, and of which version that is.
        self._told_s = self._told_typical_s = 0.0
        self._steady = False
        #: How many calls are not measured before the next.
        self._unmeasured = 0
        self._version = 1
        self._stuck = False
        #: Told to callers when they come.
        self._greeting: Message | None = None
        #: Of the next look at slots that are kept for callers.
        self._keeping: asyncio.TimerHandle | None = None

    def started(self) -> None:
        """Note that the servable is there: some run on threads, and take as many."""
        if self._servable.threaded:
            self._times = self._servable.times
            self.first_limit = self.slots.limit = min(self._threads, self._most)

    def take(self, reply_to: ReplyTo) -> Caller | None:
        """Take a slot for a request, to be given back; None: there is none."""
        caller = self._callers.get(reply_to.caller) or self._meet(reply_to)
        caller.way = reply_to
        if self.slots.take(caller):
            return caller
        self._tell(caller, perf_counter())
        return None

    def give_back(self, caller: Caller, began: float) -> None:
        """Let another request have the slot of one that has ended, or left its thread.

        Parameters
        ----------
        caller
            Who had it.
        began
            When it was taken, by `time.perf_counter`.
        """
        slots, times = self.slots, self._times
        slots.give_back(caller)
        if self.first_limit is not None:
            self._look_at_times()
        elif self._unmeasured:
            self._unmeasured -= 1
        else:
            times.add(perf_counter() - began)
            self._unmeasured = UNMEASURED if times.mean_s < BRIEF_S else 0
            self._look_at_times()
        if slots.wanted:
            self.offer()
        assert isinstance(caller, _Caller)
        others = slots.taken + slots.abandoned - caller.held
        if others or caller.others or caller.version != self._version:
            self._tell(caller, perf_counter())

    def abandoned_changed(self) -> None:
        """Note that a call is not waited for any more, or that such a one has ended."""
        number = self._servable.deserted
        if number == self.slots.abandoned:
            return
        self.slots.abandoned = number
        stuck = number >= self._threads
        if stuck != self._stuck:
            self._stuck = stuck
            self._version += 1
            for caller in self._callers.values():
                self._tell(caller, perf_counter())
        self.offer()

    def want(self, reply_to: ReplyTo, number: int) -> None:
        """Note that a caller has use for so many slots."""
        caller = self._callers.get(reply_to.caller) or self._meet(reply_to)
        caller.way = reply_to
        self.slots.want(caller, number)
        self.offer()

    def decline(self, reply_to: ReplyTo) -> None:
        """Note that a caller has no use for slots any more."""
        caller = self._callers.get(reply_to.caller)
        if caller is not None:
            self.slots.withdraw(caller)
            self.offer()

    def forget(self, reply_to: ReplyTo) -> None:
        """Forget a caller whose channel has ended, if it has not used another since."""
        caller = self._callers.get(reply_to.caller)
        if caller is not None and caller.way is reply_to:
            del self._callers[reply_to.caller]
            self.slots.withdraw(caller)
            self.offer()

    def greet(self, message: Message) -> None:
        """Send a message to all callers, and to those to come."""
        self._greeting = message
        for way in self.ways():
            way.send(message)

    def tell_models(self, reply_to: ReplyTo) -> None:
        """Tell a caller which models are here, or how many can be if there are none."""
        if reply_to.caller not in self._callers:
            self._meet(reply_to)
        elif self._greeting is not None:
            reply_to.send(self._greeting)
        if self._greeting is None:
            limit = self._servable.model_limit
            reply_to.send((MODELS, 0, self._replica_id, limit, 0, ()))

    def ways(self) -> Iterable[ReplyTo]:
        """Return the channels to all callers."""
        return [caller.way for caller in self._callers.values()]

    def offer(self) -> None:
        """Keep slots that are free for callers who want them, in turn."""
        while (caller := self.slots.offer()) is not None:
            assert isinstance(caller, _Caller)
            caller.way.send((ROOM, 0, self._replica_id))
        if self.slots.kept and self._keeping is None:
            self._keeping = self._loop.call_later(KEPT_S, self._withdraw_kept)

    def needs_s(self, oldest_s: float) -> float:
        """Return how long what is in progress may take, in seconds; any thread.

        Parameters
        ----------
        oldest_s
            For how long the oldest of it has been; as much again is allowed for.
        """
        longest_s = max(self._times.peak_s * LONGER, oldest_s * 2)
        threads = self._threads if self.first_limit is not None else NO_LIMIT
        return LEAST_NEED_S + longest_s * math.ceil((self.slots.taken or 1) / threads)

    def close(self) -> None:
        """Offer nothing any more."""
        self.slots.limit = 0
        if self._keeping is not None:
            self._keeping.cancel()

    def _meet(self, reply_to: ReplyTo) -> _Caller:
        caller = self._callers[reply_to.caller] = _Caller(reply_to)
        if self._greeting is not None:
            reply_to.send(self._greeting)
        return caller

    def _look_at_times(self) -> None:
        """See whether calls take another time than was told."""
        times = self._times
        if LESS * self._told_s <= times.mean_s <= MORE * self._told_s:
            if times.steady == self._steady:
                return
        self._steady = times.steady
        self._told_s, self._told_typical_s = times.mean_s, times.typical_s
        self._version += 1
        if self.first_limit is not None:
            self.slots.limit = slots_of_threads(
                self._threads, times.mean_s, self._most, steady=times.steady
            )

    def _tell(self, caller: _Caller, now: float) -> None:
        """Tell a caller of the load here, if that is news."""
        slots = self.slots
        others = slots.taken + slots.abandoned - caller.held
        if caller.version == self._version:
            same = others == caller.others
            if now - caller.told_at < (TELL_AGAIN_S if same else TELL_S):
                return
        caller.others, caller.told_at, caller.version = others, now, self._version
        threads = 1 if self.first_limit is None else self._threads
        call_us = int(self._told_s / threads * 1e6)
        typical_us = int(self._told_typical_s / threads * 1e6)
        news = (others, slots.limit, call_us, typical_us, self._stuck)
        caller.way.send((LOAD, 0, self._replica_id, *news))

    def _withdraw_kept(self) -> None:
        """Keep slots no longer for those who are too late."""
        self._keeping = None
        for caller in self._callers.values():
            self.slots.withdraw_late(caller)
        self.offer()
