"""User code and apps as opaque bytes: made where users call, read in a replica.

cloudpickle, plus what FastAPI apps need, plus errors that say what is in the way.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import pickletools
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

import cloudpickle
from starlette.datastructures import State

from daskserve.annotations import names_in_annotations
from daskserve.culprits import LARGE_CODE_BYTES, describe, failing, largest
from daskserve.exceptions import PicklingError
from daskserve.reducers import reduce_by_value

_PROTOCOL = 5
#: What cloudpickle writes in place of a file's name.
_DYNAMIC_CODE = "<dynamic-code>"
#: It loads in a replica all right, and fails there with each request.
_DJANGO = (
    "a Django app needs its process's settings, which do not travel with it: a "
    "function can set DJANGO_SETTINGS_MODULE and return get_asgi_application()"
)
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

    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], bool] | None = None,
    ) -> None:
        super().__init__(file, _PROTOCOL, buffer_callback)

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what pickle and cloudpickle cannot, or not so that it loads."""
        kind = type(obj)  # not `isinstance`: there are objects whose __class__ raises
        blank = (kind,)
        if issubclass(kind, State):
            # Its __getattr__ recurses for ever on an instance without its __dict__,
            # which is what pickle asks for __setstate__.
            return copyreg.__newobj__, blank, vars(obj), None, None, _fill  # type: ignore[attr-defined]
        if obj is _unset():
            return "_Unset"  # by name: FastAPI asks whether a default is this object
        if kind.__module__ == "pydantic._internal._mock_val_ser":
            # So do these, before pydantic 2.14: they stand for what an annotation
            # that cannot be evaluated yet will give.
            return copyreg.__newobj__, blank, _slots(obj), None, None, _set  # type: ignore[attr-defined]
        django = sys.modules.get("django.core.handlers.base")
        if django is not None and issubclass(kind, django.BaseHandler):
            raise pickle.PicklingError(_DJANGO)
        if (reduce := getattr(kind, "__daskserve_reduce__", None)) is not None:
            return reduce(obj)
        if (reduced := reduce_by_value(obj)) is not NotImplemented:
            return reduced
        if kind is CodeType:
            make, args = self.dispatch_table[CodeType](obj)
            # From 3.1.3 on cloudpickle leaves the file's name out, and without it
            # tracebacks from replicas have no source lines.
            names = {_DYNAMIC_CODE: obj.co_filename}
            return make, tuple(
                names.get(arg, arg) if isinstance(arg, str) else arg for arg in args
            )
        reduced = super().reducer_override(obj)
        if kind is FunctionType and isinstance(reduced, tuple):
            # cloudpickle takes the globals along that the code names; FastAPI also
            # evaluates annotations, which may be strings.
            _, slots = reduced[2]
            slots["__globals__"] |= {
                name: obj.__globals__[name]
                for name in names_in_annotations(obj)
                if name in obj.__globals__
            }
        return reduced


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
            where = describe(failing(obj, pickler(io.BytesIO())), root)
            text = f"{what} cannot be pickled: {where}{where and ': '}{err}"
            raise PicklingError(text) from err
        return file.getvalue()


def check_code(data: bytes, obj: object, *, what: str) -> None:
    """Look at user code that was pickled for what shows in a replica only.

    Parameters
    ----------
    data
        What `dumps` made of it.
    obj
        The class or function.
    what
        How errors name it.

    Raises
    ------
    PicklingError
        It has a part that would be looked for by its name in ``__main__``, which is
        another module in a replica.

    Warns
    -----
    UserWarning
        It is larger than 1 MiB: a global that it uses is, most of the time.
    """
    for module, name in names_in(data):
        if module == "__main__":
            text = (
                f"{what} cannot be pickled: {name!r} of __main__ would be looked for "
                "by this name in a replica, whose __main__ is another module. Make it "
                "in the constructor, or in a module that workers can import."
            )
            raise PicklingError(text)
    if len(data) > LARGE_CODE_BYTES:
        inside, size = largest(obj, Pickler(io.BytesIO()))
        where = describe(inside, obj) or "no part of it stands out"
        text = (
            f"The code of {what} is {len(data) / 2**20:.1f} MiB large: {where}, of "
            f"{size / 2**20:.1f} MiB. It is sent to each replica, and kept with each "
            "version. Load it in the constructor, or bind it as an argument."
        )
        warnings.warn(text, stacklevel=2)


def names_in(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield the module and the name of all that a pickle takes by its name."""
    pushed: list[str] = ["", ""]
    memo: list[str] = []
    last = ""
    argument: Any
    for step, argument, _ in pickletools.genops(data):
        if step.name == "MEMOIZE":
            memo.append(last)
        elif step.name == "STACK_GLOBAL":
            last = ""
            yield pushed[0], pushed[1]
        else:
            last = ""
            if step.name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"):
                last = argument
            elif step.name in ("BINGET", "LONG_BINGET"):
                last = memo[argument]
            pushed = [pushed[1], last]


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
        A module, or a name in one, is missing in this process; or what makes a part of
        the object raises.

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
    except pickle.UnpicklingError:
        raise
    except Exception as err:
        raise PicklingError(
            f"What was pickled cannot be loaded: {type(err).__name__}: {err}. A part "
            "of it does not travel: make it where it is used, in a constructor or a "
            "function."
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
