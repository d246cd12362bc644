"""``@ingress(app)``: an ASGI app that travels with a class, built in each replica."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeGuard, TypeVar, cast

from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.types import ASGIApp

from daskserve.exceptions import PicklingError
from daskserve.frozen_app import ClassPickler, FrozenApp, bind, check, freeze
from daskserve.pickling import dumps

T = TypeVar("T")

_ATTRIBUTE = "__daskserve_ingress__"
#: Whose apps have been started in this process.
_started: set[str] = set()
_ACCEPTED = (
    "a FastAPI or Starlette app, a FastAPI APIRouter, an ASGI 3 callable, a function "
    'without arguments that returns one of these, or an import string "module:attr"'
)
_WAY_OUT = (
    " Pass @serve.ingress a function without arguments that makes the app, or an import"
    ' string "module:factory" of one: the app is then made in each replica and need not'
    " travel."
)


@dataclass(frozen=True, slots=True, eq=False)
class Ingress:
    """The app of a class; it is frozen when it is pickled along with the class.

    Parameters
    ----------
    source
        The app, perhaps frozen; or the function or import string that it is made from.
    cls
        The class, for an app that is not frozen.
    """

    source: object
    cls: type | None = None

    def __reduce__(self) -> Any:
        # Frozen now, with all that the app has got since the class was decorated.
        if self.cls is None:
            return Ingress, (self.source,)
        return Ingress, (_told(freeze, _as_asgi(self.source), self.cls),)

    def prepare(self, cls: type) -> Callable[[object], ASGIApp]:
        """Make the app that serves one replica, as far as it can be without it.

        Parameters
        ----------
        cls
            The replica's class: what its constructor does to the app has an effect.

        Returns
        -------
        callable
            `build`.
        """
        if isinstance(self.source, FrozenApp):
            return self.source.prepare(cls)
        return self.build

    def build(self, instance: object) -> ASGIApp:
        """Make the app that serves one replica.

        Parameters
        ----------
        instance
            The replica's instance: what the class's routes get as ``self``.

        Returns
        -------
        ASGIApp
            A copy of its own for every call; of an app that is in a module here and
            has no routes of any class, that app itself.

        Raises
        ------
        PicklingError
            A module or name that the app needs is missing in this process.
        ImportError
            The import string leads nowhere.
        TypeError
            The function or import string does not lead to an app.
        """
        if isinstance(self.source, FrozenApp):
            return self.source.build(instance)
        app: Any = self.source
        if isinstance(app, str):
            app = _import(app)
        if _is_factory(app):
            app = app()
        asgi = _as_asgi(app)
        if asgi is None:
            if inspect.iscoroutine(app):
                app.close()
            raise TypeError(f"{self.source!r} gave {app!r}; it must give {_ACCEPTED}.")
        return bind(asgi, instance)

    def started(self) -> None:
        """Note that an app was made and has started in this process."""
        _started.add(self._name)

    @property
    def hint(self) -> str:
        """What may be wrong with an app that does not start; "" if nothing is known."""
        if isinstance(self.source, FrozenApp) or self._name not in _started:
            return ""
        source = self.source
        if not _is_factory(_import(source) if isinstance(source, str) else source):
            return (
                f"{self._name} is one object for all replicas and versions in a "
                "process and was started here before; if it can start only once, name "
                'a function that makes it: @serve.ingress("module:factory")'
            )
        return (
            f"{self._name} has made an app in this process before, for another replica "
            "or version; what a process has one of, such as Django's settings, must be "
            "left alone then, and of a library with one app for each process, such as "
            "NiceGUI, each replica and version needs a worker of its own"
        )

    @property
    def _name(self) -> str:
        source = self.source
        if isinstance(source, str):
            return repr(source)
        if _is_factory(source):
            return f"{getattr(source, '__qualname__', type(source).__qualname__)}()"
        return f"the app of {self.cls and self.cls.__name__}"


def ingress(app: object) -> Callable[[type[T]], type[T]]:
    """Serve a class's HTTP requests with an ASGI app.

    Methods that the app has as endpoints get the replica's instance as ``self``. Where
    several classes use one app, each serves the app's plain routes and its own.

    The app travels as it is when the class is deployed. In a replica it is there before
    the constructor: what that and ``reconfigure`` do to it, by its global name, has an
    effect. For a class that is imported from a module there, this global is the
    module's app, of which each replica takes a copy when it starts.

    Parameters
    ----------
    app
        A FastAPI or Starlette app, a FastAPI ``APIRouter``, an ASGI 3 callable, a
        function without arguments that returns one of these, or an import string
        ``"module:factory"`` of such a function. Functions and import strings are
        resolved in the replica. An app that is named itself, ``"module:app"``, is one
        object for all replicas and versions in a worker's process.

    Returns
    -------
    callable
        A class decorator; it returns the class itself.

    Raises
    ------
    TypeError
        ``app`` is none of these; what is decorated is not a class; or a method of it is
        used in a way in which it would get no ``self``.
    ValueError
        A string that is not of the form ``"module:attr"``.
    PicklingError
        The app cannot travel to the replicas; the text says what is in the way.

    Examples
    --------
    >>> from fastapi import FastAPI
    >>> app = FastAPI()
    >>> @ingress(app)
    ... class Greeter:
    ...     @app.get("/{name}")
    ...     def greet(self, name: str) -> str:
    ...         return f"Hello {name}"
    """
    if isinstance(app, str):
        if not re.fullmatch(r"[\w.]+:[\w.]+", app):
            raise ValueError(
                f'The import string {app!r} must have the form "module:attr".'
            )
    elif _as_asgi(app) is None and not _is_factory(app):
        raise TypeError(f"@serve.ingress takes {_ACCEPTED}; it was given {app!r}.")

    def decorate(cls: type[T]) -> type[T]:
        if not isinstance(cls, type):
            raise TypeError(
                f"@serve.ingress decorates classes; it was applied to {cls!r}. Put it "
                "below @serve.deployment, next to the class."
            )
        # Not earlier: the class body has given a router its routes since.
        asgi = None if isinstance(app, str) else _as_asgi(app)
        if asgi is not None:
            _told(check, asgi, cls)  # here and now, what is in the way
        setattr(cls, _ATTRIBUTE, Ingress(app, None if asgi is None else cls))
        return cls

    return decorate


def find_ingress(target: object) -> Ingress | None:
    """Return what `ingress` attached to a class or to one of its bases.

    Parameters
    ----------
    target
        Anything that can be deployed.

    Returns
    -------
    Ingress or None
        None for functions and for classes without.

    Examples
    --------
    >>> find_ingress(print) is None
    True
    """
    found = getattr(target, _ATTRIBUTE, None) if isinstance(target, type) else None
    return found if isinstance(found, Ingress) else None


def dump_target(target: Any, what: str) -> bytes:
    """Pickle what is deployed; errors name it as `what`."""
    if find_ingress(target) is None:
        return dumps(target, what=what)
    make = functools.partial(ClassPickler, cls=target)
    return dumps(target, what=what, pickler=make)


def _told(do: Callable[..., T], app: object, cls: type) -> T:
    """Freeze an app, or check that it can be; errors say what else users can do."""
    what = f"The {type(app).__name__} app given to @serve.ingress for {cls.__name__}"
    try:
        return do(app, cls, what=what)
    except PicklingError as err:
        raise PicklingError(f"{err}.{_WAY_OUT}") from (err.__cause__ or err)


def _as_asgi(app: object) -> ASGIApp | None:
    """Return ``app`` as an ASGI app, or None if it is something else."""
    if isinstance(app, APIRouter):
        wrapper = FastAPI()
        wrapper.include_router(app)
        return wrapper
    if isinstance(app, Starlette):
        return app
    # A class that can be made without arguments, such as FastAPI itself, is a factory.
    is_class_factory = isinstance(app, type) and _takes(app, 0)
    return cast(ASGIApp, app) if _takes(app, 3) and not is_class_factory else None


def _is_factory(app: object) -> TypeGuard[Callable[[], object]]:
    return _takes(app, 0) and _as_asgi(app) is None


def _takes(function: object, count: int) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def _import(reference: str) -> object:
    module, _, attribute = reference.partition(":")
    try:
        return attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError) as err:
        raise ImportError(
            f"The ingress app {reference!r} cannot be imported in this process: {err}. "
            "Its module must be importable on the workers: install it there or send it "
            "with client.upload_file(...)."
        ) from err
