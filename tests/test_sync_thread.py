"""The threads of sync user code: in order, with an end for whoever stops waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import pytest

from daskserve.replica.sync_thread import Job, SyncThreads
from daskserve.transport.loops import LoopThread
from tests.utils import poll

variable: ContextVar[str] = ContextVar("variable")


class Made:
    """Sync threads and what they told."""

    def __init__(self, loop: LoopThread, number: int) -> None:
        self.loop = loop
        self.deserted = self.deserted_ended = 0
        self.threads = SyncThreads(
            loop.loop, "daskserve-sync-test", number, self._deserted, self._ended
        )

    def _deserted(self) -> None:
        self.deserted += 1

    def _ended(self) -> None:
        self.deserted_ended += 1


Make = Callable[[int], Made]


@pytest.fixture
def make() -> Iterator[Make]:
    loop = LoopThread("daskserve-test")
    loop.start()
    mades: list[Made] = []

    def make(number: int) -> Made:
        mades.append(Made(loop, number))
        return mades[-1]

    yield make
    for made in mades:
        made.threads.close()
    assert loop.stop()
    poll(lambda: "daskserve-sync-test" not in [t.name for t in threading.enumerate()])


@pytest.fixture
def made(make: Make) -> Made:
    return make(1)


def test_calls_run_one_at_a_time_in_order(made: Made) -> None:
    order: list[int] = []
    running = threading.Semaphore(1)

    def call(number: int) -> int:
        assert running.acquire(blocking=False)
        order.append(number)
        running.release()
        return number

    async def many() -> list[int]:
        jobs = [made.threads.submit(lambda n=n: call(n)) for n in range(500)]
        return [await job.future for job in jobs]

    assert made.loop.submit(many()).result(10) == order == list(range(500))


def test_each_call_sees_the_variables_of_who_asked(made: Made) -> None:
    async def ask(value: str) -> str:
        variable.set(value)
        return await made.threads.submit(variable.get).future

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
        future = made.threads.submit(call).future
        await asyncio.wait([future])
        return future.exception()

    assert isinstance(made.loop.submit(ask()).result(10), arrives or type(raised))

    async def still_there() -> int:
        return await made.threads.submit(lambda: 1).future

    assert made.loop.submit(still_there()).result(10) == 1


def test_a_call_that_is_cancelled_before_its_turn_never_runs(made: Made) -> None:
    go = threading.Event()
    ran: list[str] = []

    async def ask() -> bool:
        first = made.threads.submit(go.wait)
        second = made.threads.submit(lambda: ran.append("second"))
        second.future.cancel()
        runs_on = made.threads.desert(second)
        go.set()
        await first.future
        await made.threads.submit(lambda: ran.append("third")).future
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
        job = made.threads.submit(call)
        await asyncio.to_thread(begun.wait)
        job.future.cancel()
        return made.threads.desert(job)

    assert made.loop.submit(leave()).result(10) is True
    assert made.deserted_ended == 0
    go.set()
    poll(lambda: made.deserted_ended == 1)


def test_a_call_that_ended_before_who_waits_noticed_is_not_deserted(made: Made) -> None:
    async def leave() -> bool:
        job = made.threads.submit(lambda: None)
        job.future.cancel()
        while not job.ended:
            await asyncio.sleep(0.001)
        return made.threads.desert(job)

    assert made.loop.submit(leave()).result(10) is False
    assert made.deserted_ended == 0


def test_as_many_run_at_once_as_there_are_threads(make: Make) -> None:
    made = make(3)
    barrier, names = threading.Barrier(3), set[int]()

    def meet() -> None:
        names.add(threading.get_ident())
        barrier.wait(10)

    async def many() -> None:
        jobs = [made.threads.submit(meet) for _ in range(30)]
        await asyncio.gather(*(job.future for job in jobs))

    made.loop.submit(many()).result(20)
    assert len(names) == 3


def test_threads_begin_when_they_are_needed(make: Make) -> None:
    made = make(1_000_000_000)

    async def one_after_the_other() -> None:
        for _ in range(20):
            await made.threads.submit(lambda: None).future

    made.loop.submit(one_after_the_other()).result(10)
    assert len(made.threads._threads) == 1


def test_idle_as_long_as_a_thread_is(make: Make) -> None:
    made = make(2)
    go = threading.Event()

    async def ask() -> list[tuple[int, bool]]:
        seen = [(made.threads.jobs, made.threads.idle)]
        jobs = []
        for _ in range(3):
            jobs.append(made.threads.submit(go.wait))
            seen.append((made.threads.jobs, made.threads.idle))
        jobs[2].future.cancel()
        made.threads.desert(jobs[2])  # it never runs
        seen.append((made.threads.jobs, made.threads.idle))
        go.set()
        await asyncio.gather(jobs[0].future, jobs[1].future)
        return [*seen, (made.threads.jobs, made.threads.idle)]

    assert made.loop.submit(ask()).result(10) == [
        (0, True),
        (1, True),
        (2, False),
        (3, False),
        (2, False),
        (0, True),
    ]


def leave(made: Made, go: threading.Event, by_caller: bool = True) -> Job:
    """Desert a job that runs until it may go."""
    begun = threading.Event()

    def call() -> None:
        begun.set()
        go.wait(10)

    async def desert() -> Job:
        job = made.threads.submit(call, by_caller=by_caller)
        await asyncio.to_thread(begun.wait, 10)
        job.future.cancel()
        assert made.threads.desert(job)
        return job

    return made.loop.submit(desert()).result(10)


def test_the_oldest_deserted_call_is_known(make: Make) -> None:
    made = make(3)
    first_go, go = threading.Event(), threading.Event()
    before = time.monotonic()
    first, second = leave(made, first_go), leave(made, go)
    assert made.threads.oldest_deserted is first
    assert first.deserted_at is not None and second.deserted_at is not None
    # A loop's clock may be as old as the round that it is in.
    assert before - 1 < first.deserted_at <= second.deserted_at
    assert (made.threads.deserted, made.deserted) == (2, 2)
    assert {first.thread, second.thread} <= {t.ident for t in threading.enumerate()}
    assert first.thread != second.thread
    first_go.set()
    poll(lambda: made.deserted_ended == 1)
    assert made.threads.oldest_deserted is second
    go.set()
    poll(lambda: made.deserted_ended == 2)
    assert made.threads.oldest_deserted is None
    assert (made.threads.deserted, made.threads.jobs) == (0, 0)


def test_what_is_no_callers_is_not_counted_as_deserted(made: Made) -> None:
    go = threading.Event()
    leave(made, go, by_caller=False)
    assert (made.threads.deserted, made.threads.oldest_deserted) == (0, None)
    assert made.threads.jobs == 1
    go.set()
    poll(lambda: made.threads.jobs == 0)
    assert (made.deserted, made.deserted_ended) == (0, 0)


def test_the_mean_time_of_calls(made: Made) -> None:
    async def call(seconds: float, by_caller: bool = True) -> float:
        job = made.threads.submit(lambda: time.sleep(seconds), by_caller=by_caller)
        await job.future
        return made.threads.times.mean_s

    def mean_after(seconds: float, by_caller: bool = True) -> float:
        return made.loop.submit(call(seconds, by_caller)).result(10)

    assert mean_after(0.05, by_caller=False) == 0
    first = mean_after(0.05)
    assert first >= 0.05
    means = [first, *(mean_after(0) for _ in range(60))]
    assert means[-1] < first / 2
    go = threading.Event()
    leave(made, go)
    go.set()
    poll(lambda: made.deserted_ended == 1)
    assert made.threads.times.mean_s == means[-1]  # nobody knows how long it should be
