"""Hand-over between loops: nothing lost, nothing out of order, few wake-ups."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import anyio
import anyio.lowlevel
import pytest

from daskserve.transport.loops import LoopThread, Mailbox
from tests.utils import poll


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    made = LoopThread("daskserve-test")
    made.start()
    yield made
    assert made.stop()


def test_many_threads_hand_over_in_order(thread: LoopThread) -> None:
    batches: list[list[tuple[int, int]]] = []
    mailbox = Mailbox[tuple[int, int]](thread.loop, batches.append)

    def put(producer: int) -> None:
        for i in range(5000):
            mailbox.put((producer, i))

    producers = [threading.Thread(target=put, args=(n,)) for n in range(4)]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join()
    poll(lambda: sum(map(len, batches)) == 20_000)
    items = [item for batch in batches for item in batch]
    for n in range(4):
        assert [i for producer, i in items if producer == n] == list(range(5000))
    assert len(batches) < len(items)


def test_a_batch_rides_on_one_wake_up(thread: LoopThread) -> None:
    batches: list[list[int]] = []
    mailbox = Mailbox[int](thread.loop, batches.append)
    blocked, go = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        assert go.wait(5)

    thread.call_soon(block)
    assert blocked.wait(5)
    for i in range(100):
        mailbox.put(i)
    go.set()
    poll(lambda: batches)
    assert batches == [list(range(100))]


def test_a_stopped_loop_drops_what_comes() -> None:
    thread = LoopThread("daskserve-test")
    thread.start()
    mailbox = Mailbox[int](thread.loop, lambda batch: None)
    assert thread.stop()
    assert mailbox.put(1) is False
    thread.call_soon(print)
    with pytest.raises(RuntimeError):
        thread.submit(asyncio.sleep(0))
    assert not thread.alive


def test_stop_cancels_what_runs() -> None:
    thread = LoopThread("daskserve-test")
    thread.start()
    ended = threading.Event()

    async def run() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    thread.submit(run())
    assert thread.stop()
    assert ended.is_set()


def test_stop_does_not_wait_for_code_that_blocks() -> None:
    thread = LoopThread("daskserve-test")
    thread.start()
    go = threading.Event()
    thread.call_soon(go.wait, 10)
    assert not thread.stop(timeout_s=0.05)
    go.set()
    poll(lambda: not thread.alive)


def test_submit_returns_what_comes_out(thread: LoopThread) -> None:
    async def answer() -> int:
        assert thread.is_current
        return 42

    assert thread.submit(answer()).result(5) == 42
    assert not thread.is_current


def test_exits_of_user_tasks_do_not_end_the_loop() -> None:
    thread = LoopThread("daskserve-test", user_code=True)
    thread.start()

    async def leave(error: type[BaseException]) -> None:
        await asyncio.sleep(0)
        raise error("bye")

    async def child(error: type[BaseException]) -> None:
        await asyncio.create_task(leave(error))

    for error in (SystemExit, KeyboardInterrupt):
        for user in (leave, child):
            with pytest.raises(RuntimeError, match="bye"):
                thread.submit(user(error)).result(5)
    assert thread.stop()


def test_user_tasks_look_like_others_to_anyio() -> None:
    thread = LoopThread("daskserve-test", user_code=True)
    thread.start()

    async def cancelled_by_its_group() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        return "cancelled"

    assert thread.submit(cancelled_by_its_group()).result(5) == "cancelled"
    assert thread.stop()


def test_a_user_task_cancelled_before_it_began_warns_of_nothing() -> None:
    thread = LoopThread("daskserve-test", user_code=True)
    thread.start()

    async def never() -> None:
        raise AssertionError("it never runs")

    async def cancel_at_once() -> bool:
        task = asyncio.create_task(never())
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert thread.submit(cancel_at_once()).result(5)
    assert thread.stop()


def test_items_do_not_see_the_context_of_who_put_others(thread: LoopThread) -> None:
    user = ContextVar("user", default="nobody")
    seen: list[str] = []
    mailbox = Mailbox[int](thread.loop, lambda batch: seen.append(user.get()))
    user.set("alice")
    mailbox.put(1)
    poll(lambda: seen)
    assert seen == ["nobody"]


def test_what_was_submitted_is_not_collected(thread: LoopThread) -> None:
    ended = threading.Event()

    async def wait_for_what_nobody_else_knows() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    thread.submit(wait_for_what_nobody_else_knows())
    thread.submit(asyncio.sleep(0)).result(5)
    thread.submit(asyncio.to_thread(gc.collect)).result(5)
    assert not ended.is_set()
