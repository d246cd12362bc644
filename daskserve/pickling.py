"""User code and apps as opaque bytes: made where users call, read in a replica.

cloudpickle, plus what FastAPI apps need, plus errors that say what is in the way.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import io
import pickle
import symtable
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import attrgetter
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import cloudpickle
from starlette.datastructures import State

from daskserve.exceptions import PicklingError

_PROTOCOL = 5
#: Set in code that was compiled with ``from __future__ import annotations``.
_FUTURE_ANNOTATIONS = 0x1000000
#: What cloudpickle writes in place of a file's name.
_DYNAMIC_CODE = "<dynamic-code>"
_LOCK_FACTORIES: dict[type, Callable[[], object]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
}
#: How many objects are looked at to find the way to one that cannot be pickled.
_MAX_SEARCHED = 50_000
_SCALARS = frozenset({type(None), bool, int, float, complex, str})
_KEYS = _SCALARS | {bytes}
#: From this size on `bytes` are not plain: there is a better way for them.
LARGE_BYTES = 64 * 1024
#: How far, and how deep, `is_plain` looks.
_MAX_PLAIN_ITEMS = 100
_MAX_PLAIN_DEPTH = 5


class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc, unused-ignore]
    """A cloudpickle pickler that also takes Starlette's ``State`` and locks.

    Locks arrive as new ones that nobody holds.

    Parameters
    ----------
    file
        Where the bytes go.
    buffer_callback
        Takes buffers that are to stay out; see `pickle.Pickler`.
    """

    #: The object that was about to be pickled last: the culprit when it fails.
    last: object = None

    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], bool] | None = None,
    ) -> None:
        super().__init__(file, _PROTOCOL, buffer_callback)

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what pickle and cloudpickle cannot, or not so that it loads."""
        self.last = obj
        if isinstance(obj, State):
            # Its __getattr__ recurses for ever on an instance without its __dict__,
            # which is what pickle asks for __setstate__.
            blank = (type(obj),)
            return copyreg.__newobj__, blank, vars(obj), None, None, _fill  # type: ignore[attr-defined]
        if obj is _unset():
            return "_Unset"  # by name: FastAPI asks whether a default is this object
        if type(obj).__module__ == "pydantic._internal._mock_val_ser":
            # So do these, before pydantic 2.14: they stand for what an annotation
            # that cannot be evaluated yet will give.
            blank = (type(obj),)
            return copyreg.__newobj__, blank, _slots(obj), None, None, _set  # type: ignore[attr-defined]
        if (reduce := getattr(type(obj), "__daskserve_reduce__", None)) is not None:
            return reduce(obj)
        if make_lock := _LOCK_FACTORIES.get(type(obj)):
            return make_lock, ()
        if isinstance(obj, CodeType):
            make, args = self.dispatch_table[CodeType](obj)
            # From 3.1.3 on cloudpickle leaves the file's name out, and without it
            # tracebacks from replicas have no source lines.
            names = {_DYNAMIC_CODE: obj.co_filename}
            return make, tuple(
                names.get(arg, arg) if isinstance(arg, str) else arg for arg in args
            )
        reduced = super().reducer_override(obj)
        if isinstance(obj, FunctionType) and isinstance(reduced, tuple):
            # cloudpickle takes the globals along that the code names; FastAPI also
            # evaluates annotations, which may be strings.
            _, slots = reduced[2]
            slots["__globals__"] |= {
                name: obj.__globals__[name]
                for name in _names_in_annotations(obj)
                if name in obj.__globals__
            }
        return reduced


def _names_in_annotations(function: FunctionType) -> Iterator[str]:
    annotations = [*function.__annotations__.values()]
    if function.__code__.co_flags & _FUTURE_ANNOTATIONS:
        annotations += _inner_annotations(function.__code__)
    for annotation in annotations:
        if isinstance(annotation, str):
            with contextlib.suppress(SyntaxError):
                # Not by `ast`, which fails in threads side by side (before 3.11.8).
                table = symtable.symtable(annotation, "annotation", "eval")
                yield from table.get_identifiers()


