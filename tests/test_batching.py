"""Calls that come singly are answered in batches; on a loop, and in replicas."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import ANY

import cloudpickle
import httpx
import pytest

import daskserve as serve
from daskserve.batching import AdaptiveSize
from tests.test_http import Site, open_site


@pytest.fixture
def site() -> Iterator[Site]:
    with open_site() as made:
        yield made


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


class Model:
    """Notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.most = self.running = 0
        self.go = asyncio.Event()

    async def _note(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.02)
        self.running -= 1
        return [2 * item for item in items]

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.05)
    async def double(self, items: list[int]) -> list[int]:
        return await self._note(items)

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=0, max_concurrent_batches=3)
    async def side_by_side(self, items: list[int]) -> list[int]:
        return await self._note(items)

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=5)
    async def add(self, x: list[int], y: list[int], z: list[int]) -> list[int]:
        assert (len(x), len(y), len(z)) == (3, 3, 3)
        return [a + b + c for a, b, c in zip(x, y, z, strict=True)]

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=5)
    async def picky(self, items: list[int]) -> list[Any]:
        if 99 in items:
            raise OSError("99 breaks it")
        return [ValueError(f"not {item}") if item < 0 else item for item in items]

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=5)
    async def wrong(self, items: list[Any]) -> Any:
        return items[0]

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=0.05)
    async def slow(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.batches.append([-1])
            raise
        return items


async def both(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def test_a_batch_is_full_or_its_first_item_has_waited() -> None:
    async def main() -> None:
        model = Model()
        began = time.perf_counter()
        assert await both(*(model.double(n) for n in range(6))) == [0, 2, 4, 6, 8, 10]
        assert model.batches == [[0, 1, 2, 3], [4, 5]]
        assert 0.06 < time.perf_counter() - began < 1
        assert model.most == 1

    run(main())


def test_so_many_batches_run_side_by_side_and_no_more() -> None:
    async def main() -> None:
        model = Model()
        assert await both(*(model.side_by_side(n) for n in range(20)))
        assert model.most == 3
        assert sorted(sum(model.batches, [])) == list(range(20))
        assert max(map(len, model.batches)) == 2

    run(main())


def test_each_parameter_is_a_list_and_may_be_given_by_name() -> None:
    async def main() -> None:
        model = Model()
        calls = model.add(1, 2, 3), model.add(1, z=30, y=20), model.add(x=0, y=0, z=0)
        assert await both(*calls) == [6, 51, 0]
        with pytest.raises(TypeError, match="missing a required argument: 'z'"):
            await model.add(1, 2)

    run(main())


def test_errors_of_one_item_and_of_all() -> None:
    async def main() -> None:
        model = Model()
        first, second, third = await both(*map(model.picky, (1, -2, 3)))
        assert (first, third) == (1, 3)
        assert isinstance(second, ValueError) and str(second) == "not -2"
        failed = await both(*map(model.picky, (1, 99, 3)))
        assert {str(error) for error in failed} == {"99 breaks it"}
        assert await both(*map(model.picky, (1, 2, 3))) == [1, 2, 3]

    run(main())


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (None, TypeError, "2 items and returned a NoneType: it has to return a list"),
        ("ab", TypeError, "returned a str"),
        ({1: 2, 3: 4}, TypeError, "returned a dict"),
        ([1], ValueError, "2 items and returned 1 results"),
        ([1, 2, 3], ValueError, "returned 3 results"),
    ],
)
def test_a_wrong_result_is_said_to_be_one(
    result: Any, error: type[Exception], text: str
) -> None:
    async def main() -> None:
        model = Model()
        for failed in await both(model.wrong(result), model.wrong(result)):
            assert type(failed) is error and text in str(failed), failed
            assert "Model.wrong()" in str(failed)

    run(main())


