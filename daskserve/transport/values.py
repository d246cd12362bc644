"""How arguments and exceptions of handle calls become bytes, and back. Any process.

Values are copied even within one process, so that a call means the same wherever the
replica happens to be.
"""

from __future__ import annotations

import contextlib
import io
import os
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pickle import PickleBuffer
from types import TracebackType
from typing import Any, cast

import tblib.pickling_support
from dask.base import is_dask_collection
from distributed import Future
from distributed.actor import BaseActorFuture
from starlette.requests import Request

from daskserve import packing, pickling
from daskserve.exceptions import DeploymentError, RequestError
from daskserve.packing import Packed
from daskserve.transport.calls import Answer
from daskserve.transport.messages import Headers

#: What raising an exception sets; `__cause__` sets the last.
_RAISED = ("__traceback__", "__context__", "__cause__", "__suppress_context__")
#: Begins the names of daskserve's own files.
_PACKAGE = os.path.join(os.path.dirname(packing.__file__), "")
#: Begins the keys of other calls' results.
_RESULT = "daskserve-result"

_future_values: ContextVar[Mapping[Hashable, Any]] = ContextVar("future-values")

#: What of a request's scope is plain data and travels with it.
_REQUEST_SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
    "path_params",
)


@dataclass(slots=True)
class Awaited:
    """What among a call's arguments has its value elsewhere, or not yet.

    Parameters
    ----------
    compute
        Starts the computation of a Dask collection and returns its future.
    """

    compute: Callable[[Any], Future[Any]]
    #: Dask futures; whoever makes the call keeps them alive.
    futures: list[Future[Any]] = field(default_factory=list)
    #: Answers of other calls, each once.
    answers: list[Answer] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.futures or self.answers)


class ArgumentPickler(pickling.Pickler):
    """Pickle arguments; Dask futures travel as keys, requests with their bodies.

    Parameters
    ----------
    file
        Where the bytes go.
    buffer_callback
        Takes what stays out of the pickle.
    awaited
        Takes note of what has its value elsewhere.
    """

    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[PickleBuffer], bool],
        awaited: Awaited,
    ) -> None:
        super().__init__(file, buffer_callback)
        self._awaited = awaited

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what `pickling.Pickler` does not."""
        awaited = self._awaited
        if isinstance(obj, Future):
            awaited.futures.append(obj)
            return _value_of, (obj.key,)
        if isinstance(obj, BaseActorFuture):
            answer = getattr(obj, "_answer", None)
            if isinstance(answer, Answer):
                if answer not in awaited.answers:
                    awaited.answers.append(answer)
                return _value_of, ((_RESULT, awaited.answers.index(answer)),)
        if hasattr(type(obj), "__dask_graph__") and is_dask_collection(obj):
            awaited.futures.append(future := awaited.compute(obj))
            return _value_of, (future.key,)
        if isinstance(obj, Request):
            scope = {k: obj.scope[k] for k in _REQUEST_SCOPE if k in obj.scope}
            return _request, (scope, obj._body)
        return super().reducer_override(obj)


def pack_arguments(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    what: str,
    compute: Callable[[Any], Future[Any]] | None = None,
) -> tuple[Packed, Awaited]:
    """Pack the arguments of a call.

    Parameters
    ----------
    args, kwargs
        The arguments.
    what
        How errors name them.
    compute
        Starts the computation of a Dask collection and returns its future.

    Returns
    -------
    Packed
        For `unpack_arguments`.
    Awaited
        What has its value elsewhere, at any depth.

    Raises
    ------
    PicklingError
        One of them cannot travel; the text says which.
    """
    awaited = Awaited(compute or _cannot_compute)

    def make(file: io.BytesIO, keep: Callable[[PickleBuffer], bool]) -> ArgumentPickler:
        return ArgumentPickler(file, keep, awaited)

    return packing.pack((args, kwargs), what=what, pickler=make), awaited


def unpack_arguments(
    packed: Packed, values: Mapping[Hashable, Any], results: Sequence[Packed] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Unpack arguments.

    Parameters
    ----------
    packed
        What `pack_arguments` made.
    values
        What stands in the place of Dask futures, by key.
    results
        What stands in the place of other calls' responses, packed.
    """
    if results:
        values = dict(values)
        for number, result in enumerate(results):
            values[_RESULT, number] = packing.unpack(result)
    with given(values):
        args, kwargs = packing.unpack(packed)
    return args, kwargs


@contextlib.contextmanager
def given(values: Mapping[Hashable, Any]) -> Iterator[None]:
    """Let what stands in the place of Dask futures be these, by key, in what loads."""
    token = _future_values.set(values)
    try:
        yield
    finally:
        _future_values.reset(token)


