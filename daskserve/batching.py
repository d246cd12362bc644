"""``@serve.batch``: what is called for one item at a time answers for many; a replica.

The decisions, when a batch begins and how large it is, are pure; `_Batcher` carries
them out on the loop of whoever calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import math
import numbers
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, overload

from daskserve.config import BatchOptions
from daskserve.replica.context import (
    current_replica,
    get_multiplexed_model_id,
    leave_request,
)
from daskserve.replica.owners import keep, split_owner

F = TypeVar("F", bound=Callable[..., Awaitable[Any] | AsyncIterator[Any]])

#: The largest batch that ``target_latency_s`` may come to.
MAX_ADAPTIVE_SIZE = 1024
#: When nobody has come for this part of the wait, an adaptive batch waits no longer.
_LULL = 0.1
#: Loops may call a timer so much before its time.
_EARLY_S = 0.001
_HOLDER = "_daskserve_batchers"


class AdaptiveSize:
    """Find how many items make a batch that takes as long as it should.

    The size follows the time that the last batch took in proportion, twice or half at
    a time at most. (Additive increase, as in Clipper, NSDI 2017, takes hundreds of
    batches to get from 1 to where a GPU is busy.)

    It stays below half of the items that wait or run: so the next batch gathers while
    one runs, instead of waiting for the callers of that one.

    Parameters
    ----------
    target_s
        Seconds that a batch should take.
    maximum
        Where it ends in any case.

    Examples
    --------
    >>> size = AdaptiveSize(target_s=0.1, maximum=100)
    >>> [size.took(size.items, 0.01 * size.items, present=1000) for _ in range(5)]
    [2, 4, 8, 10, 10]
    >>> size.took(10, 0.4, present=1000)
    5
    """

    def __init__(self, target_s: float, maximum: int) -> None:
        self.items = 1
        self._target_s = target_s
        self._maximum = maximum

    def took(self, items: float, seconds: float, present: float) -> int:
        """Learn from a batch.

        Parameters
        ----------
        items
            How many it had.
        seconds
            How long it took.
        present
            How many waited or ran when it ended, its own included.

        Returns
        -------
        int
            The size from now on.
        """
        ratio = min(2.0, max(0.5, self._target_s / max(seconds, 1e-6)))
        if ratio < 1 or items >= self.items:  # a small quick one tells nothing
            wanted = int(items * ratio + 0.5)
            self.items = max(1, min(wanted, self._maximum, math.ceil(present / 2)))
        return self.items


#: What the end of an item's results is told by.
_END = object()


class Item:
    """One call that waits."""

    __slots__ = (
        "arrived",
        "batch",
        "ended",
        "give",
        "model_id",
        "size",
        "values",
    )

    def __init__(
        self,
        values: tuple[Any, ...],
        arrived: float,
        size: float,
        model_id: str,
        give: Callable[[Any], None],
    ) -> None:
        #: Of the parameters, in their order.
        self.values = values
        self.arrived = arrived
        self.size = size
        self.model_id = model_id
        #: The batch that it is in, once that runs.
        self.batch: _Batch | None = None
        #: Takes the result, or several of a generator and `_END`; exceptions are to be
        #: raised.
        self.give = give
        self.ended = False

    def put(self, result: Any, *, last: bool) -> None:
        """Let the caller have a result."""
        if not self.ended:
            self.ended = last
            self.give(result)


class Waiting(deque[Item]):
    """The calls that wait for a batch of one model, and how large they are together."""

    size: float = 0

    def push(self, item: Item) -> None:
        """Add one at the end."""
        self.append(item)
        self.size += item.size

    def leave(self, item: Item) -> None:
        """Take one out that is in it."""
        self.remove(item)
        self.size -= item.size

    def take(self, size: float) -> list[Item]:
        """Take out what makes a batch of up to a size; one item at least."""
        items: list[Item] = []
        total = 0.0
        while self and (not items or total + self[0].size <= size):
            total += self[0].size
            items.append(self.popleft())
        self.size -= total
        return items


@dataclass(slots=True, eq=False)
class _Batch:
    model_id: str
    items: list[Item]
    task: asyncio.Task[None] | None = None


def when(options: BatchOptions, size: float, waiting: Waiting) -> float:
    """Decide when the next batch begins, if it may.

    Parameters
    ----------
    options
        How calls are gathered.
    size
        How large a batch is aimed for.
    waiting
        What waits, at least one.

    Returns
    -------
    float
        A time on the clock of the arrivals; in the past: at once.
    """
    if waiting.size >= size:
        return waiting[0].arrived
    wait_s = options.batch_wait_timeout_s
    if options.target_latency_s is None:
        return waiting[0].arrived + wait_s
    return min(waiting[0].arrived + wait_s, waiting[-1].arrived + _LULL * wait_s)


class _Batcher:
    """The batches of one method of one object, or of one function."""

    def __init__(
        self,
        function: Callable[..., Any],
        signature: inspect.Signature,
        options: Callable[[], BatchOptions],
        size_fn: Callable[..., float] | None,
    ) -> None:
        self._function = function
        self._signature = signature
        self._names = list(signature.parameters)
        self._options = options
        self._size_fn = size_fn
        self._loop = asyncio.get_running_loop()
        #: By the ids of models.
        self._waiting: dict[str, Waiting] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._adaptive: AdaptiveSize | None = None
        # A batch runs for many requests, and so on behalf of none.
        self._context = contextvars.copy_context()
        self._context.run(leave_request)

    async def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one call as a part of a batch."""
        future = self._loop.create_future()
        item = self._join(args, kwargs, functools.partial(_settle, future))
        try:
            return _raised(await future)
        except asyncio.CancelledError:
            self._leave(item)
            raise

    async def stream(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Answer one call as a part of a batch, step by step."""
        results: asyncio.Queue[Any] = asyncio.Queue()
        item = self._join(args, kwargs, results.put_nowait)
        try:
            while (result := _raised(await results.get())) is not _END:
                yield result
        finally:
            self._leave(item)

    def _join(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        give: Callable[[Any], None],
    ) -> Item:
        values = args
        if kwargs or len(args) != len(self._names):
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = tuple(bound.arguments[name] for name in self._names)
        size = 1 if self._size_fn is None else _size_of(self._size_fn, values)
        model_id = get_multiplexed_model_id()
        item = Item(values, self._loop.time(), size, model_id, give)
        self._waiting.setdefault(item.model_id, Waiting()).push(item)
        self._look()
        return item

    def _leave(self, item: Item) -> None:
        if item.ended:
            return
        item.ended = True
        batch = item.batch
        if batch is None:
            self._waiting[item.model_id].leave(item)
            if not self._waiting[item.model_id]:
                del self._waiting[item.model_id]
        elif batch.task is not None and all(other.ended for other in batch.items):
            batch.task.cancel()

    def _look(self) -> None:
        """Begin what is due; see to it that the rest is looked at in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        options = self._options()
        while self._waiting and len(self._running) < options.max_concurrent_batches:
            size = self._size(options)
            due, model_id = min(
                (when(options, size, waiting), model_id)
                for model_id, waiting in self._waiting.items()
            )
            if due - _EARLY_S > self._loop.time():
                self._timer = self._loop.call_at(due, self._look)
                return
            items = self._waiting[model_id].take(size)
            if not self._waiting[model_id]:
                del self._waiting[model_id]
            batch = _Batch(model_id, items)
            for item in items:
                item.batch = batch
            batch.task = task = self._loop.create_task(
                self._run(batch), context=self._context.copy()
            )
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _size(self, options: BatchOptions) -> int:
        target_s = options.target_latency_s
        if target_s is None:
            return options.max_batch_size
        if self._adaptive is None:
            self._adaptive = AdaptiveSize(target_s, options.max_batch_size)
        return self._adaptive.items

    async def _run(self, batch: _Batch) -> None:
        began = self._loop.time()
        items = batch.items
        leave_request(batch.model_id)
        columns = _columns([item.values for item in items])
        try:
            if inspect.isasyncgenfunction(self._function):
                await self._run_steps(items, columns)
            else:
                results = self._check(await self._function(*columns), len(items))
                for item, result in zip(items, results, strict=True):
                    item.put(result, last=True)
        except BaseException as err:
            cancelled = isinstance(err, asyncio.CancelledError)
            for item in items:
                item.put(asyncio.CancelledError() if cancelled else err, last=True)
            if cancelled:
                raise
        if self._adaptive is not None:
            took_s = self._loop.time() - began
            size = sum(item.size for item in items)
            present = sum(waiting.size for waiting in self._waiting.values())
            present += len(self._running) * size
            self._adaptive.took(size, took_s, present)

    async def _run_steps(self, items: list[Item], columns: list[list[Any]]) -> None:
        async with contextlib.aclosing(self._function(*columns)) as steps:
            async for results in steps:
                checked = self._check(results, len(items))
                for item, result in zip(items, checked, strict=True):
                    if _is_stop(result):
                        item.put(_END, last=True)
                    else:
                        item.put(result, last=isinstance(result, BaseException))
                if all(item.ended for item in items):
                    return
        for item in items:
            item.put(_END, last=True)

    def _check(self, results: Any, number: int) -> Any:
        name = self._function.__qualname__
        if not isinstance(results, (list, tuple)) and not hasattr(results, "__array__"):
            raise TypeError(
                f"batch function {name}() was given {number} items and returned a "
                f"{type(results).__name__}: it has to return a list, with one result "
                f"for each item"
            )
        if len(results) != number:
            raise ValueError(
                f"batch function {name}() was given {number} items and returned "
                f"{len(results)} results: it has to return one for each item"
            )
        return results

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._look()


def _columns(rows: list[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _size_of(size_fn: Callable[..., float], values: tuple[Any, ...]) -> float:
    size: Any = size_fn(*_columns([values]))
    if not (isinstance(size, numbers.Real) and 0 <= float(size) < math.inf):
        raise ValueError(
            f"batch_size_fn gave {size!r} for one item: it has to give a number, how "
            f"large a list of items is"
        )
    return float(size)


def _is_stop(result: object) -> bool:
    kind = result if isinstance(result, type) else type(result)
    return issubclass(kind, StopIteration | StopAsyncIteration)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():  # whose task has been cancelled, but did not run since
        future.set_result(result)


def _raised(result: Any) -> Any:
    """Return a result, or raise it if it is an exception."""
    if isinstance(result, StopIteration):  # a coroutine cannot raise one
        result = RuntimeError(f"user code raised {result!r}")
    if isinstance(result, BaseException):
        raise result
    return result


class _Batchers(dict[tuple[Any, asyncio.AbstractEventLoop], _Batcher]):
    """Batchers of an object, by decorated function and loop.

    They stay behind when it is pickled or copied.
    """

    def forget_closed_loops(self) -> None:
        for key in [key for key in self if key[1].is_closed()]:
            del self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Batchers, ()


class _Settings:
    """Options of a decorated function, which each replica can change for itself."""

    def __init__(self, default: BatchOptions) -> None:
        self._default = default
        self._changed: dict[str | None, BatchOptions] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Settings, (self._default,)

    def of(self, replica_tag: str | None) -> BatchOptions:
        return self._changed.get(replica_tag, self._default)

    def change(self, **values: Any) -> None:
        tag = _replica_tag()
        self._changed[tag] = self.of(tag).replace(**values)


@overload
def batch(function: F, /) -> F: ...


@overload
def batch(
    *,
    max_batch_size: int | None = None,
    batch_wait_timeout_s: str | timedelta | float = 0.01,
    max_concurrent_batches: int = 1,
    target_latency_s: str | timedelta | float | None = None,
    batch_size_fn: Callable[..., float] | None = None,
) -> Callable[[F], F]: ...


def batch(
    function: Any = None,
    /,
    *,
    max_batch_size: int | None = None,
    batch_wait_timeout_s: str | timedelta | float = 0.01,
    max_concurrent_batches: int = 1,
    target_latency_s: str | timedelta | float | None = None,
    batch_size_fn: Callable[..., float] | None = None,
) -> Any:
    """Gather calls of an async method or function into batches.

    It is written for lists: each parameter is a list with the values of all calls, and
    it returns a list with one result for each. It is called for single items, and
    returns the single result. A result that is an exception is raised for its item
    alone; what the function raises is raised for all items of the batch. Calls that
    are cancelled leave their batch, and a batch that nobody waits for is cancelled.

    An async generator yields such lists, and each call is a generator of its own
    results; ``StopIteration`` in place of a result ends it before the others. The
    steps wait for no caller: results that a slow one has not taken are kept.

    A batch has calls for one model only, the one that `get_multiplexed_model_id`
    returns to them and in the batch.

    Parameters
    ----------
    max_batch_size
        The most items in one batch, or their greatest size by `batch_size_fn`; default
        10, and 1024 with `target_latency_s`.
        Calls come from requests: keep ``max_ongoing_requests`` above it.
    batch_wait_timeout_s
        Seconds, or a string such as ``"5ms"``, that the first item waits for others.
    max_concurrent_batches
        How many batches of one replica run at a time.
    target_latency_s
        How long one batch should take: the size that does is found while it runs, and
        a batch waits less when nobody comes. A request may also wait for the batch
        before its own.
    batch_size_fn
        Called with lists of items as the method is, without ``self``; returns how large
        these are together, such as rows or tokens. It is asked for each item by itself,
        and sizes are added. An item that is larger than `max_batch_size` is a batch.

    Returns
    -------
    function
        One that takes and returns single items. In a replica its
        ``set_max_batch_size()`` and ``set_batch_wait_timeout_s()`` change the options
        of that replica, in ``reconfigure()`` for example.

    Raises
    ------
    TypeError
        It is not an ``async def`` with parameters that have names, or `batch_size_fn`
        cannot be called.
    ValueError
        An option is out of range.

    Examples
    --------
    >>> @serve.deployment  # doctest: +SKIP
    ... class Model:
    ...     @serve.batch(max_batch_size=32, batch_wait_timeout_s="5ms")
    ...     async def predict(self, images: list) -> list:
    ...         return list(self.model(np.stack(images)))
    ...
    ...     async def __call__(self, request):
    ...         return await self.predict(await request.json())
    """
    if max_batch_size is None:
        max_batch_size = 10 if target_latency_s is None else MAX_ADAPTIVE_SIZE
    options = BatchOptions(
        max_batch_size=max_batch_size,
        batch_wait_timeout_s=batch_wait_timeout_s,  # type: ignore[arg-type]
        max_concurrent_batches=max_concurrent_batches,
        target_latency_s=target_latency_s,  # type: ignore[arg-type]
    )
    if batch_size_fn is not None and not callable(batch_size_fn):
        raise TypeError(f"@serve.batch: batch_size_fn={batch_size_fn!r} is no function")
    if function is None:
        return functools.partial(_decorate, options=options, size_fn=batch_size_fn)
    return _decorate(function, options, batch_size_fn)


def _decorate(
    function: Any, options: BatchOptions, size_fn: Callable[..., float] | None
) -> Any:
    _check_function(function)
    settings = _Settings(options)

    def find(args: tuple[Any, ...]) -> tuple[_Batcher, tuple[Any, ...]]:
        owner, args = split_owner(function, args)
        bound = function if owner is None else function.__get__(owner)
        batchers = keep(made if owner is None else owner, _HOLDER, _Batchers)
        batcher = batchers.get(key := (made, asyncio.get_running_loop()))
        if batcher is None:
            batchers.forget_closed_loops()
            tag = _replica_tag()
            batcher = batchers[key] = _Batcher(
                bound, inspect.signature(bound), lambda: settings.of(tag), size_fn
            )
        return batcher, args

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        batcher, args = find(args)
        return await batcher.call(args, kwargs)

    @functools.wraps(function)
    async def stream(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        batcher, args = find(args)
        async with contextlib.aclosing(batcher.stream(args, kwargs)) as results:
            async for result in results:
                yield result

    def set_max_batch_size(max_batch_size: int) -> None:
        settings.change(max_batch_size=max_batch_size)

    def set_batch_wait_timeout_s(
        batch_wait_timeout_s: str | timedelta | float,
    ) -> None:
        settings.change(batch_wait_timeout_s=batch_wait_timeout_s)

    made: Any = stream if inspect.isasyncgenfunction(function) else call
    made.set_max_batch_size = set_max_batch_size
    made.set_batch_wait_timeout_s = set_batch_wait_timeout_s
    return made


def _check_function(function: Any) -> None:
    if not (
        inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    ):
        raise TypeError(
            f"@serve.batch: {function!r} is not an async function: write 'async def', "
            f"with 'await asyncio.to_thread(...)' around what blocks"
        )
    parameters = inspect.signature(function).parameters.values()
    variable = [
        str(p) for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if variable or not parameters:
        found = f"has {', '.join(variable)}" if variable else "has none"
        raise TypeError(
            f"@serve.batch: {function.__qualname__}() needs parameters with names, "
            f"each a list of what calls give for it, and {found}"
        )
    if any(p.kind == p.KEYWORD_ONLY for p in parameters):
        raise TypeError(
            f"@serve.batch: {function.__qualname__}() has parameters that are only "
            f"taken by name; a batch function is called with lists in order"
        )


def _replica_tag() -> str | None:
    context = current_replica.get()
    return None if context is None else context.replica_tag
