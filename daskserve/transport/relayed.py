"""Connections to workers by way of the scheduler; in a client."""

from __future__ import annotations

import logging
from typing import Any

from distributed.protocol.serialize import Serialize

logger = logging.getLogger(__name__)

#: Larger messages are warned of.
WARN_BYTES = 2**20


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
        self._warned = False

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
        if self._warned or not isinstance(data, bytes) or len(data) <= WARN_BYTES:
            return
        self._warned = True
        logger.warning(
            "%.1f MiB go through the scheduler, for worker %s cannot be reached from "
            "here: that is slow, and others wait for the scheduler meanwhile",
            len(data) / 2**20,
            self._worker,
        )
