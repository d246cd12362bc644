"""The thread of sync user code: in order, and with an end for whoever stops waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import pytest

from daskserve.replica.sync_thread import SyncThread
from daskserve.transport.loops import LoopThread
from tests.utils import poll

variable: ContextVar[str] = ContextVar("variable")


class Made:
    """A sync thread and what it told."""

    def __init__(self, loop: LoopThread) -> None:
        self.loop = loop
        self.deserted_ended = 0
        self.thread = SyncThread(loop.loop, "daskserve-sync-test", self._ended)

    def _ended(self) -> None:
        self.deserted_ended += 1


@pytest.fixture
def made() -> Iterator[Made]:
    loop = LoopThread("daskserve-test")
    loop.start()
    yield (made := Made(loop))
    made.thread.close()
    assert loop.stop()
    poll(lambda: "daskserve-sync-test" not in [t.name for t in threading.enumerate()])


def test_calls_run_one_at_a_time_in_order(made: Made) -> None:
    order: list[int] = []
    running = threading.Semaphore(1)

    def call(number: int) -> int:
        assert running.acquire(blocking=False)
        order.append(number)
        running.release()
        return number

    async def many() -> list[int]:
        jobs = [made.thread.submit(lambda n=n: call(n)) for n in range(500)]
        return [await job.future for job in jobs]

    assert made.loop.submit(many()).result(10) == order == list(range(500))


def test_each_call_sees_the_variables_of_who_asked(made: Made) -> None:
    async def ask(value: str) -> str:
        variable.set(value)
        return await made.thread.submit(variable.get).future

    async def both() -> list[str]:
        return await asyncio.gather(ask("a"), ask("b"))

    assert made.loop.submit(both()).result(10) == ["a", "b"]


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [(OSError("no"), OSError), (StopIteration(), RuntimeError), (SystemExit(), None)],
)
def test_what_a_call_raises_arrives(
    made: Made, raised: BaseException, arrives: type | None
) -> None:
    def call() -> None:
        raise raised

    async def ask() -> BaseException | None:
        future = made.thread.submit(call).future
        await asyncio.wait([future])
        return future.exception()

    assert isinstance(made.loop.submit(ask()).result(10), arrives or type(raised))

    async def still_there() -> int:
        return await made.thread.submit(lambda: 1).future

    assert made.loop.submit(still_there()).result(10) == 1


def test_a_call_that_is_cancelled_before_its_turn_never_runs(made: Made) -> None:
    go = threading.Event()
    ran: list[str] = []

    async def ask() -> bool:
        first = made.thread.submit(go.wait)
        second = made.thread.submit(lambda: ran.append("second"))
        second.future.cancel()
        runs_on = made.thread.desert(second)
        go.set()
        await first.future
        await made.thread.submit(lambda: ran.append("third")).future
        return runs_on

    assert made.loop.submit(ask()).result(10) is False
    assert ran == ["third"]
    assert made.deserted_ended == 0


def test_the_end_of_a_deserted_call_is_told(made: Made) -> None:
    begun, go = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go.wait()

    async def leave() -> bool:
        job = made.thread.submit(call)
        await asyncio.to_thread(begun.wait)
        job.future.cancel()
        return made.thread.desert(job)

    assert made.loop.submit(leave()).result(10) is True
    assert made.deserted_ended == 0
    go.set()
    poll(lambda: made.deserted_ended == 1)


def test_a_call_that_ended_before_who_waits_noticed_is_not_deserted(made: Made) -> None:
    async def leave() -> bool:
        job = made.thread.submit(lambda: None)
        job.future.cancel()
        while not job.ended:
            await asyncio.sleep(0.001)
        return made.thread.desert(job)

    assert made.loop.submit(leave()).result(10) is False
    assert made.deserted_ended == 0
