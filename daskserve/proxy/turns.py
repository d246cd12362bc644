"""Turns on a loop for work that takes long, so that all else has its turns as well.

What waits for a turn has little of each round of the loop, however many wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

#: How long turns take, all those of one round of the loop together.
TURNS_S = 0.004

#: And how much is written in large pieces in one round, without a turn.
ROUND_BYTES = 128 * 1024

#: Does a part, until that time if it can; returns whether there is more to do.
Work = Callable[[float], bool] | asyncio.Future[None]

_waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[Work]]
_waiting = WeakKeyDictionary()
#: How much large pieces are together that were written in this round.
_written: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()


def wait_for_turn(loop: asyncio.AbstractEventLoop, work: Work) -> None:
    """Do the work behind all that waits already, part by part."""
    queue = _waiting.get(loop)
    if queue is None:
        queue = _waiting[loop] = deque()
        loop.call_soon(_take_turns, loop, queue)
    queue.append(work)


def may_write(loop: asyncio.AbstractEventLoop, size: int) -> bool:
    """Whether so many bytes may be written in this round of the loop.

    That is not by time, for loops write at the end of a round.
    """
    written = _written.get(loop)
    if written is None:
        loop.call_soon(_written.pop, loop, None)  # in the next round
        written = 0
    elif written >= ROUND_BYTES:
        return False
    _written[loop] = written + size
    return True


def anyone_waits(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether something waits for its turn."""
    return loop in _waiting


def turn(loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """Wait for a turn in a coroutine, which is not to go on for long."""
    future: asyncio.Future[None] = loop.create_future()
    wait_for_turn(loop, future)
    return future


def _take_turns(loop: asyncio.AbstractEventLoop, queue: deque[Work]) -> None:
    end = loop.time() + TURNS_S
    try:
        while queue and loop.time() < end:
            work = queue.popleft()
            if not isinstance(work, asyncio.Future):
                if work(end):
                    queue.append(work)
            elif not work.done():
                work.set_result(None)
                break  # whoever waited goes on behind this
    finally:
        if queue:
            loop.call_soon(_take_turns, loop, queue)
        else:
            del _waiting[loop]
