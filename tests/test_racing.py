"""Which of two ways to a worker is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from daskserve.transport.racing import Connect, discard, race

HEAD_START_S = 0.05
NEVER = 100.0


class Comm:
    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Way:
    """Takes so long to connect, or to fail."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self.comm = Comm()
        self.tries = 0
        self._seconds = seconds
        self._error = error

    async def __call__(self) -> Comm:
        self.tries += 1
        await asyncio.sleep(self._seconds)
        if self._error is not None:
            raise self._error
        return self.comm


def run(best: Connect, other: Connect) -> tuple[Any, Any]:
    """Race, and return what came of it when everything has had the time to end."""

    async def main() -> tuple[Any, Any]:
        comm, late = await race(best, other, HEAD_START_S)
        await asyncio.sleep(6 * HEAD_START_S)
        late_comm = None
        if late is not None and late.done() and late.exception() is None:
            late_comm = late.result()
        discard(late)
        await asyncio.sleep(0)
        return comm, late_comm

    return asyncio.run(asyncio.wait_for(main(), 5))


@pytest.mark.parametrize("other_s", [0, NEVER])
def test_the_best_way_is_quick(other_s: float) -> None:
    best, other = Way(0), Way(other_s)
    assert run(best, other) == (best.comm, None)
    assert other.tries == 0


def test_the_best_way_is_slow() -> None:
    best, other = Way(2 * HEAD_START_S), Way(0)
    assert run(best, other) == (other.comm, best.comm)
    assert best.comm.aborted
    assert not other.comm.aborted


def test_the_best_way_is_slow_and_the_other_slower() -> None:
    for other_s in (4 * HEAD_START_S, NEVER):
        best, other = Way(2 * HEAD_START_S), Way(other_s)
        assert run(best, other) == (best.comm, None)
        assert other.tries == 1
        assert not best.comm.aborted


def test_one_way_fails() -> None:
    other = Way(HEAD_START_S)
    assert run(Way(0, OSError("no")), other) == (other.comm, None)
    best = Way(2 * HEAD_START_S)
    assert run(best, Way(0, OSError("no"))) == (best.comm, None)


def test_both_fail() -> None:
    for first_s, second_s in ((0, 0), (0, HEAD_START_S), (2 * HEAD_START_S, 0)):
        with pytest.raises(OSError, match="best"):
            run(Way(first_s, OSError("best")), Way(second_s, OSError("other")))


def test_nobody_waits_any_more() -> None:
    best, other = Way(NEVER), Way(NEVER)

    async def main() -> None:
        racing = asyncio.ensure_future(_race(best, other))
        await asyncio.sleep(2 * HEAD_START_S)
        racing.cancel()
        await asyncio.wait([racing])
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert (best.tries, other.tries) == (1, 1)


def _race(best: Connect, other: Connect) -> Coroutine[Any, Any, Any]:
    return race(best, other, HEAD_START_S)
