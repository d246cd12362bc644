"""Values of the user's as a pickle with the large buffers beside it. Any process.

What has large buffers, as arrays have, would be copied into its pickle and out of it
again; pickle's protocol 5 can leave them out (PEP 574).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any, TypeAlias

from daskserve import pickling

#: From this size on a buffer stays out of the pickle.
LARGE_BYTES = pickling.LARGE_BYTES

#: A pickle, or ``(pickle, buffer, ...)``. What nobody can change is in there as it is,
#: as ``bytes`` or a read-only ``memoryview``; else a copy, as a ``memoryview``.
Packed: TypeAlias = bytes | tuple[Any, ...]
#: Makes a pickler from a file and a callback for buffers.
MakePickler: TypeAlias = Callable[
    [io.BytesIO, Callable[[PickleBuffer], bool]], pickling.Pickler
]


def pack(obj: object, *, what: str, pickler: MakePickler = pickling.Pickler) -> Packed:
    """Pickle a value.

    A later change of the value does not change what was packed: buffers that can be
    written to are copied, once.

    Parameters
    ----------
    obj
        The value. ``bytes`` in it are a buffer if they are large, and either the
        value or in the tuples and dicts that it begins with, two deep: arguments.
    what
        How errors name it.
    pickler
        Makes the pickler.

    Raises
    ------
    PicklingError
        A part of it cannot be pickled; the text says which, and where it is.

    Examples
    --------
    >>> len(pack(([1], {"a": bytes(70_000)}), what="it"))
    2
    >>> unpack(pack(([1], {"a": "b"}), what="it"))
    ([1], {'a': 'b'})
    """
    plain = pickling.dumps_plain(obj)
    if plain is not None:
        return plain
    buffers: list[bytes | memoryview] = []

    def keep(buffer: PickleBuffer) -> bool:
        """Take a buffer, or return True: into the pickle with it."""
        try:
            view = buffer.raw()
        except BufferError:  # it is not in one piece
            return True
        if view.nbytes < LARGE_BYTES:
            return True
        buffers.append(_unchangeable(view))
        return False

    pickle = pickling.dump(
        _without_bytes(obj), lambda file: pickler(file, keep), what=what, within=obj
    )
    return (pickle, *buffers) if buffers else pickle


def unpack(packed: Packed) -> Any:
    """Return what was packed. Its buffers are part of it from then on.

    Raises
    ------
    PicklingError
        A module, or a name in one, is missing in this process.
    """
    if isinstance(packed, bytes):
        return pickling.loads(packed)
    pickle, *buffers = packed
    return pickling.loads(pickle, buffers=buffers)


def copy(packed: Packed) -> Packed:
    """Copy what somebody who has unpacked it may change."""
    if type(packed) is bytes:
        return packed
    return tuple(
        _copy(part) if type(part) is memoryview and not part.readonly else part
        for part in packed
    )


def room_for(size: int) -> memoryview:
    """Return memory for so many bytes; to fill it with zeros would take its time."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return memoryview(bytearray(size))
    room: memoryview = numpy.empty(size, "u1").data
    return room


def _unchangeable(view: memoryview) -> bytes | memoryview:
    if not view.readonly:
        return _copy(view)
    return view.obj if type(view.obj) is bytes else view


def _copy(view: memoryview) -> memoryview:
    room = room_for(view.nbytes)
    room[:] = view
    return room


def _without_bytes(obj: Any, depth: int = 2) -> Any:
    """Mark large ``bytes`` as buffers, which they are not for pickle by themselves."""
    if type(obj) is bytes:
        return obj if len(obj) < LARGE_BYTES else PickleBuffer(obj)
    if depth and type(obj) is tuple:
        return tuple([_without_bytes(item, depth - 1) for item in obj])
    if depth and type(obj) is dict:
        return {key: _without_bytes(item, depth - 1) for key, item in obj.items()}
    return obj
