"""A slow way to a port, for tests: bytes pass on at a rate, and wait at the sender."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: What a connection may hold on the way, beside the kernels' least.
BUFFER_BYTES = 64 * 1024


class Link:
    """Connections to `target`, a port of this machine; `with open_link(...)` runs it.

    Attributes
    ----------
    rate
        Bytes per second, for all connections and both directions together.
    """

    def __init__(self, target: int, rate: float) -> None:
        self.rate = rate
        self.passed = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="test-link")

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(0.05):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._pass_on(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        here, _ = self._listener.accept()
        there = socket.socket()
        for sock in (here, there):
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        try:
            there.connect(("127.0.0.1", self._target))
        except OSError:
            return here.close()
        self._pairs |= {here: there, there: here}
        for sock in (here, there):
            self._selector.register(sock, selectors.EVENT_READ)

    def _pass_on(self, sock: socket.socket) -> None:
        other = self._pairs.get(sock)
        if other is None:
            return
        try:
            data = sock.recv(8192)
            if data:
                time.sleep(len(data) / self.rate)
                other.sendall(data)
                self.passed += len(data)
                return
        except OSError:
            pass
        for end in (sock, other):
            self._selector.unregister(end)
            del self._pairs[end]
            end.close()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(10)
        for sock in [self._listener, *self._pairs]:
            with contextlib.suppress(OSError):
                sock.close()
        self._selector.close()


@contextmanager
def open_link(target: int, rate: float) -> Iterator[Link]:
    link = Link(target, rate)
    link._thread.start()
    try:
        yield link
    finally:
        link.close()
