"""How arguments, results and exceptions of handle calls become bytes. Any process.

Values are copied even within one process, so that a call means the same wherever the
replica happens to be.
"""

from __future__ import annotations

import io
import traceback
from collections.abc import Hashable, Mapping
from contextvars import ContextVar
from typing import Any

from distributed import Future
from starlette.requests import Request

from daskserve import pickling
from daskserve.exceptions import DeploymentError
from daskserve.transport.messages import Headers

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


class ArgumentPickler(pickling.Pickler):
    """Pickle arguments; Dask futures travel as keys, requests with their bodies."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        #: The Dask futures that were met; whoever made the call keeps them alive.
        self.futures: list[Future[Any]] = []

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what `pickling.Pickler` does not."""
        if isinstance(obj, Future):
            self.futures.append(obj)
            return _value_of, (obj.key,)
        if isinstance(obj, Request):
            scope = {k: obj.scope[k] for k in _REQUEST_SCOPE if k in obj.scope}
            return _request, (scope, obj._body)
        return super().reducer_override(obj)


def dumps_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, what: str
) -> tuple[bytes, list[Future[Any]]]:
    """Pickle the arguments of a call.

    Returns
    -------
    bytes
        For `loads_arguments`.
    list of Future
        The Dask futures among them, at any depth.

    Raises
    ------
    PicklingError
        One of them cannot travel; the text says which.
    """
    futures: list[Future[Any]] = []

    def make(file: io.BytesIO) -> ArgumentPickler:
        pickler = ArgumentPickler(file)
        pickler.futures = futures
        return pickler

    return pickling.dumps((args, kwargs), what=what, pickler=make), futures


def loads_arguments(
    data: bytes, values: Mapping[Hashable, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Unpickle arguments, with `values` in the place of Dask futures, by key."""
    token = _future_values.set(values)
    try:
        args, kwargs = pickling.loads(data)
    finally:
        _future_values.reset(token)
    return args, kwargs


def loads_value(data: bytes) -> Any:
    """Unpickle a result."""
    return pickling.loads(data)


def unread_requests(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Request]:
    """Return the requests among arguments whose bodies have to be read first."""
    return [
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, Request) and not hasattr(value, "_body")
    ]


def describe(error: BaseException) -> tuple[str, str, str, bytes | None]:
    """Return ``(type name, text, traceback, pickled)`` of an exception.

    The last is None if the exception does not survive the journey.
    """
    try:
        text = str(error)
    except Exception as err:
        text = f"<its text cannot be made: {err!r}>"
    formatted = "".join(traceback.format_exception(error))
    pickled = None
    if isinstance(error, Exception):
        try:
            pickled = pickling.dumps(error, what="the exception")
            if type(pickling.loads(pickled)) is not type(error):
                pickled = None
        except Exception:
            pickled = None
    return type(error).__qualname__, text, formatted, pickled


def restore(
    type_name: str, text: str, formatted: str, pickled: bytes | None
) -> Exception:
    """Return the exception that `describe` described, or a `DeploymentError`.

    The traceback in the replica is added to it as a note.
    """
    if pickled is not None:
        try:
            error = pickling.loads(pickled)
        except Exception:
            error = None
        if isinstance(error, Exception):
            error.add_note(f"Traceback in the replica:\n{formatted}")
            return error
    return DeploymentError(type_name, text, formatted)


def _value_of(key: Hashable) -> Any:
    return _future_values.get()[key]


def _request(scope: dict[str, Any], body: bytes) -> Request:
    headers: Headers = scope["headers"]
    request = Request({**scope, "headers": list(headers)})
    request._body = body
    return request
