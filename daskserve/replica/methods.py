"""What kinds of methods user code has, and so where it is to run; in a worker, pure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from daskserve.ingress import find_ingress


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind a bound method, a partial or an instance."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or isinstance(function, type):
        return function
    call: Callable[..., Any] = type(function).__call__
    return call


def takes_arguments(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with anything."""
    try:
        return bool(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return True


def public_methods(servable: object) -> list[str]:
    """Return the names of what can be called of an object."""
    return [
        name
        for name in dir(servable)
        if not name.startswith("_") and callable(getattr(servable, name, None))
    ]


def needs_loop(cls: type) -> bool:
    """Whether a class has an async method or an app, and may count on a loop."""
    if find_ingress(cls) is not None:
        return True
    return any(_is_async(member) for _, member in _members(cls))


def is_threaded(servable: Any) -> bool:
    """Whether all calls of an object, a class or a function are sync, no generators."""
    cls = servable if isinstance(servable, type) else type(servable)
    if inspect.isroutine(servable) or isinstance(servable, functools.partial):
        callables = [servable]
    elif find_ingress(cls) is not None:
        return False
    else:
        own = {} if cls is servable else getattr(servable, "__dict__", {})
        callables = [
            member
            for name, member in [*_members(cls), *own.items()]
            if name == "__call__" or not str(name).startswith("_")
        ]
    return not any(_is_async(c) or _is_generator(c) for c in callables)


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what a class has, as it stands there: no descriptor's code runs."""
    for name in dir(cls):
        yield name, inspect.getattr_static(cls, name, None)


def _is_async(member: Any) -> bool:
    return any(
        inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f)
        for f in _functions(member)
    )


def _is_generator(member: Any) -> bool:
    return any(inspect.isgeneratorfunction(f) for f in _functions(member))


def _functions(member: Any) -> tuple[Callable[..., Any], ...]:
    """Return the function of a class's member, and what it is wrapped around."""
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    if isinstance(member, functools.partialmethod):
        member = member.func
    if not callable(member):
        return ()
    function = bare(member)
    return function, inspect.unwrap(function)