class FuturePickler:
    """Makes picklers that take note of Dask futures.

    They load as their values where these are `given`, else as futures.

    Parameters
    ----------
    make
        Makes the pickler.
    compute
        Starts the computation of a Dask collection and returns its future.
    """

    def __init__(
        self,
        make: Callable[[io.BytesIO], pickling.Pickler],
        compute: Callable[[Any], Future[Any]],
    ) -> None:
        self.futures: dict[int, Future[Any]] = {}
        self._make = make
        self._compute = compute

    def __call__(self, file: io.BytesIO) -> pickling.Pickler:
        """Make one."""
        pickler: Any = self._make(file)
        reduce_others = pickler.reducer_override

        def reduce(obj: Any) -> Any:
            if isinstance(obj, Future):
                self.futures[id(obj)] = obj
                return _value_or_future, (obj.key,)
            if hasattr(type(obj), "__dask_graph__") and is_dask_collection(obj):
                future = self.futures.get(id(obj)) or self._compute(obj)
                self.futures[id(obj)] = future
                return _value_or_future, (future.key,)
            return reduce_others(obj)

        pickler.reducer_override = reduce
        return cast("pickling.Pickler", pickler)


def unread_requests(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Request]:
    """Return the requests among arguments whose bodies have to be read first."""
    return [
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, Request) and not hasattr(value, "_body")
    ]


def format_error(error: BaseException) -> str:
    """Format an exception and where it was raised, from the first line of user code."""
    trace = _users_part(error.__traceback__)
    return "".join(traceback.format_exception(type(error), error, trace))


def describe(error: BaseException) -> tuple[str, str, str, bytes | None]:
    """Return ``(type name, text, traceback, pickled)`` of an exception.

    The last has the traceback and what the exception was raised from, as Dask's have,
    or at least the exception itself; None if it does not survive the journey.
    """
    try:
        text = str(error)
    except Exception as err:
        text = f"<its text cannot be made: {err!r}>"
    formatted = format_error(error)
    pickled = None
    if isinstance(error, Exception):
        raised = {name: getattr(error, name) for name in _RAISED}
        try:
            error.__traceback__ = _users_part(error.__traceback__)
            pickled = _dump_error(error)
            if pickled is None:  # what it was raised from may be why
                error.__cause__ = error.__context__ = error.__traceback__ = None
                pickled = _dump_error(error)
        finally:  # user code may have it, and raise it again
            for name, value in raised.items():
                setattr(error, name, value)
    return type(error).__qualname__, text, formatted, pickled


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Leave out the frames of ours before the first of user code, if there is one."""
    first = trace
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        first = first.tb_next
    return first or trace


def _dump_error(error: Exception) -> bytes | None:
    try:
        tblib.pickling_support.install(error)
        pickled = pickling.dumps(error, what="the exception")
        return pickled if type(pickling.loads(pickled)) is type(error) else None
    except Exception:
        return None


def request_error(error: BaseException) -> RequestError | None:
    """Return the error of ours that is all there is in `error`, or a task group's."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, BaseExceptionGroup):
        leaves = [request_error(each) for each in error.exceptions]
        return leaves[0] if all(leaves) else None
    return error if isinstance(error, RequestError) else None


def restore(
    type_name: str, text: str, formatted: str, pickled: bytes | None
) -> Exception:
    """Return the exception that `describe` described, or a `DeploymentError`.

    Without a traceback of its own, it has the text of that as a note.
    """
    error = load_error(pickled)
    if error is None:
        return DeploymentError(type_name, text, formatted)
    if error.__traceback__ is None:
        error.add_note(f"Traceback in the replica:\n{formatted}")
    return error


def load_error(pickled: bytes | None) -> Exception | None:
    """Return a pickled exception, or None if it is none here."""
    if pickled is None:
        return None
    try:
        error = pickling.loads(pickled)
    except Exception:
        return None
    return error if isinstance(error, Exception) else None


def _cannot_compute(collection: Any) -> Future[Any]:
    raise TypeError(
        f"a Dask collection ({type(collection).__name__}) needs a Dask client, and "
        f"there is none in this process"
    )


def _value_or_future(key: Any) -> Any:
    values = _future_values.get(None)
    return Future(key) if values is None else values[key]


def _value_of(key: Hashable) -> Any:
    return _future_values.get()[key]


def _request(scope: dict[str, Any], body: bytes) -> Request:
    headers: Headers = scope["headers"]
    request = Request({**scope, "headers": list(headers)})
    request._body = body
    return request
