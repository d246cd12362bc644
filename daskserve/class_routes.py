"""Which routes of an app are the methods of a class; where users decorate.

A class and routes come in; for each route it says: ours and how to bind it, another
class's, or plain.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, Literal, cast

from starlette.routing import BaseRoute

#: What an endpoint's first argument is: the instance, its class, or nothing special.
Binding = Literal["instance", "class", "static"]

#: The class that an endpoint was written in, of classes that were decorated. A class
#: that is defined again, as by running a notebook cell twice, does not get the routes
#: of its former self.
_owners: weakref.WeakKeyDictionary[FunctionType, weakref.ref[type]] = (
    weakref.WeakKeyDictionary()
)


class ClassRoutes:
    """Tells a class's own routes from other classes' and from plain ones.

    Parameters
    ----------
    cls
        The class; its bases count as well.
    """

    def __init__(self, cls: type) -> None:
        self._mro = cls.__mro__[:-1]
        self._own: dict[FunctionType, Binding] = {}
        for klass in reversed(self._mro):
            for attribute in vars(klass).values():
                for function in _functions(attribute):
                    self._own[function] = _binding_of(attribute)
                    _owners[function] = weakref.ref(klass)

    def binding(self, route: BaseRoute) -> Binding | None:
        """Return how to bind a route's endpoint, or None if it is not our method."""
        endpoint: object = getattr(route, "endpoint", None)
        if isinstance(endpoint, staticmethod):
            function = cast(FunctionType, endpoint.__func__)
            return "static" if self._owns(function) else None
        if not isinstance(endpoint, FunctionType) or not self._owns(endpoint):
            return None
        return self._own.setdefault(endpoint, _first_argument(endpoint, route))

    def is_foreign(self, route: BaseRoute) -> bool:
        """Whether a route's endpoint is the method of another class."""
        endpoint = getattr(route, "endpoint", None)
        function = getattr(endpoint, "__func__", endpoint)
        if isinstance(endpoint, MethodType) or not isinstance(function, FunctionType):
            return False
        if self._owns(function):
            return False
        if function in _owners:
            return True
        # A class that nobody has decorated so far: its methods would take ``self``
        # from the query, but its static methods are fine as they are.
        return bool(_class_name(function)) and (
            _first_argument(function, route) != "static"
        )

    def is_overridden(self, route: BaseRoute, routes: list[BaseRoute]) -> bool:
        """Whether one of our routes is there again, with a method that overrides it."""
        return any(
            self.binding(other) is not None
            and _key(other) == _key(route)
            and self._depth(other) < self._depth(route)
            for other in routes
        )

    def check_dependencies(self, route: BaseRoute) -> None:
        """Raise if an endpoint depends on a method: FastAPI calls it without self."""
        dependants = [getattr(route, "dependant", None)]
        while dependants:
            dependant = dependants.pop()
            dependants += getattr(dependant, "dependencies", ())
            call = getattr(dependant, "call", None)
            if call is getattr(route, "endpoint", None):
                continue
            if isinstance(call, FunctionType) and self._own.get(call) == "instance":
                raise TypeError(
                    f"{call.__qualname__} cannot be a dependency: FastAPI would take "
                    "its 'self' from the query. Make it a function or a staticmethod, "
                    "or call it in the endpoint."
                )

    def check_app(self, app: Any, own: list[Any]) -> None:
        """Raise if a method is used in a way in which it would get no ``self``.

        Parameters
        ----------
        app
            The app.
        own
            The class's routes in it.
        """
        for use, function in _hooks(app):
            if isinstance(function, FunctionType) and self._own.get(function) == (
                "instance"
            ):
                raise TypeError(
                    f"{function.__qualname__} cannot be {use}: it would be called "
                    "without 'self'. Make it a function or a staticmethod."
                )
        endpoints = {getattr(r.endpoint, "__func__", r.endpoint) for r in own}
        for route in own:
            self._check_endpoint(route, endpoints)

    def _check_endpoint(self, route: Any, endpoints: set[FunctionType]) -> None:
        function = getattr(route.endpoint, "__func__", route.endpoint)
        where = f"the endpoint of {route.path!r}"
        if self.binding(route) == "instance" and not _takes_self(function, route):
            raise TypeError(
                f"{function.__qualname__}, {where}, takes no 'self'. Give it that, or "
                "make it a staticmethod."
            )
        name = function.__name__
        overriding = next((k for k in self._mro if name in vars(k)), None)
        owner = _owners.get(function, lambda: None)()
        if overriding in (None, owner) or name not in vars(owner or object):
            return
        there = set(_functions(vars(overriding)[name]))
        if function in _functions(vars(owner)[name]) and not there & endpoints:
            raise TypeError(
                f"{overriding.__qualname__}.{name} overrides {function.__qualname__}, "
                f"{where}, and is no endpoint: decorate it as well, or give it another "
                "name."
            )

    def has_endpoint(self, function: object) -> bool:
        """Whether this is one of the endpoints found so far."""
        return isinstance(function, FunctionType) and function in self._own

    def _depth(self, route: Any) -> int:
        """Return how far up in the bases a route's method was written."""
        function = getattr(route.endpoint, "__func__", route.endpoint)
        owner = _owners[function]()
        return self._mro.index(owner) if owner in self._mro else len(self._mro)

    def _owns(self, function: FunctionType) -> bool:
        if function in self._own:
            return True
        if function in _owners:
            return _owners[function]() in self._mro
        # The first of two methods of one name is not in the class any more.
        for klass in self._mro:
            if (function.__module__, _class_name(function)) == (
                klass.__module__,
                klass.__qualname__,
            ):
                _owners[function] = weakref.ref(klass)
                return True
        return False


