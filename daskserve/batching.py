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
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, overload

from daskserve.config import BatchOptions
from daskserve.replica.context import current_replica, leave_request

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

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

    def took(self, items: int, seconds: float, present: int) -> int:
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
            self.items = max(1, min(wanted, self._maximum, -(-present // 2)))
        return self.items


class Item:
    """One call that waits."""

    __slots__ = ("arrived", "batch", "future", "values")

    def __init__(
        self, values: tuple[Any, ...], arrived: float, future: asyncio.Future[Any]
    ) -> None:
        #: Of the parameters, in their order.
        self.values = values
        self.arrived = arrived
        self.future = future
        #: The batch that it is in, once that runs.
        self.batch: _Batch | None = None


@dataclass(slots=True, eq=False)
class _Batch:
    items: list[Item]
    #: How many are still waited for.
    wanted: int
    task: asyncio.Task[None] | None = None


def when(options: BatchOptions, size: int, waiting: deque[Item]) -> float:
    """Decide when the next batch begins, if it may.

    Parameters
    ----------
    options
        How calls are gathered.
    size
        How many items are aimed for.
    waiting
        What waits, at least one.

    Returns
    -------
    float
        A time on the clock of the arrivals; in the past: at once.
    """
    if len(waiting) >= size:
        return waiting[0].arrived
    wait_s = options.batch_wait_timeout_s
    if options.target_latency_s is None:
        return waiting[0].arrived + wait_s
    return min(waiting[0].arrived + wait_s, waiting[-1].arrived + _LULL * wait_s)


class _Batcher:
    """The batches of one method of one object, or of one function."""

    def __init__(
        self,
        function: Callable[..., Awaitable[Any]],
        signature: inspect.Signature,
        options: Callable[[], BatchOptions],
    ) -> None:
        self._function = function
        self._signature = signature
        self._names = list(signature.parameters)
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Item] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._adaptive: AdaptiveSize | None = None
        # A batch runs for many requests, and so on behalf of none.
        self._context = contextvars.copy_context()
        self._context.run(leave_request)

    async def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one call as a part of a batch."""
        values = args
        if kwargs or len(args) != len(self._names):
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = tuple(bound.arguments[name] for name in self._names)
        item = Item(values, self._loop.time(), self._loop.create_future())
        self._waiting.append(item)
        self._look()
        try:
            return await item.future
        except asyncio.CancelledError:
            self._leave(item)
            raise

    def _leave(self, item: Item) -> None:
        batch = item.batch
        if batch is None:
            with contextlib.suppress(ValueError):
                self._waiting.remove(item)
        else:
            batch.wanted -= 1
            if batch.wanted == 0 and batch.task is not None:
                batch.task.cancel()

    def _look(self) -> None:
        """Begin what is due; see to it that the rest is looked at in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        options = self._options()
        while self._waiting and len(self._running) < options.max_concurrent_batches:
            size = self._size(options)
            due = when(options, size, self._waiting)
            if due - _EARLY_S > self._loop.time():
                self._timer = self._loop.call_at(due, self._look)
                return
            number = min(size, len(self._waiting))
            items = [self._waiting.popleft() for _ in range(number)]
            batch = _Batch(items, len(items))
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
        try:
            rows = [item.values for item in items]
            columns = [list(column) for column in zip(*rows, strict=True)]
            results = self._check(await self._function(*columns), len(items))
        except asyncio.CancelledError:
            for item in items:
                item.future.cancel()
            raise
        except BaseException as err:
            results = [err] * len(items)
        if self._adaptive is not None:
            took_s = self._loop.time() - began
            present = len(self._waiting) + len(self._running) * len(items)
            self._adaptive.took(len(items), took_s, present)
        for item, result in zip(items, results, strict=True):
            if item.future.done():
                continue
            if isinstance(result, StopIteration):  # a future cannot hold one
                result = RuntimeError(f"user code raised {result!r}")
            if isinstance(result, BaseException):
                item.future.set_exception(result)
            else:
                item.future.set_result(result)

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
) -> Callable[[F], F]: ...


def batch(
    function: Any = None,
    /,
    *,
    max_batch_size: int | None = None,
    batch_wait_timeout_s: str | timedelta | float = 0.01,
    max_concurrent_batches: int = 1,
    target_latency_s: str | timedelta | float | None = None,
) -> Any:
    """Gather calls of an async method or function into batches.

    It is written for lists: each parameter is a list with the values of all calls, and
    it returns a list with one result for each. It is called for single items, and
    returns the single result. A result that is an exception is raised for its item
    alone; what the function raises is raised for all items of the batch. Calls that
    are cancelled leave their batch, and a batch that nobody waits for is cancelled.

    Parameters
    ----------
    max_batch_size
        The most items in one batch; default 10, and 1024 with `target_latency_s`.
        Calls come from requests: keep ``max_ongoing_requests`` above it.
    batch_wait_timeout_s
        Seconds, or a string such as ``"5ms"``, that the first item waits for others.
    max_concurrent_batches
        How many batches of one replica run at a time.
    target_latency_s
        How long one batch should take: the size that does is found while it runs, and
        a batch waits less when nobody comes. A request may also wait for the batch
        before its own.

    Returns
    -------
    function
        One that takes and returns single items. In a replica its
        ``set_max_batch_size()`` and ``set_batch_wait_timeout_s()`` change the options
        of that replica, in ``reconfigure()`` for example.

    Raises
    ------
    TypeError
        It is not an ``async def`` with parameters that have names.
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
    if function is None:
        return functools.partial(_decorate, options=options)
    return _decorate(function, options)


def _decorate(function: Any, options: BatchOptions) -> Any:
    _check_function(function)
    settings = _Settings(options)

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        owner: Any = call
        bound = function
        if _is_method_call(function, args):
            owner, bound, args = args[0], function.__get__(args[0]), args[1:]
        batchers = vars(owner).setdefault(_HOLDER, _Batchers())
        batcher = batchers.get(key := (call, asyncio.get_running_loop()))
        if batcher is None:
            batchers.forget_closed_loops()
            tag = _replica_tag()
            batcher = batchers[key] = _Batcher(
                bound, inspect.signature(bound), lambda: settings.of(tag)
            )
        return await batcher.call(args, kwargs)

    def set_max_batch_size(max_batch_size: int) -> None:
        settings.change(max_batch_size=max_batch_size)

    def set_batch_wait_timeout_s(
        batch_wait_timeout_s: str | timedelta | float,
    ) -> None:
        settings.change(batch_wait_timeout_s=batch_wait_timeout_s)

    made: Any = call
    made.set_max_batch_size = set_max_batch_size
    made.set_batch_wait_timeout_s = set_batch_wait_timeout_s
    return call


def _check_function(function: Any) -> None:
    if not inspect.iscoroutinefunction(function):
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


def _is_method_call(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether the first argument is the object that ``function`` is a method of."""
    return bool(args) and any(
        getattr(vars(cls).get(function.__name__), "__wrapped__", None) is function
        for cls in type(args[0]).__mro__
    )


def _replica_tag() -> str | None:
    context = current_replica.get()
    return None if context is None else context.replica_tag