def test_who_is_cancelled_leaves_the_batch() -> None:
    async def main() -> None:
        model = Model()
        tasks = [asyncio.ensure_future(model.double(n)) for n in range(4)]
        tasks[1].cancel()
        assert await both(*tasks[2:]) == [4, 6]
        await both(*tasks)
        # The fourth made it full before the second could leave; the next is not.
        tasks = [asyncio.ensure_future(model.double(n)) for n in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        assert (await both(*tasks))[::2] == [0, 4]
        assert model.batches[1] == [0, 2]

    run(main())


def test_a_batch_that_nobody_waits_for_is_cancelled() -> None:
    async def main() -> None:
        model = Model()
        tasks = [asyncio.ensure_future(model.slow(n)) for n in (1, 2)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert model.batches == [[1, 2]]  # the other one still waits
        tasks[1].cancel()
        await both(*tasks)
        await asyncio.sleep(0.01)
        assert model.batches == [[1, 2], [-1]]
        model.go.set()
        assert await model.slow(3) == 3

    run(main())


def test_objects_have_batches_of_their_own_and_functions_too() -> None:
    @serve.batch(batch_wait_timeout_s=0.01)
    async def double(items: list[int]) -> list[int]:
        return [len(items)] * len(items)

    class Louder(Model):
        @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
        async def double(self, items: list[int]) -> list[int]:
            assert len(items) == 3
            return await both(*map(super().double, items))

    async def main() -> None:
        one, other = Model(), Model()
        await both(one.double(1), other.double(2))
        assert (one.batches, other.batches) == ([[1]], [[2]])
        assert await both(*map(double, range(5))) == [5] * 5
        assert await both(*map(Louder().double, range(3))) == [0, 2, 4]

    run(main())
    run(main())  # on another loop


def traced(function: Any) -> Any:
    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return call


def hidden(function: Any) -> Any:
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return call


class Parent:
    base = 10

    async def _many(self, items: list[int]) -> list[int]:
        return [self.base + item for item in items]

    async def _of_this(this, items: list[int]) -> list[int]:
        return [this.base + item for item in items]

    plain = serve.batch(_many)
    under = traced(serve.batch(max_batch_size=2)(_many))
    twice = traced(traced(serve.batch(_many)))
    unnamed = hidden(serve.batch(_many))
    above = serve.batch(traced(_many))
    this = serve.batch(_of_this)
    under_this = traced(serve.batch(max_batch_size=2)(_of_this))

    @serve.batch
    async def __private(self, items: list[int]) -> list[int]:
        return [self.base + item for item in items]

    async def private(self, item: int) -> Any:
        return await self.__private(item)  # type: ignore[arg-type]

    @classmethod
    @serve.batch
    async def of_class(cls, items: list[int]) -> list[int]:
        return [cls.base + item for item in items]

    @staticmethod
    @serve.batch
    async def static(items: list[int]) -> list[int]:
        return [10 + item for item in items]

    @serve.multiplexed
    async def __model(self, model_id: str) -> int:
        return self.base + int(model_id)

    model = traced(serve.multiplexed(traced(__model.__wrapped__)))

    async def private_model(self, item: int) -> int:
        return await self.__model(str(item))


class Child(Parent):
    base = 20


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "under", "twice", "unnamed", "this", "under_this", "private"),
        *("of_class", "private_model"),
    ],
)
def test_methods_find_their_object(name: str) -> None:
    async def main() -> None:
        parent, child = Parent(), Child()
        calls = [getattr(each, name)(n) for n in (1, 2) for each in (parent, child)]
        assert await both(*calls) == [11, 21, 12, 22]

    run(main())


def test_methods_without_an_object_take_items() -> None:
    async def main() -> None:
        assert await both(Parent.static(1), Child().static(2)) == [11, 12]
        assert await Child().model("5") == 25

    run(main())


def test_an_object_without_dict_is_named() -> None:
    class Slotted:
        __slots__ = ()

        @serve.batch
        async def method(self, items: list[int]) -> list[int]:
            return items

    with pytest.raises(TypeError, match="Slotted objects have no __dict__"):
        run(Slotted().method([1]))


class Streams:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.steps = self.ended = 0

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=0.05)
    async def count(self, to: list[int]) -> AsyncIterator[list[Any]]:
        self.batches.append(to)
        try:
            for step in range(100):
                self.steps += 1
                if 99 in to and step == 2:
                    raise OSError("99 breaks it")
                yield [
                    ValueError(f"{n}")
                    if n < 0 and step == 1
                    else StopIteration
                    if step == n
                    else step
                    for n in to
                ]
                await asyncio.sleep(0)
        finally:
            self.ended += 1

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=0.05)
    async def wrong(self, items: list[int]) -> AsyncIterator[Any]:
        yield [1, 2, 3]


async def collect(stream: Any) -> list[Any]:
    got: list[Any] = []
    try:
        async for item in stream:
            got.append(item)
    except Exception as err:
        got.append(repr(err))
    return got


