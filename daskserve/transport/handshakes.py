"""TLS connections count, and have an end, before their handshake is done. Any loop.

A loop's own server tells nobody of a connection until its client has shaken hands, for
which it may take a minute: clients that say nothing take files, as many as there are.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any

from daskserve.transport.forks import close_in_children

logger = logging.getLogger(__name__)

#: So many connections are accepted in one turn of the loop.
_BATCH = 64
#: How long until it is tried again when there are no files.
_NO_FILES_S = 0.05
_NO_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class TlsListener:
    """Accepts connections; has what is used of an `asyncio.Server`.

    Parameters
    ----------
    sock
        It listens, and does not block.
    context
        The server's TLS.
    make_protocol
        Makes the protocol of a connection.
    timeout_s
        How long a handshake may take.
    admit
        Whether there is room for one more, or was made.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        timeout_s: float,
        admit: Callable[[], bool],
    ) -> None:
        self.sockets = [sock]
        #: The handshakes of protocols, the oldest first. A protocol whose connection is
        #: made is to be taken out by it.
        self.handshakes: dict[asyncio.BaseProtocol, asyncio.Task[Any]] = {}
        self._files: dict[asyncio.BaseProtocol, socket.socket] = {}
        self._loop = asyncio.get_running_loop()
        self._context = context
        self._make_protocol = make_protocol
        self._timeout_s = timeout_s
        self._admit = admit
        self._resuming: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._accept)
        close_in_children(self)

    def files(self) -> Iterable[int]:
        """Return the files of all sockets, for forked children to close."""
        return [s.fileno() for s in (*self.sockets, *self._files.values())]

    def begin(self, connection: socket.socket) -> None:
        """Shake hands on a connection that was accepted, if there is room for it."""
        if not self._admit():
            connection.close()
            return
        connection.setblocking(False)
        protocol = self._make_protocol()

        def done(task: asyncio.Task[Any]) -> None:
            self.handshakes.pop(protocol, None)
            del self._files[protocol]
            if task.cancelled() or task.exception() is not None:
                connection.close()
                logger.debug("a TLS handshake came to nothing: %s", task)

        task = self._loop.create_task(self._shake(protocol, connection))
        self.handshakes[protocol], self._files[protocol] = task, connection
        task.add_done_callback(done)

    def drop_oldest(self) -> bool:
        """End the handshake that has taken longest, if there is one."""
        protocol = next(iter(self.handshakes), None)
        if protocol is None:
            return False
        self.handshakes.pop(protocol).cancel()
        return True

    def close(self) -> None:
        """Accept nothing more; handshakes go on."""
        if self._resuming is not None:
            self._resuming.cancel()
        for sock in self.sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self.sockets = []

    async def wait_closed(self) -> None:
        """End all handshakes."""
        while self.drop_oldest():
            pass

    async def _shake(
        self, protocol: asyncio.BaseProtocol, connection: socket.socket
    ) -> None:
        await self._loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=self._context,
            ssl_handshake_timeout=self._timeout_s,
        )

    def _accept(self) -> None:
        for sock in self.sockets:
            for _ in range(_BATCH):
                try:
                    connection, _ = sock.accept()
                except OSError as err:
                    if err.errno in _NO_FILES:
                        self._pause(sock)
                    break
                self.begin(connection)

    def _pause(self, sock: socket.socket) -> None:
        """Wait for files: those that have not shaken hands are the first to go."""
        self.drop_oldest()
        self._loop.remove_reader(sock.fileno())
        self._resuming = self._loop.call_later(
            _NO_FILES_S, self._loop.add_reader, sock.fileno(), self._accept
        )
