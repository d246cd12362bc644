"""How much of each response a proxy may hold, so that all together stay bounded. Pure.

A client that reads slowly leaves its response in the proxy: up to the window, which the
request tells the replica. The more of them there are, the smaller new windows become.
"""

from __future__ import annotations

#: No window is smaller: what a server buffers on a connection anyway.
MIN_WINDOW_BYTES = 64 * 1024
#: One request may have what is free divided by this.
SHARE = 8


class Windows:
    """The memory of one proxy.

    Parameters
    ----------
    total_bytes
        What all windows together may take, but for `MIN_WINDOW_BYTES` each.
    window_bytes
        The largest window.

    Examples
    --------
    >>> windows = Windows(1_000_000, 500_000)
    >>> windows.take(), windows.take()
    (125000, 109375)
    """

    def __init__(self, total_bytes: int, window_bytes: int) -> None:
        self.taken_bytes = 0
        self._total_bytes = total_bytes
        self._window_bytes = window_bytes

    def take(self) -> int:
        """Return the window of a new request in bytes; `give_back` it."""
        window = (self._total_bytes - self.taken_bytes) // SHARE
        if window > self._window_bytes:
            window = self._window_bytes
        if window < MIN_WINDOW_BYTES:
            window = min(MIN_WINDOW_BYTES, self._window_bytes)
        self.taken_bytes += window
        return window

    def give_back(self, window_bytes: int) -> None:
        """Take note of a request's end."""
        self.taken_bytes -= window_bytes