def test_generators_stream_to_each_call_its_own() -> None:
    async def main() -> None:
        model = Streams()
        assert inspect.isasyncgenfunction(model.count)
        calls = [model.count(n) for n in (1, 3, -1, 0)]  # type: ignore[arg-type]
        assert await both(*map(collect, calls)) == [
            [0],
            [0, 1, 2],
            [0, "ValueError('-1')"],
            [],
        ]
        assert (model.batches, model.steps, model.ended) == ([[1, 3, -1], [0]], 5, 2)
        calls = [model.count(n) for n in (1, 99)]  # type: ignore[arg-type]
        assert await both(*map(collect, calls)) == [
            [0],
            [0, 1, "OSError('99 breaks it')"],
        ]
        (wrong,) = await both(collect(model.wrong(1)))  # type: ignore[arg-type]
        assert "1 items and returned 3 results" in wrong[0]

    run(main())


def test_a_generator_that_nobody_reads_is_ended() -> None:
    async def main() -> None:
        model = Streams()
        first, second = model.count(90), model.count(91)  # type: ignore[arg-type]
        assert await both(anext(first), anext(second)) == [0, 0]
        await first.aclose()  # type: ignore[attr-defined]
        assert await anext(second) == 1
        assert model.ended == 0
        await second.aclose()  # type: ignore[attr-defined]
        for _ in range(50):
            await asyncio.sleep(0)
        assert model.ended == 1
        assert model.steps < 90

    run(main())


def test_a_generator_is_ended_when_the_rest_have_ended() -> None:
    async def main() -> None:
        model = Streams()
        short, long = model.count(1), model.count(90)  # type: ignore[arg-type]
        assert await both(collect(short), anext(long)) == [[0], 0]
        await long.aclose()  # type: ignore[attr-defined]
        for _ in range(50):
            await asyncio.sleep(0)
        assert model.ended == 1
        assert model.steps < 90

    run(main())


def test_who_is_cancelled_while_the_answer_comes_spoils_no_other() -> None:
    async def main() -> None:
        model = Model()
        first, second = (asyncio.create_task(model.slow(n)) for n in (1, 2))
        await asyncio.sleep(0.02)
        model.go.set()
        first.cancel()
        assert isinstance((await both(first))[0], asyncio.CancelledError)
        assert await second == 2

    run(main())


def test_batches_by_size() -> None:
    batches: list[list[str]] = []

    def size(texts: list[str], weights: list[int]) -> int:
        return sum(len(t) * w for t, w in zip(texts, weights, strict=True))

    @serve.batch(max_batch_size=10, batch_wait_timeout_s=0.05, batch_size_fn=size)
    async def echo(texts: list[str], weights: list[int]) -> list[str]:
        batches.append(texts)
        return texts

    async def main() -> None:
        given = ["aaaa", "bbb", "cc", "dddddddddddd", "e", "ffffffffff"]
        calls = [echo(text, 1) for text in given]  # type: ignore[arg-type]
        assert await both(*calls, echo("bad", "x")) == [  # type: ignore[arg-type]
            *given,
            ANY,
        ]
        assert batches == [["aaaa", "bbb", "cc"], ["dddddddddddd"], ["e"], given[-1:]]

    run(main())


@pytest.mark.parametrize("size", [-1, None, "3", float("nan")])
def test_a_wrong_size_is_for_its_call_alone(size: Any) -> None:
    @serve.batch(batch_wait_timeout_s=0.01, batch_size_fn=lambda items: items[0])
    async def echo(items: list[Any]) -> list[Any]:
        return items

    async def main() -> None:
        good, bad = await both(echo(1), echo(size))  # type: ignore[arg-type]
        assert good == 1
        assert "batch_size_fn gave" in str(bad)

    run(main())


