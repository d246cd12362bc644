"""Generators that are called through handles: in this process, without a cluster."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import daskserve as serve
from daskserve.exceptions import ReplicaDiedError, RequestTimeoutError
from daskserve.transport.items import Items
from daskserve.transport.messages import ITEM_OVERHEAD_BYTES
from tests.utils import leftover_threads, poll

#: What the replica notes; it is in this process.
seen: list[Any] = []


@serve.deployment
class Source:
    def count(self, n: int, size: int = 0) -> Iterator[Any]:
        try:
            for i in range(n):
                seen.append(i)
                yield (i, bytes(size)) if size else i
        finally:
            seen.append("closed")

    async def count_async(self, n: int) -> AsyncIterator[int]:
        try:
            for i in range(n):
                seen.append(i)
                yield i
        finally:
            seen.append("closed")

    async def wait(self) -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.sleep(60)
        finally:
            seen.append("closed")

    async def wait_a_little(self) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0.3)
        yield 2

    async def never(self) -> AsyncIterator[int]:
        try:
            await asyncio.sleep(60)
            yield 1
        finally:
            seen.append("closed")

    def break_off(self, n: int) -> Iterator[int]:
        yield from range(n)
        raise LookupError(f"nothing after {n}")

    def odd(self) -> Iterator[Any]:
        yield 1
        yield threading.get_ident
        yield (n for n in range(3))

    def no_generator(self) -> list[int]:
        return [1, 2]

    def context(self) -> Iterator[Any]:
        yield serve.get_replica_context().deployment
        yield threading.current_thread().name

    async def relay(self, n: int) -> AsyncIterator[int]:
        handle = serve.get_app_handle().options(stream=True)
        async for i in handle.count_async.remote(n):
            yield i * 10


@pytest.fixture(scope="module")
def source() -> Iterator[serve.DeploymentHandle]:
    handle = serve.run(Source.bind(), local=True)
    yield handle.options(stream=True)
    serve.delete("default")
    assert leftover_threads() == []


@pytest.fixture(autouse=True)
def clean() -> None:
    seen.clear()


def wait_until_closed() -> None:
    poll(lambda: "closed" in seen)


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


def test_sync_and_async_generators_for_sync_and_async_callers(
    source: serve.DeploymentHandle,
) -> None:
    for method in (source.count, source.count_async):
        assert list(method.remote(3)) == [0, 1, 2]
        assert asyncio.run(collect(method.remote(3))) == [0, 1, 2]
        assert list(method.remote(0)) == []
    stream = source.count.remote(2)
    assert [next(stream), next(stream), next(stream, "end"), next(stream, "end")] == [
        0, 1, "end", "end",
    ]  # fmt: skip
    assert "ended" in repr(stream)
    assert asyncio.run(collect(source.relay.remote(3))) == [0, 10, 20]


def test_the_replica_runs_ahead_by_a_bounded_amount(
    source: serve.DeploymentHandle,
) -> None:
    window = 1024 * 1024
    for size in (0, 100_000):
        seen.clear()
        stream = source.count.remote(10**9, size)
        next(stream)
        ahead = 0
        while ahead != (ahead := len(seen)):
            time.sleep(0.2)
        cost = ITEM_OVERHEAD_BYTES + size
        assert 2 < ahead <= 2 * window / cost + 2
        for _ in range(2 * ahead):
            next(stream)
        assert len(seen) > 2 * ahead
        stream.close()
        wait_until_closed()


@pytest.mark.parametrize("method", ["count", "count_async"])
@pytest.mark.parametrize("how", ["break", "cancel", "async", "abandoned"])
def test_a_consumer_that_leaves_closes_the_generator(
    source: serve.DeploymentHandle, method: str, how: str
) -> None:
    call = source.options(method_name=method)
    if how == "break":
        for _ in call.remote(10**9):
            break
    elif how == "cancel":
        stream = call.remote(10**9)
        next(stream)
        assert stream.cancel()
        assert len(list(stream)) < 10_000  # what has come, and no more
    elif how == "async":

        async def consume() -> None:
            async for _ in call.remote(10**9):
                return

        asyncio.run(consume())
    else:
        stream = call.remote(10**9)
        poll(lambda: seen)
        del stream
    gc.collect()
    wait_until_closed()


def test_cancelled_while_it_waits_for_an_item(source: serve.DeploymentHandle) -> None:
    async def consume() -> None:
        stream = source.wait.remote()
        assert await anext(stream) == "first"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(stream)

    asyncio.run(consume())
    wait_until_closed()


def test_errors_come_after_the_items_before_them(
    source: serve.DeploymentHandle,
) -> None:
    for n in (0, 3):
        stream = source.break_off.remote(n)
        assert [next(stream) for _ in range(n)] == list(range(n))
        for _ in range(2):
            with pytest.raises(LookupError, match=f"nothing after {n}"):
                next(stream)
    stream = source.odd.remote()
    assert next(stream) == 1
    assert next(stream) is threading.get_ident
    with pytest.raises(TypeError, match=r"item of .*Source\.odd.* cannot be pickled"):
        next(stream)


def test_streams_and_others_are_told_apart(source: serve.DeploymentHandle) -> None:
    with pytest.raises(TypeError, match=r"no generator but of type list: .* without"):
        next(source.no_generator.remote())
    with pytest.raises(AttributeError, match="no method 'nope'"):
        next(source.nope.remote())
    plain = source.options(stream=False)
    with pytest.raises(TypeError, match=r"is a generator: call it by .*stream=True"):
        plain.count.remote(3).result(10)
    assert seen == []  # it has not begun
    with pytest.raises(TypeError, match="not a bool"):
        source.options(stream=1)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(source)) == source != plain
    assert "stream=True" in repr(source.count)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(source.count.remote(1))


def test_user_code_knows_where_it_is(source: serve.DeploymentHandle) -> None:
    deployment, thread = source.context.remote()
    assert deployment == "Source"
    assert thread.startswith("daskserve-sync-Source")


def test_a_replica_that_stops_says_so_after_the_items() -> None:
    stopping = Source.options(graceful_shutdown_timeout_s=0.1)
    handle = serve.run(stopping.bind(), name="other", local=True)
    stream = handle.options(stream=True).wait.remote()
    poll(lambda: stream._items.waiting)
    serve.delete("other")
    assert next(stream) == "first"
    with pytest.raises(ReplicaDiedError, match="was stopped with the request in it"):
        next(stream)
    wait_until_closed()


def test_the_first_item_has_a_time_limit() -> None:
    slow = Source.options(request_timeout_s=0.1)
    handle = serve.run(slow.bind(), name="other", local=True).options(stream=True)
    try:
        with pytest.raises(RequestTimeoutError, match=r"did not begin .* within 0.1 s"):
            next(handle.never.remote())
        wait_until_closed()
        seen.clear()
        stream = handle.wait_a_little.remote()
        assert next(stream) == 1
        assert next(stream) == 2  # later ones have none
    finally:
        serve.delete("other")


def test_items_are_counted_in_portions() -> None:
    items, consumed = Items(4 * ITEM_OVERHEAD_BYTES), []
    items.on_consumed = consumed.append
    for _ in range(4):
        items.put(b"")
    assert [items.take() for _ in range(5)] == [b"", b"", b"", b"", None]
    assert consumed == [2 * ITEM_OVERHEAD_BYTES] * 2
    news = items.news()
    assert news is items.news() and not news.done()
    items.close()
    assert news.done() and items.news().done()
