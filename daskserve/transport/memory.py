"""Memory that is free, but still the process's. Any process."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


def give_back() -> None:
    """Give free memory back to the system, where the C library can (glibc).

    It keeps what is free between what is in use: after a thousand TLS connections some
    ten MiB each time. Takes milliseconds, and up to some tenths of a second where very
    much is free, without the GIL.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return None
