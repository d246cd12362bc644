"""Apps frozen for one class where users decorate, and bound in a replica.

A class and a Starlette or FastAPI app come in; out comes a frozen copy of the app with
the routes of other classes left out, and from it apps that are bound to one instance.
"""

from __future__ import annotations

import copyreg
import dataclasses
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, cast

import cloudpickle
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.routing import BaseRoute, Route, Router, WebSocketRoute
from starlette.types import ASGIApp

from daskserve.class_routes import Binding, ClassRoutes, functions_of
from daskserve.culprits import describe, unloadable
from daskserve.exceptions import PicklingError
from daskserve.pickling import Pickler, dumps, loads
from daskserve.reducers import BY_NAME


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FrozenApp:
    """An app as it was when it was frozen, without other classes' routes."""

    #: The pickled app and its own routes, in which functions, classes and what else has
    #: a name are numbers, if they travel by value.
    data: bytes
    #: What the numbers stand for. It travels in one pickle with the class, when that is
    #: deployed: `super()` finds the class itself, a dependency and its override are one
    #: object, and names that were defined after the app are there.
    parts: tuple[Any, ...]
    #: The names by which functions among ``parts`` refer to the app.
    names: frozenset[str]
    #: Whether the app has routes of this class, or had those of another.
    has_class_routes: bool

    def build(self, instance: object) -> ASGIApp:
        """Return a new copy of the app with the class's own routes bound.

        Parameters
        ----------
        instance
            What the methods get as ``self``.

        Returns
        -------
        ASGIApp
            Of the type that was frozen.
        """
        return self.prepare(type(instance))(instance)

    def prepare(self, cls: type) -> Callable[[object], ASGIApp]:
        """Make a copy of the app; return what binds the class's routes, and returns it.

        Code that came by value has the copy for the app from now on.
        """
        app, own = self.load()
        for part in (*self.parts, *functions_of(cls)):
            if isinstance(part, FunctionType) and _has_own_globals(part):
                _point_to(app, part, self.names)

        def bind_routes(instance: object) -> ASGIApp:
            for route, binding in own:
                _bind(route, binding, instance, app)
            if self.has_class_routes and isinstance(app, FastAPI):
                app.openapi_schema = None
            return app

        return bind_routes

    def load(self) -> tuple[ASGIApp, list[tuple[BaseRoute, Binding]]]:
        """Return a new copy of the app, and its own routes."""
        loaded = loads(self.data, shared=self.parts)
        return cast(tuple[ASGIApp, list[tuple[BaseRoute, Binding]]], loaded)


def freeze(app: ASGIApp, cls: type, *, what: str) -> FrozenApp:
    """Freeze a copy of an app for one class.

    Parameters
    ----------
    app
        The app; it is left as it is.
    cls
        The class whose methods are to be bound.
    what
        How errors name the app.

    Returns
    -------
    FrozenApp
        Picklable along with ``cls``.

    Raises
    ------
    PicklingError
        A part of the app cannot travel.
    """
    return _Freezer(cls).freeze(app, what=what)


def check(app: ASGIApp, cls: type, *, what: str) -> None:
    """See whether an app can be frozen for a class, travels and loads; see `freeze`."""
    freezer = _Freezer(cls)
    frozen = freezer.freeze(app, what=what)
    # The methods are the class's: whether they travel is seen when it does.
    plain = [part for part in frozen.parts if not freezer.is_of_class(part)]
    dumps(plain, what=what, within=app)
    try:
        frozen.load()
    except Exception as err:
        where = describe(freezer.find_unloadable(app, frozen), app)
        text = f"{what} does not travel: {where}{where and ': '}{err}"
        raise PicklingError(text) from (err.__cause__ or err)


def bind(app: ASGIApp, instance: object) -> ASGIApp:
    """Bind the class routes of an app that was made in this process.

    Parameters
    ----------
    app
        The app; it is left as it is.
    instance
        What the methods get as ``self``.

    Returns
    -------
    ASGIApp
        A copy that shares with ``app`` all but what FastAPI and Starlette are made of;
        ``app`` itself if it has no class routes.
    """
    frozen = _Sharer(type(instance)).freeze(app, what=f"The app {app!r}")
    return frozen.build(instance) if frozen.has_class_routes else app


class _Freezer:
    """Pickles an app for one class, and collects what comes up meanwhile."""

    def __init__(self, cls: type) -> None:
        self._cls = cls
        self._routes = ClassRoutes(cls)
        self._own: list[tuple[BaseRoute, Binding]] = []
        self._dropped = False
        self._parts: list[Any] = []
        self._part_ids: dict[int, int] = {}
        self._modules = (
            "__main__",
            cls.__module__,
            *cloudpickle.list_registry_pickle_by_value(),
        )

    def freeze(self, app: ASGIApp, *, what: str) -> FrozenApp:
        data = dumps((app, self._own), what=what, pickler=self._pickler, within=app)
        for route, _ in self._own:
            self._routes.check_dependencies(route)
        self._routes.check_app(app, [route for route, _ in self._own])
        names = {
            name
            for part in (*self._parts, *functions_of(self._cls))
            if isinstance(part, FunctionType)
            for name in _names_of(app, part)
        }
        touched = bool(self._own) or self._dropped
        return FrozenApp(data, tuple(self._parts), frozenset(names), touched)

    def find_unloadable(self, app: ASGIApp, frozen: FrozenApp) -> list[object]:
        """Return what is around the part of an app that cannot be loaded again."""
        maker = self._pickler(io.BytesIO())
        return unloadable((app, self._own), maker, frozen.data, frozen.parts)

    def _pickler(self, file: io.BytesIO) -> Pickler:
        return _AppPickler(file, self)

    def part_id(self, obj: Any) -> int | None:
        """Return the number of an object that stays out of the app's pickle."""
        if not self.is_part(obj):
            return None
        if id(obj) not in self._part_ids:
            self._part_ids[id(obj)] = len(self._parts)
            self._parts.append(obj)
        return self._part_ids[id(obj)]

    def is_part(self, obj: Any) -> bool:
        """Whether an object stays out of the app's pickle."""
        if not isinstance(obj, (FunctionType, type, *BY_NAME)):
            return False
        name = f"{obj.__module__}."
        by_value = any(name.startswith(f"{module}.") for module in self._modules)
        return by_value or self.is_of_class(obj)

    def is_of_class(self, obj: object) -> bool:
        """Whether an object is the class or one of its endpoints."""
        return obj is self._cls or self._routes.has_endpoint(obj)

    def keep(self, routes: list[BaseRoute]) -> list[BaseRoute]:
        """Return the routes that this class serves, and remember its own."""
        kept = []
        for route in routes:
            binding = self._routes.binding(route)
            if (
                self._routes.is_overridden(route, routes)
                if binding
                else self._routes.is_foreign(route)
            ):
                self._dropped = True
                continue
            kept.append(route)
            if binding and not any(route is known for known, _ in self._own):
                self._own.append((route, binding))
        return kept