def _inner_annotations(code: CodeType) -> Iterator[str]:
    """Yield the string annotations of functions and classes defined in `code`.

    The compiler leaves those of a function as one tuple of names and strings, and those
    of a class as strings in the code of its body.
    """
    in_class_body = "__annotations__" in code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inner_annotations(constant)
        elif isinstance(constant, tuple):
            yield from (part for part in constant if isinstance(part, str))
        elif in_class_body and isinstance(constant, str):
            yield constant


def _unset() -> object:
    """Return FastAPI's mark of parameters that were not given, where it has its own."""
    return getattr(sys.modules.get("fastapi.datastructures"), "_Unset", None)


def _fill(obj: object, attributes: dict[str, object]) -> None:
    vars(obj).update(attributes)


def _slots(obj: object) -> dict[str, object]:
    names = [
        name for cls in type(obj).__mro__ for name in vars(cls).get("__slots__", ())
    ]
    found = {}
    for name in names:
        with contextlib.suppress(AttributeError):
            found[name] = object.__getattribute__(obj, name)
    return found


def _set(obj: object, attributes: dict[str, object]) -> None:
    for name, value in attributes.items():
        object.__setattr__(obj, name, value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: Any) -> object:
        return self._shared[pid]


def dumps(
    obj: object,
    *,
    what: str,
    pickler: Callable[[io.BytesIO], Pickler] = Pickler,
    within: object = None,
) -> bytes:
    """Pickle user code or a value of the user's.

    Parameters
    ----------
    obj
        What is to travel.
    what
        How errors name it, such as ``"deployment 'Counter'"``.
    pickler
        Makes the pickler; for subclasses that leave parts out.
    within
        The object in which errors say where the culprit is; default ``obj``.

    Returns
    -------
    bytes
        For `loads`.

    Raises
    ------
    PicklingError
        A part of ``obj`` cannot be pickled; the text says which, and where it is.

    Examples
    --------
    >>> loads(dumps([1, 2], what="a list"))
    [1, 2]
    """
    plain = dumps_plain(obj)
    if plain is not None:
        return plain
    return dump(obj, pickler, what=what, within=within)


def dump(
    obj: object,
    pickler: Callable[[io.BytesIO], Pickler],
    *,
    what: str,
    within: object = None,
) -> bytes:
    """Do what `dumps` does, for what is not plain."""
    with io.BytesIO() as file:
        maker = pickler(file)
        try:
            maker.dump(obj)
        except Exception as err:
            root = obj if within is None else within
            text = f"{what} cannot be pickled: {_describe(maker.last, root)}{err}"
            raise PicklingError(text) from err
        return file.getvalue()


def dumps_plain(obj: object) -> bytes | None:
    """Pickle an object that is plain; see `is_plain`.

    Parameters
    ----------
    obj
        Any object.

    Returns
    -------
    bytes or None
        For `loads`; None: it takes more than that.

    Examples
    --------
    >>> loads(dumps_plain([1, 2])), dumps_plain(object())
    ([1, 2], None)
    """
    return pickle.dumps(obj, _PROTOCOL) if is_plain(obj) else None


def loads(
    data: bytes,
    *,
    shared: Sequence[object] = (),
    buffers: Sequence[bytes | memoryview] = (),
) -> Any:
    """Unpickle what `dumps` made.

    Parameters
    ----------
    data
        The bytes.
    shared
        What persistent ids 0, 1, ... in ``data`` stand for.
    buffers
        What was left out of it, in this order.

    Returns
    -------
    object
        The object that was pickled, or its copy.

    Raises
    ------
    PicklingError
        A module, or a name in one, is missing in this process.

    Examples
    --------
    >>> loads(dumps({"a": 1}, what="a dict"))
    {'a': 1}
    """
    try:
        if buffers:
            return pickle.loads(data, buffers=buffers)
        if not shared:
            return pickle.loads(data)
        return _Unpickler(io.BytesIO(data), shared).load()
    except (ImportError, AttributeError) as err:
        raise PicklingError(
            f"User code cannot be loaded in this process: {err}. Its modules must be "
            "importable here in the same version: install them on the workers, send "
            "one file with client.upload_file(...), or call "
            "cloudpickle.register_pickle_by_value(module) before deploying."
        ) from err


