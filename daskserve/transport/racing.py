"""Two ways to one place: the better one, or what works first. Any process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

Connect = Callable[[], Coroutine[Any, Any, Any]]


async def race(
    best: Connect, other: Connect, head_start_s: float
) -> tuple[Any, asyncio.Future[Any] | None]:
    """Open a comm the best way, or another if that one takes long (RFC 8305).

    Parameters
    ----------
    best, other
        Open a comm.
    head_start_s
        So long is only the best way tried.

    Returns
    -------
    tuple of (comm, asyncio.Future or None)
        With the other way's comm, what is still tried the best way, or has failed:
        give it to `discard`.

    Raises
    ------
    Exception
        Neither works; it says why the best one does not.
    """
    first = asyncio.ensure_future(best())
    second: asyncio.Future[Any] | None = None
    try:
        await asyncio.wait([first], timeout=head_start_s)
        if not _works(first):
            second = asyncio.ensure_future(other())
            pending: set[asyncio.Future[Any]] = {first, second}
            while pending and not (_works(first) or _works(second)):
                _, pending = await asyncio.wait(
                    pending, return_when=asyncio.FIRST_COMPLETED
                )
    except BaseException:
        discard(first)
        discard(second)
        raise
    if second is None or not _works(second) or _works(first):
        discard(second)
        return first.result(), None
    return second.result(), first


def discard(connecting: asyncio.Future[Any] | None) -> None:
    """Close a comm that is about to be opened, or is open."""
    if connecting is not None:
        connecting.cancel()
        connecting.add_done_callback(_abort)


def _works(connecting: asyncio.Future[Any]) -> bool:
    return connecting.done() and not (
        connecting.cancelled() or connecting.exception() is not None
    )


def _abort(connecting: asyncio.Future[Any]) -> None:
    if _works(connecting):
        connecting.result().abort()
