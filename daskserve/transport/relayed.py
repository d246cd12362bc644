"""Connections to workers by way of the scheduler; in a client."""

from __future__ import annotations

import logging
from typing import Any

from distributed.protocol.serialize import Serialize

logger = logging.getLogger(__name__)

#: More at once is warned of.
WARN_BYTES = 2**20
#: Large values go in portions, one after the other; what is smaller comes in between.
PORTION_BYTES = 64 * 1024


class RelayedComm:
    """A comm that goes through the scheduler, and says so when much does.

    Parameters
    ----------
    comm
        To the scheduler, which passes everything on.
    worker
        Whom it leads to.
    """

    def __init__(self, comm: Any, worker: str) -> None:
        self._comm = comm
        self._worker = worker
        self._at_once = 0
        self._warned = False

    @property
    def stream(self) -> Any:
        """The stream of the connection to the scheduler, if it is over TCP."""
        return getattr(self._comm, "stream", None)

    async def read(self) -> Any:
        """Read a message."""
        message = await self._comm.read()
        self._look_at(message)
        return message

    async def write(self, message: Any) -> None:
        """Write a message."""
        self._look_at(message)
        await self._comm.write(message)

    def abort(self) -> None:
        """Close at once."""
        self._comm.abort()

    def __repr__(self) -> str:
        return f"{self._comm!r} on to {self._worker}"

    def _look_at(self, message: Any) -> None:
        data = message.data if isinstance(message, Serialize) else message
        size = len(data) if isinstance(data, bytes) else 0
        self._at_once = self._at_once + size if size >= PORTION_BYTES else size
        if self._warned or self._at_once <= WARN_BYTES:
            return
        self._warned = True
        logger.warning(
            "A value of more than %d MiB goes through the scheduler, for worker %s "
            "cannot be reached from here: that is slow, and others wait for the "
            "scheduler meanwhile",
            WARN_BYTES // 2**20,
            self._worker,
        )