def test_it_travels_after_it_was_used() -> None:
    @serve.batch
    async def double(items: list[int]) -> list[int]:
        return [2 * item for item in items]

    async def main(model: Any, function: Any) -> None:
        assert await both(model.double(1), function(2)) == [2, 4]

    model = Model()
    del model.go
    run(main(model, double))
    run(main(*cloudpickle.loads(cloudpickle.dumps((model, double)))))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_size": 2.5}, "2.5 is not allowed"),
        ({"batch_wait_timeout_s": -1}, "-1 is not a duration"),
        ({"max_concurrent_batches": 0}, "max_concurrent_batches"),
        ({"target_latency_s": 0}, "give more than 0"),
    ],
)
def test_options_are_checked_where_they_are_given(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        serve.batch(**options)


def test_functions_are_checked_where_they_are_decorated() -> None:
    def sync(items: list[int]) -> list[int]:
        return items

    async def nothing() -> list[int]:
        return []

    async def several(*items: list[int]) -> list[int]:
        return items[0]

    async def named(*, items: list[int]) -> list[int]:
        return items

    with pytest.raises(TypeError, match="not an async function.*to_thread"):
        serve.batch(sync)  # type: ignore[type-var]
    for function in (nothing, several, named):
        with pytest.raises(TypeError, match=f"{function.__name__}.. .*parameters"):
            serve.batch(function)


def test_the_adaptive_size_finds_the_time_it_was_given() -> None:
    def took(items: int) -> float:
        return 0.005 + 0.0002 * items

    size = AdaptiveSize(target_s=0.05, maximum=1024)
    seen = [size.took(size.items, took(size.items), present=5000) for _ in range(20)]
    assert seen[:3] == [2, 4, 8]
    assert all(abs(took(items) - 0.05) < 0.002 for items in seen[-5:])
    for _ in range(10):
        size.took(3, took(3), present=5000)  # quick because it was small
    assert size.items == seen[-1]
    size.took(size.items, 0.5, present=5000)
    assert size.items == pytest.approx(seen[-1] / 2, abs=1)
    size.took(size.items, took(size.items), present=10)
    assert size.items == 5  # half of those who are there
    size.took(1, 9.0, present=1)
    assert size.items == 1


def test_an_adaptive_batch_does_not_wait_for_nobody() -> None:
    class Quick:
        sizes: list[int] = []

        @serve.batch(target_latency_s=1, batch_wait_timeout_s=0.5)
        async def echo(self, items: list[int]) -> list[int]:
            self.sizes.append(len(items))
            await asyncio.sleep(0.005)
            return items

    async def main() -> None:
        quick = Quick()
        for _ in range(6):  # grows
            await both(*map(quick.echo, range(64)))
        began = time.perf_counter()
        await both(*map(quick.echo, range(3)))
        assert time.perf_counter() - began < 0.4
        assert max(quick.sizes) >= 16

    run(main())


@pytest.mark.slow
def test_requests_share_batches_that_reconfigure_sets(site: Site) -> None:
    class Sizes:
        def reconfigure(self, config: dict[str, int]) -> None:
            self.sizes.set_max_batch_size(config["size"])  # type: ignore[attr-defined]
            self.sizes.set_batch_wait_timeout_s("5s")  # type: ignore[attr-defined]

        @serve.batch
        async def sizes(self, items: list[Any]) -> list[Any]:
            context = serve.get_replica_context()
            assert context.request_id is None and context.servable_object is self
            return items[1:] if "bad" in items else [(x, len(items)) for x in items]

        async def __call__(self, request: Any) -> Any:
            return await self.sizes(request.query_params["x"])

    def get(x: object) -> httpx.Response:
        return httpx.get(site.at(sizes), params={"x": str(x)}, timeout=20)

    sizes = site.deploy(Sizes, version="1", user_config={"size": 4})
    with ThreadPoolExecutor(20) as pool:
        answers = [response.json() for response in pool.map(get, range(8))]
        assert answers == [[str(n), 4] for n in range(8)]
        handle = sizes.get_handle()
        calls = [handle.sizes.remote(n) for n in range(4)]
        assert [call.result(timeout_s=20) for call in calls] == [
            (n, 4) for n in range(4)
        ]
        assert {r.status_code for r in pool.map(get, [1, 2, 3, "bad"])} == {500}
        sizes.options(user_config={"size": 8}).deploy()
        assert [r.json()[1] for r in pool.map(get, range(8))] == [8] * 8


def test_batched_generators_stream_over_http_and_handles(site: Site) -> None:
    class Count:
        @serve.batch(max_batch_size=2, batch_wait_timeout_s=5)
        async def count(self, to: list[int]) -> AsyncIterator[list[Any]]:
            for step in range(max(to)):
                yield [f"{step}" if step < n else StopIteration for n in to]

        def __call__(self, request: Any) -> Any:
            return self.count(int(request.query_params["x"]))

    def get(x: int) -> str:
        return httpx.get(site.at(count), params={"x": x}, timeout=20).text

    count = site.deploy(Count)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(get, [3, 5])) == ["012", "01234"]
        stream = count.get_handle().options(stream=True).count
        streams = [stream.remote(n) for n in (1, 2)]
        assert list(pool.map(list, streams)) == [["0"], ["0", "1"]]
