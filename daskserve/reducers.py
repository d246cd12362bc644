"""How objects travel that pickle would take by name, or not at all. Any process.

What is made in `__main__` cannot be taken by its name: a replica's `__main__` is
another one. It is made anew there, of the same parts.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import threading
import typing
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import FunctionType
from typing import Any, cast
from weakref import WeakKeyDictionary

import cloudpickle
import typing_extensions


def is_importable(obj: Any) -> bool:
    """Whether a function or class can be found again by module and name.

    Parameters
    ----------
    obj
        A function or class, or what else has a module and a name.

    Returns
    -------
    bool
        False in ``__main__``, whose names mean something else elsewhere, and in modules
        that are registered to travel by value.
    """
    name = getattr(obj, "__module__", None) or ""
    module = sys.modules.get(name)
    if module is None or module.__name__ == "__main__":
        return False
    by_value = cloudpickle.list_registry_pickle_by_value()
    if by_value and any(f"{name}.".startswith(f"{each}.") for each in by_value):
        return False
    try:
        return attrgetter(getattr(obj, "__qualname__", obj.__name__))(module) is obj
    except AttributeError:
        return False


def reduce_by_value(obj: Any) -> Any:
    """Return how to make an object anew, as `__reduce__` does.

    Returns
    -------
    tuple, str or NotImplemented
        The last: pickle and cloudpickle know how.
    """
    kind = type(obj)
    if kind is FunctionType:
        if obj.__code__ is _DISPATCHER and not is_importable(obj):
            return _single_dispatch, (dict(obj.registry),)
        return NotImplemented
    make = _ALWAYS.get(kind)
    if make is not None:
        return make(obj)
    make = BY_NAME.get(kind)
    if make is not None:
        return NotImplemented if is_importable(obj) else make(obj)
    if issubclass(kind, threading.local):
        return kind, ()
    name = _name_of_singleton(obj, kind)
    return NotImplemented if name is None else (_named, name)


def _name_of_singleton(obj: object, kind: type) -> tuple[str, str] | None:
    """Return the module and the name of an object that has nothing but its identity.

    Such as `dataclasses.MISSING`: code asks whether something ``is`` it, and a copy
    never is. Or Quart's and Flask's ``session``, whose copy recurses when it is loaded.
    """
    if kind is object or kind is _local_proxy():
        # It has two names, once multiprocessing is imported.
        main = sys.modules["__main__"]
        for module, there in list(sys.modules.items()):
            held = [] if there is main else list(getattr(there, "__dict__", {}).items())
            found = next((name for name, value in held if value is obj), None)
            if found is not None:
                return module, found
        return None
    try:
        names = _held[kind]
    except KeyError:
        names = _held[kind] = _held_by_its_module(kind)
    except TypeError:  # a metaclass may make classes that are not hashable
        return None
    if names:
        for name, value in names:
            if value is obj and _has_no_state(obj, kind):
                return kind.__module__, name
    return None


def _local_proxy() -> type | None:
    return getattr(sys.modules.get("werkzeug.local"), "LocalProxy", None)


def _held_by_its_module(kind: type) -> list[tuple[str, object]]:
    """Return instances of a class that are globals of its module, and their names."""
    if not kind.__flags__ & _HEAP_TYPE or not is_importable(kind):
        return []
    globals_ = vars(sys.modules[kind.__module__])
    return [(n, value) for n, value in list(globals_.items()) if type(value) is kind]


#: What `_held_by_its_module` found; hardly any class has such instances.
_held: WeakKeyDictionary[type, list[tuple[str, object]]] = WeakKeyDictionary()


def _has_no_state(obj: Any, kind: type) -> bool:
    ways: list[Any] = [kind.__reduce_ex__, kind.__reduce__]
    if ways != [object.__reduce_ex__, object.__reduce__]:
        return False
    try:
        if getattr(obj, "__dict__", None):
            return False
        made, args, *state = obj.__reduce_ex__(4)
    except Exception:  # pickle will say so
        return False
    return args == (kind,) and not any(state)


#: Of classes that are made by a class statement.
_HEAP_TYPE = 1 << 9


def _named(module: str, name: str) -> object:
    __import__(module)
    return getattr(sys.modules[module], name)


def _cached(function: Any, parameters: Mapping[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _single_dispatch(registry: Mapping[type, Callable[..., Any]]) -> Any:
    dispatcher = functools.singledispatch(registry[object])
    for cls, function in registry.items():
        if cls is not object:
            dispatcher.register(cls, function)
    return dispatcher


def _single_dispatch_method(function: Any, dispatcher: Any) -> Any:
    made = functools.singledispatchmethod(function)
    made.dispatcher = dispatcher
    return made


#: What functions have that `functools.singledispatch` makes.
_DISPATCHER = cast(FunctionType, functools.singledispatch(_named)).__code__


def _new_type(name: str, supertype: Any, module: str) -> Any:
    made = typing.NewType(name, supertype)  # type: ignore[misc]
    made.__module__ = module
    return made


def _parameter(kind: Any, name: str, options: Mapping[str, Any]) -> Any:
    return kind(name, **options)


def _reduce_parameter(obj: Any) -> Any:
    options = {
        option: getattr(obj, f"__{option}__")
        for option in ("covariant", "contravariant", "infer_variance", "bound")
        if getattr(obj, f"__{option}__", None)
    }
    return _parameter, (type(obj), obj.__name__, options)


def _type_alias(kind: Any, name: str, value: Any, parameters: tuple[Any, ...]) -> Any:
    return kind(name, value, type_params=parameters)


def _reduce_type_alias(obj: Any) -> Any:
    return _type_alias, (type(obj), obj.__name__, obj.__value__, obj.__type_params__)


def _context_variable(name: str, *default: Any) -> Any:
    if default:
        return contextvars.ContextVar(name, default=default[0])
    return contextvars.ContextVar(name)


def _reduce_context_variable(obj: contextvars.ContextVar[Any]) -> Any:
    arguments = [obj.name]
    with contextlib.suppress(LookupError):
        arguments.append(contextvars.Context().run(obj.get))
    return _context_variable, tuple(arguments)


#: These arrive as new ones: locks that nobody holds, variables that nobody has set.
_ALWAYS: dict[type, Callable[[Any], Any]] = {
    type(threading.Lock()): lambda obj: (threading.Lock, ()),
    type(threading.RLock()): lambda obj: (threading.RLock, ()),
    contextvars.ContextVar: _reduce_context_variable,
    # From Python 3.13 on it has a cache by weak references.
    functools.singledispatchmethod: lambda obj: (
        _single_dispatch_method,
        (obj.func, obj.dispatcher),
    ),
}
#: These are what pickle knows by name.
BY_NAME: dict[type, Callable[[Any], Any]] = {
    functools._lru_cache_wrapper: lambda obj: (
        _cached,
        (obj.__wrapped__, obj.cache_parameters()),
    ),
    typing.NewType: lambda obj: (
        _new_type,
        (obj.__name__, obj.__supertype__, obj.__module__),
    ),
    typing.ParamSpec: _reduce_parameter,
    typing.TypeVarTuple: _reduce_parameter,
    typing_extensions.TypeAliasType: _reduce_type_alias,
    getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType): (
        _reduce_type_alias
    ),
}
