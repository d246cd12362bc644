"""``@serve.multiplexed``: a few of many models in each replica; in a replica.

Which replica gets the requests for a model is `transport.router`'s business, which is
told what is loaded where; here the last used ones are kept.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, overload

from daskserve.config import MultiplexOptions
from daskserve.exceptions import ModelIdError
from daskserve.replica.context import (
    current_replica,
    get_multiplexed_model_id,
    leave_request,
)
from daskserve.replica.owners import keep
from daskserve.replica.servable import MODEL_LIMIT, MODELS

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

logger = logging.getLogger(__name__)

#: How long one more model waits for another to be out of use, in seconds.
PATIENCE_S = 5.0
#: How much the time of loading a model counts beside those before it.
_WEIGHT = 0.3


class _Model:
    """A model that is loaded or on its way, and who uses it."""

    def __init__(self, loading: asyncio.Task[Any]) -> None:
        self.loading = loading
        self.users: set[asyncio.Task[Any]] = set()
        #: It is to be unloaded when nobody uses it any more.
        self.evicted = False
        self.unloaded = False


class Models:
    """The models of one object, the last used ones last.

    Parameters
    ----------
    load
        Loads a model by its id.
    unload
        Called with a model that has been pushed out; sync or async; None for nothing.
    limit
        How many are kept; None for all.
    changed
        Called when others are loaded, or on their way, than before.
    """

    def __init__(
        self,
        load: Callable[[str], Coroutine[Any, Any, Any]],
        unload: Callable[[Any], Any] | None,
        limit: int | None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit = limit
        #: About how many seconds it takes to load one; 0 before the first.
        self.load_s = 0.0
        self._load = load
        self._unload = unload
        self._changed = changed
        #: Done when a model is out of use.
        self._out_of_use: asyncio.Future[None] | None = None
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._unloading: set[asyncio.Task[None]] = set()
        # A model is loaded for all requests, and so on behalf of none.
        self._context = contextvars.copy_context()
        self._context.run(leave_request)

    @property
    def ids(self) -> list[str]:
        """What is loaded or on its way, the last used one last."""
        return list(self._models)

    async def get(self, model_id: str) -> Any:
        """Return a model, loaded once however many ask for it."""
        if model_id not in self._models:
            await self._make_room(model_id)
        model = self._models.get(model_id)
        if model is None:
            task = asyncio.get_running_loop().create_task(
                self._timed_load(model_id), context=self._context.copy()
            )
            model = self._models[model_id] = _Model(task)
            self._changed()
        self._models.move_to_end(model_id)
        self._note_user(model)
        try:
            # Who asked first may go, and others wait.
            return await asyncio.shield(model.loading)
        except BaseException:
            failed = model.loading.done() and not _is_there(model)
            if failed and self._models.get(model_id) is model:
                del self._models[model_id]  # the next one tries again
                self._changed()
            raise

    async def clear(self) -> None:
        """Unload everything."""
        models, self._models = self._models, OrderedDict()
        for model in models.values():
            model.users.clear()
            self._evict(model)
        if self._unloading:
            await asyncio.wait(self._unloading)

    async def _timed_load(self, model_id: str) -> Any:
        began = time.perf_counter()
        model = await self._load(model_id)
        took_s = time.perf_counter() - began
        self.load_s += (took_s - self.load_s) * (_WEIGHT if self.load_s else 1)
        return model

    async def _make_room(self, model_id: str) -> None:
        """Push one out, if there are as many as may be; best one that nobody uses."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        while (
            self.limit is not None
            and len(self._models) >= self.limit
            and model_id not in self._models
        ):
            idle = (key for key, model in self._models.items() if not model.users)
            key = next(idle, None)
            # Who uses one itself, and wants another, would wait for itself.
            uses_one = any(
                asyncio.current_task() in model.users for model in self._models.values()
            )
            if key is not None or uses_one or loop.time() >= deadline:
                self._evict(self._models.pop(key or next(iter(self._models))))
                self._changed()
                continue
            if self._out_of_use is None:
                self._out_of_use = loop.create_future()
            await asyncio.wait(
                [self._out_of_use], timeout=max(0.0, deadline - loop.time())
            )

    def _evict(self, model: _Model) -> None:
        model.evicted = True
        if model.users or model.unloaded:
            return
        model.loading.cancel()
        if _is_there(model):
            model.unloaded = True
            task = asyncio.ensure_future(self._run_unload(model.loading.result()))
            self._unloading.add(task)
            task.add_done_callback(self._unloading.discard)

    async def _run_unload(self, loaded: Any) -> None:
        try:
            if self._unload is not None:
                result = self._unload(loaded)
                if inspect.isawaitable(result):
                    await result
        except Exception:
            logger.exception("a model could not be unloaded")

    def _note_user(self, model: _Model) -> None:
        task = asyncio.current_task()
        assert task is not None
        if task in model.users:
            return

        def ended(task: asyncio.Task[Any]) -> None:
            model.users.discard(task)
            if model.evicted:
                self._evict(model)
            if not model.users and self._out_of_use is not None:
                self._out_of_use.set_result(None)
                self._out_of_use = None

        model.users.add(task)
        task.add_done_callback(ended)


