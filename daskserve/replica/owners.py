"""Whose methods decorated functions are, and what is kept for them there; pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

_SELF = {("self",), ("cls",)}
#: Whether a class has a function as a method, as far as that was asked.
_methods: WeakKeyDictionary[type, WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()


def split_owner(function: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Tell the object that a function is called as a method of from its arguments.

    Parameters
    ----------
    function
        What was decorated.
    args
        What it is called with.

    Returns
    -------
    owner, args
        The object, None for a function that is no method, and the rest.
    """
    if not args or not (_is_named_so(function) or _has(type(args[0]), function)):
        return None, args
    return args[0], args[1:]


def keep(owner: Any, name: str, make: Callable[[], T]) -> T:
    """Return what an object, a class or a function keeps by a name of ours."""
    try:
        there = vars(owner)
    except TypeError:
        raise TypeError(
            f"{type(owner).__qualname__} objects have no __dict__, in which to keep "
            "batches and models: add '__dict__' to their __slots__"
        ) from None
    if name not in there:
        setattr(owner, name, make())
    kept: T = vars(owner)[name]
    return kept


def _is_named_so(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and code.co_varnames[: code.co_argcount][:1] in _SELF


def _has(cls: type, function: Any) -> bool:
    """Whether a class has a function as a method, under other decorators perhaps."""
    known = _methods.setdefault(cls, WeakKeyDictionary())
    if function not in known:
        known[function] = any(
            _wraps(attribute, function)
            for klass in cls.__mro__
            for attribute in vars(klass).values()
            if not isinstance(attribute, staticmethod)
        )
    return known[function]


def _wraps(attribute: Any, function: Any) -> bool:
    while attribute is not None and attribute is not function:
        attribute = getattr(attribute, "__dict__", {}).get("__wrapped__")
    return attribute is function
