"""Where in user code something is that cannot travel, or is large: for what users read.

What pickle has in hand when it fails may be deep inside a library's object. It is named
with the way to it, or to the innermost object around it to which there is one.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from starlette.datastructures import State

from daskserve.reducers import is_importable

#: How many objects are looked at to find the way to one.
_MAX_SEARCHED = 50_000
#: From this size on a pickle of code is larger than anybody expects.
LARGE_CODE_BYTES = 2**20
#: What pickle knows without asking.
_NATIVE = {type(None), bool, int, float, str, bytes, tuple, list, dict, set, frozenset}
#: The steps of a pickle in which other code runs when it is loaded.
_STEPS = (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD)


def failing(obj: object, maker: Any) -> list[object]:
    """Return what `obj` is pickled by way of when that fails, outermost first.

    Parameters
    ----------
    obj
        What was to be pickled.
    maker
        A pickler of the kind that has failed, not used before.

    Returns
    -------
    list
        Objects, each inside the one before it; empty if nothing fails.
    """
    trace = _Trace(maker)
    try:
        trace.dump(obj)
    except RecursionError:
        return []
    except Exception:
        return trace.inside
    return []


def unloadable(obj: object, maker: Any, data: bytes, shared: Any) -> list[object]:
    """Return the objects around the one that cannot be loaded again; see `failing`."""
    unpickler = _CountingUnpickler(data, shared)
    try:
        unpickler.load()
    except Exception:
        trace = _Trace(maker, unpickler.step)
        try:
            trace.dump(obj)
        except Exception:
            return trace.found
        return trace.found
    return []


def largest(obj: object, maker: Any) -> tuple[list[object], int]:
    """Return the objects around the innermost one that makes up half of a pickle.

    Returns
    -------
    list, int
        As `failing`, and its size in bytes.
    """
    trace = _Trace(maker)
    trace.dump(obj)
    half = trace.size / 2
    return next((inside, size) for size, inside in trace.large if size >= half)


def describe(inside: list[object], root: object) -> str:
    """Say what the last of some objects is, and where in `root`; or nothing.

    Parameters
    ----------
    inside
        Objects, each inside the one before it.
    root
        What users know, and ways begin at.
    """
    culprit = inside[-1] if inside else None
    if culprit is None or culprit is root:
        return ""
    for outer in reversed(inside):
        if outer is not root and (path := _find(outer, root)) is not None:
            text = f"{path} is a {_kind(outer)} object"
            if outer is not culprit:
                text += f", and a {_kind(culprit)} object is in it"
            return text
    return f"a {_kind(culprit)} object is in it"


def _kind(obj: object) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


class _Trace(pickle._Pickler):
    """Pickle into nothing, and know what is inside what.

    The pickler in Python does the same steps as the one in C, which tells nobody.
    """

    def __init__(self, maker: Any, until: tuple[bytes, int] | None = None) -> None:
        super().__init__(io.BytesIO(), 5)
        self.dispatch_table = maker.dispatch_table
        self._reduce = maker.reducer_override
        self.inside: list[object] = []
        self.size = 0
        #: Sizes of what is large, and what it was inside of.
        self.large: list[tuple[int, list[object]]] = []
        #: What was around the object of the step that was looked for.
        self.found: list[object] = []
        self._persistent_id = getattr(maker, "persistent_id", None)
        self._until = until
        self._steps = dict.fromkeys(_STEPS, 0)
        # Nothing is kept of what is written.
        self.write = self._count
        self._write_large_bytes = lambda head, data: self._count(head + bytes(data))

    def persistent_id(self, obj: Any) -> Any:
        return None if self._persistent_id is None else self._persistent_id(obj)

    def reducer_override(self, obj: Any) -> Any:
        # The one in C does not ask about these.
        return NotImplemented if type(obj) in _NATIVE else self._reduce(obj)

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        self.inside.append(obj)
        before = self.size
        super().save(obj, save_persistent_id)  # type: ignore[misc]
        if self.size - before >= LARGE_CODE_BYTES / 2:
            self.large.append((self.size - before, list(self.inside)))
        self.inside.pop()

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        if type(data) is bytes and data in self._steps:
            self._steps[data] += 1
            if (data, self._steps[data]) == self._until:
                self.found = list(self.inside)


class _CountingUnpickler(pickle._Unpickler):
    """Load, and know which step it is at."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes, shared: Sequence[object]) -> None:
        super().__init__(io.BytesIO(data))
        self._shared = shared
        self._steps = dict.fromkeys(_STEPS, 0)
        #: The step that has begun, and not ended.
        self.step: tuple[bytes, int] | None = None

    def persistent_load(self, pid: Any) -> object:
        return self._shared[pid]


def _counted(code: bytes) -> Callable[[Any], None]:
    load: Callable[[Any], None] = pickle._Unpickler.dispatch[code[0]]

    def counted(unpickler: _CountingUnpickler) -> None:
        unpickler._steps[code] += 1
        unpickler.step = code, unpickler._steps[code]
        load(unpickler)
        unpickler.step = None

    return counted


_CountingUnpickler.dispatch |= {code[0]: _counted(code) for code in _STEPS}


def _find(target: object, root: object) -> str | None:
    """Return the shortest way from ``root`` to ``target`` as text."""
    start = getattr(root, "__qualname__", type(root).__name__)
    seen, queue = {id(root)}, deque([(start, root)])
    while queue and len(seen) < _MAX_SEARCHED:
        path, obj = queue.popleft()
        # What users' objects answer when they are looked at is anything.
        with contextlib.suppress(Exception):
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
