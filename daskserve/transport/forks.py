"""Children that user code forks do not keep our sockets. Any process.

A listening socket lives for as long as any process has it: with ``SO_REUSEPORT``, the
kernel goes on giving connections to a dead worker whose child is alive, and nobody
accepts them. Likewise a connection does not end with the process that served it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable
from typing import Protocol


class Owner(Protocol):
    """What has sockets."""

    def files(self) -> Iterable[int]:
        """Return the numbers of their files; -1 for one that is closed."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_registered = False


def close_in_children(owner: Owner) -> None:
    """Let children that this process forks be without the files of an owner.

    Whoever runs another program, as `subprocess` does, has none of them anyway.

    Parameters
    ----------
    owner
        Asked in each child for what it has then; for as long as it exists.
    """
    global _registered
    _owners.add(owner)
    if not _registered and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for owner in list(_owners):
        with contextlib.suppress(Exception):  # it was about to end
            for file in list(owner.files()):
                if file >= 0:
                    # Objects that know the number are in the child, too: it is not to
                    # be given to another file that they would close.
                    os.dup2(nothing, file, inheritable=False)
    os.close(nothing)