def functions_of(cls: type) -> Iterator[FunctionType]:
    """Yield the methods of a class and of its bases, and what they wrap."""
    for klass in cls.__mro__[:-1]:
        for attribute in vars(klass).values():
            yield from _functions(attribute)


def _hooks(app: Any) -> Iterator[tuple[str, object]]:
    """Yield what an app calls besides endpoints, and as what."""
    for middleware in getattr(app, "user_middleware", ()):
        yield "a middleware", getattr(middleware, "kwargs", {}).get("dispatch")
    for handler in getattr(app, "exception_handlers", {}).values():
        yield "an exception handler", handler
    router = getattr(app, "router", None)
    for hook in getattr(router, "on_startup", ()):
        yield "a startup hook", hook
    for hook in getattr(router, "on_shutdown", ()):
        yield "a shutdown hook", hook


def _takes_self(function: FunctionType, route: Any) -> bool:
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        return False
    # One that is meant for FastAPI would get the instance.
    is_for_route = first.name in getattr(route, "param_convertors", {})
    annotated = first.annotation is not first.empty
    return first.name == "self" or not (is_for_route or annotated)


def _key(route: Any) -> tuple[object, ...]:
    return route.endpoint.__name__, route.path, getattr(route, "methods", None)


def _functions(attribute: object) -> Iterator[FunctionType]:
    """Yield a class attribute's function and what `functools.wraps` says it wraps."""
    function = getattr(attribute, "__func__", attribute)
    while isinstance(function, FunctionType):
        # A plain function may be the attribute of a class without being its method.
        if "." in function.__qualname__:
            yield function
        function = getattr(function, "__wrapped__", None)


def _binding_of(attribute: object) -> Binding:
    if isinstance(attribute, staticmethod):
        return "static"
    return "class" if isinstance(attribute, classmethod) else "instance"


def _class_name(function: FunctionType) -> str:
    """Return the qualified name of the class a function was written in, or ''."""
    parent = function.__qualname__.rpartition(".")[0]
    return "" if parent.endswith("<locals>") else parent


def _first_argument(function: FunctionType, route: BaseRoute) -> Binding:
    """Guess the binding of a function that is no attribute of its class any more."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if (
        first is None
        or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
        or first.default is not first.empty
    ):
        return "static"
    if first.name == "cls":
        return "class"
    if first.name == "self":
        return "instance"
    named_in_path = first.name in getattr(route, "param_convertors", {})
    annotated = first.annotation is not first.empty
    return "static" if annotated or named_in_path else "instance"