def is_plain(obj: object, depth: int = _MAX_PLAIN_DEPTH) -> bool:
    """Whether an object needs nothing that pickle does not have by itself.

    What handles carry mostly is, and looking is quicker than making a `Pickler`.

    Parameters
    ----------
    obj
        Any object.
    depth
        How many containers may be inside each other.

    Returns
    -------
    bool
        True for scalars and small containers of such; False also means "not looked".

    Examples
    --------
    >>> is_plain({"a": [1, 2.0, None]}), is_plain(object()), is_plain([[[[[[]]]]]])
    (True, False, False)
    """
    if type(obj) in _SCALARS:
        return True
    if type(obj) is bytes:
        return len(obj) < LARGE_BYTES
    items: Collection[object]
    if type(obj) is dict:
        if not _KEYS.issuperset(map(type, obj)):
            return False
        items = obj.values()
    elif type(obj) is tuple or type(obj) is list:
        items = obj
    else:
        return False
    if len(items) > _MAX_PLAIN_ITEMS or depth == 0:
        return False
    return _SCALARS.issuperset(map(type, items)) or all(
        is_plain(item, depth - 1) for item in items
    )


def is_importable(obj: Any) -> bool:
    """Whether a function or class can be found again by module and name.

    Parameters
    ----------
    obj
        A function or class.

    Returns
    -------
    bool
        False in ``__main__``, whose names mean something else elsewhere.
    """
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or module.__name__ == "__main__":
        return False
    try:
        return attrgetter(obj.__qualname__)(module) is obj
    except AttributeError:
        return False


def _describe(culprit: object, root: object) -> str:
    """Say where ``culprit`` is in ``root`` and what it is, or nothing."""
    if culprit is None or culprit is root:
        return ""
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}"
    path = _find(culprit, root)
    return f"{path} is a {kind} object: " if path else f"a {kind} object is in it: "


def _find(target: object, root: object) -> str | None:
    """Return the shortest way from ``root`` to ``target`` as text."""
    start = getattr(root, "__qualname__", type(root).__name__)
    seen, queue = {id(root)}, deque([(start, root)])
    while queue and len(seen) < _MAX_SEARCHED:
        path, obj = queue.popleft()
        for step, child in _children(obj):
            if child is target:
                return path + step
            if id(child) not in seen:
                seen.add(id(child))
                queue.append((path + step, child))
    return None


def _children(obj: Any) -> Iterator[tuple[str, object]]:
    """Yield what is pickled along with ``obj``, and how to get there."""
    match obj:
        case str() | bytes() | int() | float() | None | ModuleType():
            return
        case dict():
            yield from ((f"[{key!r}]", value) for key, value in list(obj.items()))
        case list() | tuple() | set() | frozenset():
            for index, item in enumerate(obj):
                # Of a list of routes, the path says more than the position.
                path = getattr(item, "path", None)
                yield f"[{path if isinstance(path, str) else index!r}]", item
        case State():
            yield from ((f".{name}", value) for name, value in obj._state.items())
        case FunctionType():
            if not is_importable(obj):
                yield from _function_children(obj)
        case MethodType():
            yield from ((".__self__", obj.__self__), ("", obj.__func__))
        case functools.partial():
            yield from (("", obj.func), (".args", obj.args), ("", obj.keywords))
        case staticmethod() | classmethod():
            yield "", obj.__func__
        case type():
            if not is_importable(obj):
                yield from ((f".{name}", value) for name, value in vars(obj).items())
        case _:
            yield from _attributes(obj)


def _function_children(function: FunctionType) -> Iterator[tuple[str, object]]:
    of = f" of {function.__name__}()"
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f", closure variable {name!r}{of}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in _global_names(code):
        if name in function.__globals__:
            yield f", global {name!r}{of}", function.__globals__[name]
    for default in function.__defaults__ or ():
        yield f", a default{of}", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f", default {name!r}{of}", default
    yield "", vars(function)


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _attributes(obj: object) -> Iterator[tuple[str, object]]:
    for name, value in getattr(obj, "__dict__", {}).items():
        yield f".{name}", value
    for klass in type(obj).__mro__:
        slots = vars(klass).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(obj, name):
                yield f".{name}", getattr(obj, name)
