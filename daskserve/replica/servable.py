"""The user's object in a replica: made, called, reconfigured and ended.

Runs on the replica's loop. Sync callables run on one more thread, and so one at a time,
as an actor's methods do; constructors run on the loop, where they find it running.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from daskserve import pickling
from daskserve.ingress import find_ingress
from daskserve.replica.actor import ReplicaSpec
from daskserve.replica.asgi import Lifespan
from daskserve.replica.sync_thread import SyncThread

#: Where an object keeps what ``@serve.multiplexed`` has loaded, each with ``clear()``.
MODELS = "_daskserve_models"
#: Results that nobody can change.
_LASTING = frozenset({type(None), bool, int, float, str, bytes})
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
    deserted_ended
        Called on the loop when a sync call ends that nobody waited for any more.
    """

    def __init__(self, spec: ReplicaSpec, deserted_ended: Callable[[], None]) -> None:
        self.object: Any = None
        #: The ASGI app, if the class has an ingress.
        self.app: ASGIApp | None = None
        #: Sync calls whose callers have gone; their thread cannot be stopped.
        self.deserted = 0
        self.threaded = False
        self.call_s = 0.0
        self._spec = spec
        self._deserted_ended = deserted_ended
        self._lifespan: Lifespan | None = None
        self._takes_arguments: dict[str, bool] = {}
        self._thread: SyncThread | None = None
        self._check_thread: SyncThread | None = None
        #: The thread of the sync ``check_health`` that runs.
        self.checking: int | None = None

    @property
    def state(self) -> dict[str, Any] | None:
        """What the app's lifespan left for its requests."""
        return None if self._lifespan is None else self._lifespan.state

    # Life.

    async def construct(self) -> None:
        """Unpickle the class and make its instance, or unpickle the function."""
        target: Any = pickling.loads(self._spec.code)
        if not isinstance(target, type):
            self.object = target
            return
        args, kwargs = pickling.loads(self._spec.init)
        constructor: Any = inspect.getattr_static(target, "__init__")
        if inspect.iscoroutinefunction(constructor):
            self.object = object.__new__(target)
            await constructor(self.object, *args, **kwargs)
        else:
            self.object = target(*args, **kwargs)

    async def startup(self) -> None:
        """Apply the first ``user_config``; build the app and run its startup hooks."""
        if self._spec.user_config is not None:
            await self.reconfigure(self._spec.user_config)
        ingress = find_ingress(type(self.object))
        if ingress is not None:
            self.app = ingress.build(self.object)
            self._lifespan = Lifespan(self.app)
            await self._lifespan.startup()

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
        await self._invoke(method, (pickling.loads(user_config),), {})

    async def shutdown(self) -> None:
        """Run the app's shutdown hooks, then ``__del__``, sync or async, once."""
        try:
            if self._lifespan is not None:
                await self._lifespan.shutdown()
        finally:
            servable, self.object = self.object, None
            for models in getattr(servable, MODELS, {}).values():
                await models.clear()
            finalizer = getattr(type(servable), "__del__", None)
            if finalizer is not None:
                await self._invoke(finalizer, (servable,), {})
                _disarm(servable)

    async def check_health(self) -> None:
        """Call the user's ``check_health()``, if there is one.

        A sync one has a thread of its own: behind a request that takes long it would
        wait for the only other one, and a replica that is busy is not ill.

        Raises
        ------
        BaseException
            What it raised.
        RuntimeError
            It returned False.
        """
        # The class's: one may have `__getattr__`, and thus anything.
        if not callable(getattr(type(self.object), "check_health", None)):
            return
        method = self.object.check_health
        if inspect.iscoroutinefunction(_bare(method)):
            healthy = await method()
        else:
            healthy = await self._check_sync(method)
            if inspect.isawaitable(healthy):
                healthy = await healthy
        if healthy is False:
            raise RuntimeError("check_health() returned False")

    async def _check_sync(self, method: Callable[[], Any]) -> Any:
        if self._check_thread is None:
            self._check_thread = SyncThread(
                asyncio.get_running_loop(),
                f"daskserve-check-{self._spec.tag}",
                lambda: None,
            )

        def check() -> Any:
            self.checking = threading.get_ident()
            try:
                return method()
            finally:
                self.checking = None

        return await self._check_thread.submit(check).future

    def close(self) -> None:
        """End the threads of sync calls, once they are free."""
        for thread in (self._thread, self._check_thread):
            if thread is not None:
                thread.close()

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
        return await self.call("__call__", (request,), {}, finish)

    async def call(
        self,
        method_name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        finish: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Call a method by name; one that takes nothing is called with nothing.

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
        takes = self._takes_arguments.get(method_name)
        if takes is None:
            takes = self._takes_arguments[method_name] = _takes_arguments(method)
        if not takes:
            args, kwargs = (), {}
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
        step = functools.partial(next, result, _END)
        try:
            while (item := await self._run_sync(step)) is not _END:
                yield item
        finally:
            if inspect.isgenerator(result):
                await self._run_sync(result.close)

    def _method(self, name: str) -> Callable[..., Any]:
        if name == "__call__" and callable(self.object):
            function: Callable[..., Any] = self.object
            return function
        is_function = inspect.isroutine(self.object)
        method = None if is_function else getattr(self.object, name, None)
        if callable(method):
            found: Callable[..., Any] = method
            return found
        there_are = [] if is_function else _public_methods(self.object)
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
    ) -> Any:
        """Call user code, sync code on its thread, and await what it returns."""
        bare = _bare(function)
        if inspect.iscoroutinefunction(bare):
            result = await function(*args, **kwargs)
        elif inspect.isgeneratorfunction(inspect.unwrap(bare)):
            result = function(*args, **kwargs)  # its body runs when it is iterated
        else:
            call = functools.partial(function, *args, **kwargs)
            if finish is not None:
                call = functools.partial(_finished, call, finish)
            result = await self._run_sync(call)
            if type(result) is _Finished:
                return result.value
            if type(result) not in _LASTING and inspect.isawaitable(result):
                result = await result
        return result if finish is None else finish(result)

    async def _run_sync(self, call: Callable[[], Any]) -> Any:
        if self._thread is None:
            self._thread = SyncThread(
                asyncio.get_running_loop(),
                f"daskserve-sync-{self._spec.tag}",
                self._forget_deserted,
            )
        job = self._thread.submit(call)
        try:
            return await job.future
        except asyncio.CancelledError:
            # If it runs on, count it, so that max_ongoing_requests stays true.
            self.deserted += self._thread.desert(job)
            raise

    def _forget_deserted(self) -> None:
        self.deserted -= 1
        self._deserted_ended()


class _Finished:
    """What became of the result of a sync call, on its thread."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _finished(call: Callable[[], Any], finish: Callable[[Any], Any]) -> Any:
    """Call sync user code, and finish what the next call might change."""
    result = call()
    if type(result) in _LASTING or inspect.isawaitable(result):
        return result  # the loop has more time than the one thread
    return _Finished(finish(result))


def _bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind a bound method, a partial or an instance."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or isinstance(function, type):
        return function
    call: Callable[..., Any] = type(function).__call__
    return call


def _takes_arguments(function: Callable[..., Any]) -> bool:
    try:
        return bool(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return True


def _public_methods(servable: object) -> list[str]:
    return [
        name
        for name in dir(servable)
        if not name.startswith("_") and callable(getattr(servable, name, None))
    ]


def _disarm(servable: Any) -> None:
    """Keep the garbage collector from calling ``__del__`` a second time."""
    cls = type(servable)
    quiet = type(cls.__name__, (cls,), {"__slots__": (), "__del__": lambda self: None})
    with contextlib.suppress(TypeError):  # a layout that cannot be swapped
        servable.__class__ = quiet
