"""Calls whose arguments have their values elsewhere, or not yet. Any process.

Nobody waits for them at the caller: what they need comes about on other threads, and
then they are sent. Values of Dask futures go from worker to worker, results of other
calls along with the call, as they came.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from concurrent.futures import InvalidStateError
from typing import Any

from distributed import Future, get_client, wait

from daskserve.replica.context import current_replica
from daskserve.response_stream import error_of
from daskserve.session import ClientSession, Session, WorkerSession, current_session
from daskserve.transport.calls import Answer, CallRequest
from daskserve.transport.messages import RESULT
from daskserve.transport.values import Awaited


def send(request: CallRequest, awaited: Awaited, session: Session) -> None:
    """Send a call once all that is awaited for it is there; returns at once."""
    if awaited.answers:
        _send_when_answered(request, awaited, session)
    elif awaited.futures:
        _send_when_done(request, awaited.futures, session)
    else:
        session.calls.send(request)


async def finished(futures: list[Future[Any]]) -> None:
    """Wait for Dask futures, on their client's loop, and raise if one fails."""
    # What `get_deployment` gives has no client: its values are on the cluster.
    futures = [future for future in futures if future.client is not None]
    if not futures:
        return
    client: Any = futures[0].client
    with client.as_current():
        await wait(futures)
    for future in futures:
        if future.status != "finished":
            await client.gather(future, asynchronous=True)  # raises its error


def compute(collection: Any) -> Future[Any]:
    """Compute a Dask collection by the client of the code that runs."""
    session, context = current_session(), current_replica.get()
    client: Any
    if isinstance(session, ClientSession):
        client = session.client
    elif isinstance(session, WorkerSession) and context is not None:
        client = context._replica.clients.get()
    else:
        client = get_client()
    future: Future[Any] = client.compute(collection)
    return future


def fail(answer: Answer, error: BaseException) -> None:
    """Let a call that was not sent fail."""
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        answer.set_exception(error)


def _send_when_answered(
    request: CallRequest, awaited: Awaited, session: Session
) -> None:
    lock, missing = threading.Lock(), len(awaited.answers)

    def answered(_: object) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        try:
            messages = [answer.result() for answer in awaited.answers]
        except BaseException as err:  # CancelledError is no Exception everywhere
            fail(request.answer, err)
            return
        for message in messages:
            if message[0] != RESULT:
                fail(request.answer, error_of(message))
                return
        request.results = tuple(answer.packed() for answer in awaited.answers)
        send(request, Awaited(awaited.compute, awaited.futures), session)

    for answer in awaited.answers:
        answer.add_done_callback(answered)


def _send_when_done(
    request: CallRequest, futures: list[Future[Any]], session: Session
) -> None:
    client: Any = futures[0].client

    async def wait_and_send() -> None:
        try:
            await finished(futures)
            request.near = await _near(client, futures)
        except (Exception, asyncio.CancelledError) as err:
            fail(request.answer, err)
        else:
            session.calls.send(request)

    client.loop.add_callback(wait_and_send)


async def _near(client: Any, futures: list[Future[Any]]) -> tuple[dict[str, int], int]:
    """Return how many bytes are on which workers, and how many there are."""
    keys = [future.key for future in futures]
    who_has = await client.scheduler.who_has(keys=keys)
    sizes = await client.scheduler.nbytes(keys=keys, summary=False)
    there: Counter[str] = Counter()
    for key, workers in who_has.items():
        for worker in workers:
            there[worker] += sizes.get(key, 0)
    return dict(there), sum(sizes.get(key, 0) for key in who_has)
