"""The user's object in a replica: made, called, reconfigured and ended.

Runs on the replica's loop. Sync callables run on the threads of sync code, one unless
the deployment says otherwise, and so one at a time, as an actor's methods do. A class
without any async method is also made there: what belongs to a thread, such as a sqlite3
connection, works in its methods. Others are made on the loop and find it running.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextvars import Context
from typing import Any

from distributed import Future
from distributed.actor import BaseActorFuture
from starlette.requests import Request
from starlette.types import ASGIApp

from daskserve import pickling
from daskserve.ingress import find_ingress
from daskserve.replica.actor import ReplicaSpec
from daskserve.replica.asgi import Lifespan, LifespanError
from daskserve.replica.client import value_of
from daskserve.replica.context import current_replica
from daskserve.replica.methods import (
    bare,
    is_threaded,
    needs_loop,
    public_methods,
    takes_arguments,
)
from daskserve.replica.sync_thread import SyncThreads
from daskserve.replica.times import Times

#: Where an object keeps what ``@serve.multiplexed`` has loaded, each with ``clear()``.
MODELS = "_daskserve_models"
#: Where a function of ``@serve.multiplexed`` says how many it keeps; None: all.
MODEL_LIMIT = "_daskserve_model_limit"
#: Results that nobody can change.
_LASTING = frozenset({type(None), bool, int, float, str, bytes})
#: Results that stand for others: those of Dask's tasks, and of calls.
_PENDING = (Future, BaseActorFuture)
#: What the end of a sync generator is told by.
_END = object()


class UnknownMethodError(AttributeError):
    """A handle asked for a method that is not there."""


class Servable:
    """The instance of a deployment's class, or its function.

    Parameters
    ----------
    spec
        What to make it of.
    loop
        The replica's loop.
    context
        The variables that code for callers sees. Those that the sync constructor and
        ``reconfigure`` set go there, as they would last on any thread: the settings of
        decimal and numpy are such.
    deserted
        Called on the loop when nobody waits any more for a sync call that runs on.
    deserted_ended
        Called on the loop when such a call ends.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        deserted: Callable[[], None],
        deserted_ended: Callable[[], None],
    ) -> None:
        self.object: Any = None
        #: The ASGI app, if the class has an ingress.
        self.app: ASGIApp | None = None
        #: Makes it, of the instance; None: there is none to be.
        self._build_app: Callable[[object], ASGIApp] | None = None
        #: Whether every call of it runs on the threads of sync code.
        self.threaded = False
        self._spec = spec
        self._context = context
        self._lifespan: Lifespan | None = None
        #: Whether what answers HTTP takes the request, or nothing.
        self._takes_request: bool | None = None
        self._threads = SyncThreads(
            loop,
            f"daskserve-sync-{spec.tag}",
            spec.threads,
            deserted,
            deserted_ended,
        )
        #: Set, but for while the constructor runs on a thread.
        self.constructed = asyncio.Event()
        self.constructed.set()
        #: The thread of the sync ``check_health`` that runs.
        self.checking: int | None = None

    @property
    def state(self) -> dict[str, Any] | None:
        """What the app's lifespan left for its requests."""
        return None if self._lifespan is None else self._lifespan.state

    @property
    def model_limit(self) -> int:
        """How many models its class says it keeps; 0: all, or none says so."""
        members: dict[str, Any] = {}
        for each in reversed(type(self.object).__mro__):
            members |= vars(each)
        functions = filter(inspect.isfunction, members.values())
        limits = [vars(function).get(MODEL_LIMIT) for function in functions]
        return min((limit for limit in limits if limit is not None), default=0)

    # What its threads do.

    @property
    def thread_jobs(self) -> int:
        """Sync calls that wait for a thread or run, deserted ones included."""
        return self._threads.jobs

    def waits_for(self, method_name: str) -> bool:
        """Whether the caller is on a thread of these, and the method runs on one."""
        if not self._threads.is_current:
            return False
        method = self._method(method_name)
        return self.threaded or is_threaded(bare(method))

    @property
    def times(self) -> Times:
        """How long sync calls take on a thread."""
        return self._threads.times

    @property
    def deserted(self) -> int:
        """Sync calls whose callers have gone; their threads cannot be stopped."""
        return self._threads.deserted

    @property
    def abandoned(self) -> tuple[float, int] | None:
        """Since when there has been one of these, on the loop's clock, and its thread.

        Any thread may ask.
        """
        job = self._threads.oldest_deserted
        if job is None or job.deserted_at is None:
            return None
        return job.deserted_at, job.thread

    # Life.

    async def construct(self) -> None:
        """Unpickle the class and make its instance, or unpickle the function."""
        target: Any = pickling.loads(self._spec.code)
        if isinstance(target, type):
            ingress = find_ingress(target)
            if ingress is not None:
                self._build_app = ingress.prepare(target)
            await self._make(target)
        else:
            self.object = target
        self.threaded = is_threaded(self.object)

    async def _make(self, cls: type) -> None:
        def make() -> Any:
            args, kwargs = pickling.loads(self._spec.init)
            return cls(*args, **kwargs)

        constructor: Any = inspect.getattr_static(cls, "__init__")
        if inspect.iscoroutinefunction(constructor):
            args, kwargs = pickling.loads(self._spec.init)
            self.object = object.__new__(cls)
            await constructor(self.object, *args, **kwargs)
        elif needs_loop(cls):
            self.object = make()
        else:
            self.constructed.clear()
            try:
                self.object = await self._run_lasting(make)
            finally:
                self.constructed.set()

    async def startup(self) -> None:
        """Apply the first ``user_config``; build the app and run its startup hooks."""
        if self._spec.user_config is not None:
            await self.reconfigure(self._spec.user_config)
        ingress = find_ingress(type(self.object))
        if self._build_app is not None and ingress is not None:
            try:
                self.app = self._build_app(self.object)
                self._lifespan = Lifespan(self.app)
                await self._lifespan.startup()
            except Exception as err:
                if not ingress.hint:
                    raise
                known = isinstance(err, LifespanError)  # its text ends with the app's
                text = str(err) if known else f"{type(err).__name__}: {err}"
                reason = text.strip().splitlines()[-1]
                raise LifespanError(f"{reason} ({ingress.hint})") from err
            ingress.started()

    async def reconfigure(self, user_config: bytes | None) -> None:
        """Call the user's ``reconfigure``; None, for no config, is not passed on."""
        if user_config is None:
            return
        method = getattr(self.object, "reconfigure", None)
        if method is None:
            raise TypeError(
                f"user_config was given, but deployment {self._spec.deployment!r} has "
                f"no method reconfigure(self, user_config) to take it."
            )
        config = pickling.loads(user_config)
        if inspect.iscoroutinefunction(bare(method)):
            await method(config)
            return
        result = await self._run_lasting(functools.partial(method, config))
        if inspect.isawaitable(result):
            await result

    async def shutdown(self) -> None:
        """Run the app's shutdown hooks, then ``__del__``, sync or async, once."""
        try:
            if self._lifespan is not None:
                await self._lifespan.shutdown()
        finally:
            servable, self.object, self.app = self.object, None, None
            for models in getattr(servable, MODELS, {}).values():
                await models.clear()
            finalizer = getattr(type(servable), "__del__", None)
            if finalizer is not None:
                await self._invoke(finalizer, (servable,), {}, by_caller=False)
                _disarm(servable)

    async def check_health(self) -> bool:
        """Call the user's ``check_health()``, if there is one.

        Returns
        -------
        bool
            False if it is sync and was passed over, for no thread is idle: a replica
            that is busy is not ill, however long it is.

        Raises
        ------
        BaseException
            What it raised.
        RuntimeError
            It returned False.
        """
        # The class's: one may have `__getattr__`, and thus anything.
        if not callable(getattr(type(self.object), "check_health", None)):
            return True
        method = self.object.check_health
        if inspect.iscoroutinefunction(bare(method)):
            healthy = await method()
        elif not self._threads.idle:
            return False
        else:
            healthy = await self._check_on_thread(method)
            if inspect.isawaitable(healthy):
                healthy = await healthy
        if healthy is False:
            raise RuntimeError("check_health() returned False")
        return True

    async def _check_on_thread(self, method: Callable[[], Any]) -> Any:
        def check() -> Any:
            self.checking = threading.get_ident()
            try:
                return method()
            finally:
                self.checking = None

        return await self._run_sync(check, by_caller=False)

    def close(self) -> None:
        """End the threads of sync calls, once they are free; any thread."""
        self._threads.close()

    # Calls.

    async def answer(self, request: Request, finish: Callable[[Any], Any]) -> Any:
        """Answer an HTTP request by ``__call__``, which may take it or nothing.

        `finish` is as for `call`.
        """
        if not callable(self.object):
            raise TypeError(
                f"Deployment {self._spec.deployment!r} cannot answer HTTP: its class "
                f"has neither __call__ nor @serve.ingress(app)."
            )
        if self._takes_request is None:
            self._takes_request = takes_arguments(self.object)
        args = (request,) if self._takes_request else ()
        return await self._invoke(self.object, args, {}, finish)

    async def call(
        self,
        method_name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        finish: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Call a method by name.

        Parameters
        ----------
        method_name, args, kwargs
            What is called.
        finish
            Makes of the result what is returned, before the next call of a sync method
            may change it.

        Raises
        ------
        UnknownMethodError
            There is none of this name; the text lists those there are.
        """
        method = self._method(method_name)
        return await self._invoke(method, args, kwargs, finish)

    async def iterate(
        self, result: Iterator[Any] | AsyncIterator[Any]
    ) -> AsyncGenerator[Any, None]:
        """Yield the items of a generator; the body of a sync one runs on its thread."""
        if isinstance(result, AsyncIterator):
            try:
                async for item in result:
                    yield item
            finally:
                if inspect.isasyncgen(result):
                    await result.aclose()
            return
        steps = _Steps(result)
        try:
            while (item := await self._run_sync(steps.next)) is not _END:
                yield item
        finally:
            # Not deserted when this is cancelled: it is to run, after the last step.
            await self._threads.submit(steps.close, by_caller=False).future

    def _method(self, name: str) -> Callable[..., Any]:
        if name == "__call__" and callable(self.object):
            function: Callable[..., Any] = self.object
            return function
        is_function = inspect.isroutine(self.object)
        method = None if is_function else getattr(self.object, name, None)
        if callable(method):
            found: Callable[..., Any] = method
            return found
        there_are = [] if is_function else public_methods(self.object)
        if callable(self.object):
            there_are.insert(0, "__call__")
        raise UnknownMethodError(
            f"Deployment {self._spec.deployment!r} has no method {name!r}; "
            f"it has {there_are}."
        )

    async def _invoke(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        finish: Callable[[Any], Any] | None = None,
        *,
        by_caller: bool = True,
    ) -> Any:
        """Call user code, sync code on a thread of it, and await what it returns."""
        plain = bare(function)
        if inspect.iscoroutinefunction(plain):
            result = await function(*args, **kwargs)
            if type(result) not in _LASTING and isinstance(result, _PENDING):
                result = await _value(result)
        elif inspect.isgeneratorfunction(inspect.unwrap(plain)):
            result = function(*args, **kwargs)  # its body runs when it is iterated
        else:
            call = functools.partial(function, *args, **kwargs)
            if finish is not None:
                call = functools.partial(_finished, call, finish)
            result = await self._run_sync(call, by_caller)
            if type(result) is _Finished:
                return result.value
            if type(result) not in _LASTING and inspect.isawaitable(result):
                result = await _value(result)
        return result if finish is None else finish(result)

    async def _run_lasting(self, function: Callable[[], Any]) -> Any:
        """Run what is no caller's; the variables that it sets are seen by all calls."""
        job = self._threads.submit(function, by_caller=False)
        result = await job.future
        for variable, value in job.context.items():
            if variable is not current_replica:  # which is each call's own
                self._context.run(variable.set, value)
                variable.set(value)
        return result

    async def _run_sync(self, call: Callable[[], Any], by_caller: bool = True) -> Any:
        job = self._threads.submit(call, by_caller=by_caller)
        try:
            return await job.future
        except asyncio.CancelledError:
            self._threads.desert(job)
            raise


class _Steps:
    """A sync iterator, whose steps may be on several threads but not side by side."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._lock = threading.Lock()

    def next(self) -> Any:
        with self._lock:
            return next(self._iterator, _END)

    def close(self) -> None:
        with self._lock:
            if inspect.isgenerator(self._iterator):
                self._iterator.close()


class _Finished:
    """What became of the result of a sync call, on its thread."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


async def _value(result: Any) -> Any:
    # A future of a client on another loop would block this one.
    return await (value_of(result) if isinstance(result, Future) else result)


def _finished(call: Callable[[], Any], finish: Callable[[Any], Any]) -> Any:
    """Call sync user code, and finish what the next call might change."""
    result = call()
    if type(result) in _LASTING or inspect.isawaitable(result):
        return result  # the loop has more time than the one thread
    return _Finished(finish(result))


def _disarm(servable: Any) -> None:
    """Keep the garbage collector from calling ``__del__`` a second time."""
    cls = type(servable)
    quiet = type(cls.__name__, (cls,), {"__slots__": (), "__del__": lambda self: None})
    with contextlib.suppress(TypeError):  # a layout that cannot be swapped
        servable.__class__ = quiet
