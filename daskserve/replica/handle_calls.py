"""Calls through handles that are in a replica, streams among them; in a worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from daskserve.packing import Packed
from daskserve.replica.admission import Caller
from daskserve.transport.channel import ReplyTo
from daskserve.transport.messages import ITEM, item_cost


class HandleCall:
    """One call through a handle that is in the replica."""

    __slots__ = ("began", "entered", "slot", "task")

    def __init__(self) -> None:
        #: Whose slot of the replica it has, and since when.
        self.slot: Caller | None = None
        self.began = time.perf_counter()
        self.task: asyncio.Task[None] | None = None
        #: Whether its task has begun.
        self.entered = False

    def credit(self, count: int) -> None:
        """Take note that the caller has consumed so much; of interest for streams."""


class StreamCall(HandleCall):
    """A call whose caller takes one item after the other, in its own time.

    Parameters
    ----------
    reply_to, exchange_id
        The caller, and the number of its call there.
    window_bytes
        How much may be on the way to it.
    """

    __slots__ = ("_exchange_id", "_reply_to", "_room", "_waiter")

    def __init__(self, reply_to: ReplyTo, exchange_id: int, window_bytes: int) -> None:
        super().__init__()
        self._reply_to = reply_to
        self._exchange_id = exchange_id
        self._room = window_bytes
        self._waiter: asyncio.Future[None] | None = None

    def credit(self, count: int) -> None:
        """Take note that the caller has consumed so much."""
        self._room += count
        if self._room > 0 and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def send(self, data: Packed) -> None:
        """Send an item, once there is room."""
        while self._room <= 0:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._room -= item_cost(data)
        self._reply_to.send((ITEM, self._exchange_id, data))


def is_stream(result: Any) -> bool:
    """Whether what a method returned is to be had item by item only."""
    return isinstance(result, Iterator | AsyncIterator)
