"""Items of a stream on their way from the transport loop to who consumes them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

from daskserve.packing import Packed
from daskserve.transport.messages import item_cost


class Items:
    """A queue between threads that tells how much of it was consumed.

    Parameters
    ----------
    window_bytes
        How much may be on the way, and in here.

    Examples
    --------
    >>> items = Items(2048)
    >>> items.take(), items.news().done()
    (None, False)
    >>> items.put(b"one")
    >>> items.news().done(), items.take()
    (True, b'one')
    """

    def __init__(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        #: Told, on the consumer's thread, of what it has taken, in portions.
        self.on_consumed: Callable[[int], None] | None = None
        self._lock = threading.Lock()
        self._items: deque[Packed] = deque()
        self._taken = 0
        self._news: Future[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> bool:
        """Whether there are items."""
        return bool(self._items)

    def put(self, data: Packed) -> None:
        """Add an item; any thread."""
        with self._lock:
            self._items.append(data)
        self._wake()

    def close(self, _: object = None) -> None:
        """Note that nothing more comes; what is here can still be taken."""
        with self._lock:
            self._closed = True
        self._wake()

    def take(self) -> Packed | None:
        """Take the next item, or None if there is none now; any thread."""
        with self._lock:
            if not self._items:
                return None
            data = self._items.popleft()
            self._taken += item_cost(data)
            # In portions, and at once when the replica may be waiting for it.
            if 2 * self._taken < self.window_bytes:
                return data
            taken, self._taken = self._taken, 0
        if self.on_consumed is not None:
            self.on_consumed(taken)
        return data

    def news(self) -> Future[None]:
        """Return what is done when `take` is worth a try, or nothing more comes."""
        with self._lock:
            if self._news is None:
                self._news = Future()
            news = self._news
            ready = bool(self._items) or self._closed
        if ready:
            self._wake()
        return news

    def _wake(self) -> None:
        with self._lock:
            news, self._news = self._news, None
        if news is not None:
            with contextlib.suppress(InvalidStateError):  # nobody waits any more
                news.set_result(None)