class _Sharer(_Freezer):
    """Leaves out all but what FastAPI and Starlette are made of."""

    def is_part(self, obj: Any) -> bool:
        owner = obj if isinstance(obj, FunctionType) else type(obj)
        package = (owner.__module__ or "").partition(".")[0]
        return isinstance(obj, type) or package not in (
            "builtins",
            "fastapi",
            "starlette",
        )


class _AppPickler(Pickler):
    def __init__(self, file: io.BytesIO, freezer: _Freezer) -> None:
        super().__init__(file)
        self._freezer = freezer

    def persistent_id(self, obj: object) -> int | None:
        return self._freezer.part_id(obj)

    def reducer_override(self, obj: Any) -> Any:
        if issubclass(type(obj), Router):
            return _reduce(obj, routes=self._freezer.keep(obj.routes))
        if issubclass(type(obj), BaseRoute) and dataclasses.is_dataclass(type(obj)):
            # FastAPI's included router: what it has derived from its router's routes
            # is out of date once these are bound.
            return _reduce(obj, **_defaults(obj))
        return super().reducer_override(obj)


class ClassPickler(Pickler):
    """Pickles a class that has an app, and its bases, so that each load is another.

    By the id that cloudpickle gives a class, the replicas of one process would share
    it, and all have the methods that came last: those refer to the app of the last one.

    Parameters
    ----------
    file
        Where the bytes go.
    cls
        The class.
    """

    def __init__(self, file: io.BytesIO, cls: type) -> None:
        super().__init__(file)
        self._classes = cls.__mro__

    def reducer_override(self, obj: Any) -> Any:
        """Leave out the id; see `cloudpickle.cloudpickle._make_skeleton_class`."""
        reduced = super().reducer_override(obj)
        if not isinstance(reduced, tuple) or not isinstance(obj, type):
            return reduced
        make, args, *rest = reduced
        if obj not in self._classes or len(args) != 6:
            return reduced
        return make, (*args[:4], None, *args[5:]), *rest


def _reduce(obj: Any, **changes: object) -> Any:
    return copyreg.__newobj__, (type(obj),), vars(obj) | changes  # type: ignore[attr-defined]


def _defaults(obj: Any) -> dict[str, object]:
    values: dict[str, object] = {}
    for field in dataclasses.fields(obj):
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return values


def _bind(route: Any, binding: Binding, instance: object, app: object) -> None:
    """Set a route up anew, with its options, for a bound endpoint."""
    endpoint = route.endpoint
    if binding == "instance":
        endpoint = MethodType(endpoint, instance)
    elif binding == "class":
        endpoint = MethodType(endpoint, type(instance))
    bases = (APIRoute, APIWebSocketRoute, Route, WebSocketRoute)
    base = next(base for base in bases if isinstance(route, base))
    options = {
        name: getattr(route, name)
        for name, parameter in inspect.signature(base).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or name == "name"
        if _is_set(route, name)
    }
    if base is APIWebSocketRoute and isinstance(app, FastAPI):
        options["dependency_overrides_provider"] = app
    type(route).__init__(route, route.path, endpoint=endpoint, **options)


def _is_set(route: object, option: str) -> bool:
    value = getattr(route, option, None)
    if option == "response_model":
        # The type of a stream's items is not an option but found from annotations,
        # and only if no response model is given.
        return not getattr(route, "stream_item_type", None)
    # A route class of the user's need not know options that are not in use.
    return value is not None and value != {} and value != []


def _names_of(app: object, function: FunctionType) -> Iterator[str]:
    for name, cell in _cells(function):
        if cell.cell_contents is app:
            yield name
    for name, value in list(function.__globals__.items()):
        if value is app:
            yield name


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:  # not assigned yet
            continue
        yield name, cell


def _has_own_globals(function: FunctionType) -> bool:
    """Whether a function was unpickled by value, so that its globals are a copy."""
    module = sys.modules.get(function.__module__)
    return module is None or function.__globals__ is not vars(module)


def _point_to(app: object, function: FunctionType, names: frozenset[str]) -> None:
    """Make ``app`` in user code the app that is served, as it is in one process."""
    for name in names:
        if isinstance(function.__globals__.get(name), type(app)):
            function.__globals__[name] = app
    for name, cell in _cells(function):
        if name in names and isinstance(cell.cell_contents, type(app)):
            cell.cell_contents = app
