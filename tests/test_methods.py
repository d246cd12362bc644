"""Which classes are made on the loop, and whose calls all run on threads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI

import daskserve as serve
from daskserve.replica.methods import is_threaded, needs_loop


async def wait() -> None: ...


@functools.wraps(wait)
def wrapped(*args: Any) -> Any:
    return wait(*args)


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def call(*args: Any) -> Any:
        return await asyncio.to_thread(function, *args)

    return call


class Sync:
    def __init__(self) -> None: ...

    def __call__(self) -> None: ...

    def check_health(self) -> None: ...


class Generator(Sync):
    def items(self) -> Iterator[int]:
        yield 1


class PrivateGenerator(Sync):
    def _items(self) -> Iterator[int]:
        yield 1


class AsyncGenerator(Sync):
    async def items(self) -> AsyncIterator[int]:
        yield 1


class Async(Sync):
    async def method(self) -> None: ...


class AsyncConstructor(Sync):
    async def __init__(self) -> None: ...  # type: ignore[misc]


class AsyncPrivate(Sync):
    async def _later(self) -> None: ...


class Overridden(Async):
    def method(self) -> None: ...  # type: ignore[override]


class Inherited(Async): ...


class Static(Sync):
    method = staticmethod(wait)


class ByClass(Sync):
    @classmethod
    async def method(cls) -> None: ...


class Partial(Sync):
    method = functools.partialmethod(wait)


class Wrapped(Sync):
    method = wrapped


class WrappedSync(Sync):
    @traced
    def method(self) -> None: ...


class Batched(Sync):
    @serve.batch
    async def method(self, items: list[int]) -> list[int]:
        return items


class Inner(Sync):
    class Other:
        async def method(self) -> None: ...

    @property
    def task(self) -> Any:
        raise AssertionError("it was read")


class Strange(Sync):
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@serve.ingress(FastAPI())
class Ingress: ...


@pytest.mark.parametrize(
    ("cls", "on_loop", "threaded"),
    [
        (Sync, False, True),
        (Generator, False, False),
        (PrivateGenerator, False, True),
        (AsyncGenerator, True, False),
        (Async, True, False),
        (AsyncConstructor, True, True),
        (AsyncPrivate, True, True),
        (Overridden, False, True),
        (Inherited, True, False),
        (Static, True, False),
        (ByClass, True, False),
        (Partial, True, False),
        (Wrapped, True, False),
        (WrappedSync, True, False),
        (Batched, True, False),
        (Inner, False, True),
        (Strange, False, True),
        (Ingress, True, False),
    ],
)
def test_kinds_of_classes(cls: type, on_loop: bool, threaded: bool) -> None:
    assert needs_loop(cls) == on_loop
    assert is_threaded(object.__new__(cls)) == threaded


def test_kinds_of_functions() -> None:
    def plain() -> None: ...

    def items() -> Iterator[int]:
        yield 1

    async def async_items() -> AsyncIterator[int]:
        yield 1

    functions = [plain, functools.partial(plain), len, wait, items, async_items]
    assert [is_threaded(f) for f in functions] == [True] * 3 + [False] * 3
    assert not is_threaded(functools.partial(wait))
    assert not is_threaded(wrapped)


def test_callables_that_an_object_keeps() -> None:
    made: Any = Sync()
    made.method = functools.partial(wait)
    assert not is_threaded(made)
    made = Sync()
    made._method, made.number = wait, 1
    assert is_threaded(made)


def test_classes_are_threaded_as_their_instances_are() -> None:
    class Sync:
        def __call__(self) -> int:
            return 1

    class Mixed(Sync):
        async def other(self) -> int:
            return 2

    assert is_threaded(Sync) and is_threaded(Sync())
    assert not is_threaded(Mixed)


def test_no_limit_is_for_async_code() -> None:
    @serve.deployment(max_ongoing_requests=None)
    async def fine(request: Any) -> str:
        return "x"

    with pytest.raises(ValueError, match="max_ongoing_requests=None is for async code"):

        @serve.deployment(max_ongoing_requests=None)
        def sync(request: Any) -> str:
            return "x"

    @serve.deployment
    class Sync:
        def __call__(self) -> int:
            return 1

    with pytest.raises(ValueError, match="'Sync' is sync: it runs threads=1 calls"):
        Sync.options(max_ongoing_requests=None)
