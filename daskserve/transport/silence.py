"""Notice peers that do not answer any more, in seconds. Any process, one loop's use.

A host that loses its power or its link says no goodbye: TCP alone goes on sending for a
quarter of an hour, and who only waits for an answer waits for ever. Kernels answer for
their processes, so a peer that computes, or is stopped, is not silent.

``TCP_USER_TIMEOUT`` would do nearly the same, but it also cuts off a peer that has not
read for so long, as a replica whose user code blocks its loop while bodies arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from daskserve.transport.forks import close_in_children

#: So many looks at a connection in the time that a peer may be silent.
LOOKS = 8

# Of Linux's `struct tcp_info`: probes that are not answered, segments that are not
# acknowledged, milliseconds since data and since an acknowledgement came.
_TCP_INFO = struct.Struct("=3xB20xI24xII")
_HAS_INFO = sys.platform == "linux" and hasattr(socket, "TCP_INFO")


@dataclass(slots=True)
class _Watched:
    sock: Any
    on_silent: Callable[[], None]
    #: Since when it is known to owe us an answer, on the loop's clock.
    asked_at: float | None = None


class SilenceWatch:
    """Watch connections: one timer for all, while there are any.

    Parameters
    ----------
    loop
        The loop that everything here runs on.
    limit_s
        How long a peer may owe an answer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        self._loop = loop
        self._limit_s = limit_s
        self._watched: dict[object, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None
        close_in_children(self)

    def files(self) -> Iterable[int]:
        """Return the files of the connections, for forked children to close."""
        return [watched.sock.fileno() for watched in self._watched.values()]

    @property
    def reason(self) -> str:
        """What a silent peer did, for messages."""
        return f"has not answered for {self._limit_s:g} s: is its host cut off?"

    def add(self, key: object, sock: Any, on_silent: Callable[[], None]) -> None:
        """Watch the connection `key`, a TCP socket or None, until `discard`.

        `on_silent` is called when its peer has been silent for too long.
        """
        if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        idle_s = max(1, math.floor(self._limit_s / 3))
        interval_s = max(1, math.floor(self._limit_s / 6))
        # Where the kernel tells no more, it decides; elsewhere we do, a moment before.
        count = 2 + math.ceil((self._limit_s - idle_s) / interval_s)
        with contextlib.suppress(OSError):  # it has ended, as its owner will notice
            keep_alive(sock, idle_s, interval_s, count)
            self._watched[key] = _Watched(sock, on_silent)
        if self._timer is None and _HAS_INFO:
            self._sleep()

    def discard(self, key: object) -> None:
        """Watch a connection no more; nothing happens if it was not watched."""
        self._watched.pop(key, None)
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sleep(self) -> None:
        self._timer = self._loop.call_later(self._limit_s / LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        silent = [k for k, w in self._watched.items() if self._is_silent(w, now)]
        # All that are silent are known before anything is done about one of them.
        found = [self._watched.pop(key) for key in silent]
        if self._watched:
            self._sleep()
        for watched in found:
            watched.on_silent()

    def _is_silent(self, watched: _Watched, now: float) -> bool:
        try:
            info = watched.sock.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size
            )
        except OSError:  # closed already
            return False
        probes, unacked, data_ms, ack_ms = _TCP_INFO.unpack(info)
        heard_at = now - min(data_ms, ack_ms) / 1000
        # Of two probes that follow one another closely, kernels answer one.
        if not unacked and probes < 2:
            watched.asked_at = None
            return False
        if watched.asked_at is None or watched.asked_at < heard_at:
            watched.asked_at = now
        # Both: what was sent a moment ago, after a long pause, is not overdue.
        return (
            now - heard_at >= self._limit_s
            and now - watched.asked_at >= self._limit_s / 4
        )


def keep_alive(sock: Any, idle_s: int, interval_s: int, count: int) -> None:
    """Let the kernel ask a peer that is silent.

    It does after `idle_s` seconds, then every `interval_s`; after `count` times in vain
    the connection breaks.
    """
    options = {
        "TCP_KEEPIDLE": idle_s,
        "TCP_KEEPINTVL": interval_s,
        "TCP_KEEPCNT": count,
    }
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # they differ between systems
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
