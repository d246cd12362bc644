"""Which names the string annotations of a function's code mention. Any process."""

from __future__ import annotations

import contextlib
import dis
import symtable
from collections.abc import Iterator
from types import CodeType, FunctionType

#: Set in code that was compiled with ``from __future__ import annotations``.
_FUTURE_ANNOTATIONS = 0x1000000
#: The bit for annotations of `MAKE_FUNCTION`, and from 3.13 on of what comes after it.
_ANNOTATED = 4


def names_in_annotations(function: FunctionType) -> Iterator[str]:
    """Yield the names in a function's annotations that are strings.

    Parameters
    ----------
    function
        A function; those that it defines, and classes, count as well.

    Yields
    ------
    str
        Names, perhaps several times; what cannot be parsed has none.
    """
    annotations = [*function.__annotations__.values()]
    if function.__code__.co_flags & _FUTURE_ANNOTATIONS:
        annotations += _inner_annotations(function.__code__)
    for annotation in annotations:
        if isinstance(annotation, str):
            with contextlib.suppress(SyntaxError, ValueError):
                # Not by `ast`, which fails in threads side by side (before 3.11.8).
                table = symtable.symtable(annotation, "annotation", "eval")
                yield from table.get_identifiers()


def _inner_annotations(code: CodeType) -> Iterator[str]:
    """Yield the string annotations of functions and classes defined in `code`.

    The compiler leaves those of a function as a tuple of names and strings, which is
    the last one that is loaded before the function is made; and each of a class as a
    string that is loaded just before ``__annotations__`` is.
    """
    strings: object = ()
    last: object = None
    for step in dis.get_instructions(code):
        match step.opname:
            case "LOAD_CONST":
                last = step.argval
                if isinstance(last, tuple):
                    strings = last
                elif isinstance(last, CodeType):
                    yield from _inner_annotations(last)
            case "MAKE_FUNCTION" | "SET_FUNCTION_ATTRIBUTE":
                if (step.arg or 0) & _ANNOTATED and isinstance(strings, tuple):
                    yield from strings[1::2]
            case "LOAD_NAME" if step.argval == "__annotations__":
                if isinstance(last, str):
                    yield last
