"""A way to workers for clients that reach only the scheduler. Scheduler.

What a client would say to a worker on a connection of its own comes on one to the
scheduler, and goes on as it is. That costs the scheduler time, and its memory holds one
message each way at most.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed import Scheduler
from distributed.comm.core import connect

from daskserve.transport.flushing import flushed

logger = logging.getLogger(__name__)


async def relay(scheduler: Scheduler, comm: Any, to: str, timeout_s: float) -> None:
    """Pass on what comes in either direction until one end closes.

    Parameters
    ----------
    scheduler
        The scheduler.
    comm
        The client's connection.
    to
        The Dask address of a worker.
    timeout_s
        For the connection to it.
    """
    if to not in scheduler.workers:  # nobody gets anywhere else by this
        comm.abort()
        return
    try:
        onward = await connect(
            to, timeout=timeout_s, deserialize=False, **scheduler.connection_args
        )
    except (OSError, TimeoutError) as err:
        logger.info("no way to %s for a client either: %s", to, err)
        comm.abort()
        return
    pumps = [
        asyncio.ensure_future(_pump(comm, onward)),
        asyncio.ensure_future(_pump(onward, comm)),
    ]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in (comm, onward):
            end.abort()
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)


async def _pump(source: Any, target: Any) -> None:
    try:
        while True:
            # What is large is in frames of its own, which are not unpacked here.
            await target.write(await source.read())
            await flushed(target)
    except OSError:  # CommClosedError is one
        pass
