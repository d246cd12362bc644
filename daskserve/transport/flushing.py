"""Flow control that Dask's comms over TCP do not have. Any process."""

from __future__ import annotations

from typing import Any


async def flushed(comm: Any) -> None:
    """Wait until the kernel has taken all that was written to a comm.

    ``TCP.write`` of Dask's returns before: whoever writes on fills the memory, and what
    comes later cannot pass. Other comms wait by themselves.

    Raises
    ------
    OSError
        The comm has closed.
    """
    stream = getattr(comm, "stream", None)
    if stream is not None and stream.writing():
        await stream.write(b"")