class _Holder(dict[Any, Models]):
    """Models of an object, by decorated function; they stay when it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Holder, ()


def _is_there(model: _Model) -> bool:
    task = model.loading
    return task.done() and not task.cancelled() and task.exception() is None


@overload
def multiplexed(function: F, /) -> F: ...


@overload
def multiplexed(
    *,
    max_num_models_per_replica: int | None = 3,
    unload: Callable[[Any], Any] | None = None,
) -> Callable[[F], F]: ...


def multiplexed(
    function: Any = None,
    /,
    *,
    max_num_models_per_replica: int | None = 3,
    unload: Callable[[Any], Any] | None = None,
) -> Any:
    """Keep the models that an async method or function loads, the last used ones.

    It takes the id of a model and returns the model. However many requests ask for one
    at a time, it is loaded once; when loading fails, all that wait get the error, and
    the next request tries again. Requests that name a model (in the header
    ``serve_multiplexed_model_id``, or by
    ``handle.options(multiplexed_model_id=...)``) go to a replica that has it, a model
    that none has to one with room for it; one that is much asked for is loaded by more
    of them.

    Parameters
    ----------
    max_num_models_per_replica
        How many models a replica keeps, those that are being loaded included; None
        for no limit.
    unload
        Called with each model that is pushed out, and with all when the replica stops;
        sync or async. A model that a request has asked for is in use until that ends.
        One more waits up to 5 s for another to be out of use; after that there may be
        one too many until then.

    Returns
    -------
    function
        One that keeps what it returned. Without an argument it takes the id of the
        request at hand.

    Raises
    ------
    TypeError
        It is not an ``async def`` that takes a model id.
    ValueError
        An option is out of range.

    Examples
    --------
    >>> @serve.deployment  # doctest: +SKIP
    ... class Translator:
    ...     @serve.multiplexed(max_num_models_per_replica=5)
    ...     async def get_model(self, model_id: str):
    ...         return await asyncio.to_thread(load, model_id)
    ...
    ...     async def __call__(self, request):
    ...         model = await self.get_model(serve.get_multiplexed_model_id())
    ...         return model.translate(await request.json())
    """
    options = MultiplexOptions(
        max_num_models_per_replica=max_num_models_per_replica, unload=unload
    )
    if function is None:
        return functools.partial(_decorate, options=options)
    return _decorate(function, options)


def _decorate(function: Any, options: MultiplexOptions) -> Any:
    if not inspect.iscoroutinefunction(function):
        raise TypeError(
            f"@serve.multiplexed: {function!r} is not an async function: write "
            f"'async def', with 'await asyncio.to_thread(...)' around what blocks"
        )
    parameters = len(inspect.signature(function).parameters)
    if parameters not in (1, 2):
        raise TypeError(
            f"@serve.multiplexed: {function.__qualname__}() has {parameters} "
            f"parameters: it has to take a model id, and self if it is a method"
        )

    @functools.wraps(function)
    async def get(*args: Any, **kwargs: Any) -> Any:
        owner: Any = get
        load = function
        if parameters == 2:
            if not args:
                raise TypeError(f"{function.__qualname__}() was called without self")
            owner, load, args = args[0], function.__get__(args[0]), args[1:]
        model_id = _model_id(args, kwargs, function.__qualname__)
        holder = keep(owner, MODELS, _Holder)
        models = holder.get(get)
        if models is None:
            limit = options.max_num_models_per_replica
            changed = _replica_told(owner)
            models = holder[get] = Models(load, options.unload, limit, changed)
        return await models.get(model_id)

    setattr(get, MODEL_LIMIT, options.max_num_models_per_replica)
    return get


def _replica_told(owner: Any) -> Callable[[], None]:
    """Return what tells the replica that other models are loaded than before."""
    context = current_replica.get()
    if context is None or context._replica is None:
        return lambda: None
    replica = context._replica
    return lambda: replica.models_changed(vars(owner)[MODELS].values())


def _model_id(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> str:
    given = [*args, *kwargs.values()]
    if len(given) > 1:
        raise TypeError(f"{name}() takes one model id and was given {given!r}")
    model_id = given[0] if given else get_multiplexed_model_id()
    if not isinstance(model_id, str):
        raise TypeError(f"{name}(): the model id {model_id!r} is not a string")
    if not model_id:
        raise ModelIdError(
            f"{name}(): the request names no model: send the header "
            f"serve_multiplexed_model_id, or call through "
            f"handle.options(multiplexed_model_id=...)"
        )
    return model_id
