"""Calls through handles, on the transport loop: many at once, from any thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Hashable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from daskserve.exceptions import DeploymentUnavailableError
from daskserve.transport.dispatcher import Call, Dispatcher, timeout_error
from daskserve.transport.loops import Mailbox
from daskserve.transport.messages import CALL, Message


@dataclass(slots=True, eq=False)
class CallRequest:
    """One call on its way, and where its answer goes."""

    deployment: str
    method_name: str
    #: Pickled ``(args, kwargs)``.
    arguments: bytes
    #: Keys of the Dask futures among them.
    future_keys: tuple[Hashable, ...]
    request_id: str | None
    #: Gets the ``RESULT`` or ``ERROR`` message, or one of our errors.
    answer: Future[Message] = field(default_factory=Future)


class CallSender:
    """Send calls out through a dispatcher.

    Parameters
    ----------
    dispatcher
        Of the same process.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self._inbox: Mailbox[CallRequest] = Mailbox(dispatcher.loop, self._begin)

    def send(self, request: CallRequest) -> None:
        """Start a call; any thread. Cancel its answer to cancel the call."""
        if not self._inbox.put(request):
            stopped = DeploymentUnavailableError("daskserve is stopping here.")
            request.answer.set_exception(stopped)

    def _begin(self, batch: list[CallRequest]) -> None:
        for request in batch:
            if not request.answer.done():
                task = self.dispatcher.loop.create_task(self._run(request))
                request.answer.add_done_callback(_Canceller(self.dispatcher, task))

    async def _run(self, request: CallRequest) -> None:
        dispatcher = self.dispatcher
        call = Call(dispatcher, request.deployment)
        timer: asyncio.TimerHandle | None = None
        group = dispatcher.groups.get(request.deployment)
        if group is not None and group.timeout_s is not None:
            failure = timeout_error(request.deployment, group.timeout_s)
            timer = dispatcher.loop.call_later(group.timeout_s, call.abort, failure)

        def make(exchange_id: int, replica_id: int) -> Message:
            return (
                CALL,
                exchange_id,
                replica_id,
                request.method_name,
                request.arguments,
                request.future_keys,
                request.request_id,
            )

        try:
            message = await call.first(make, retry_lost=False)
        except asyncio.CancelledError:
            call.cancel()
            request.answer.cancel()
            raise
        except Exception as err:
            call.cancel()
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                request.answer.set_exception(err)
        else:
            with contextlib.suppress(InvalidStateError):
                request.answer.set_result(message)
        finally:
            if timer is not None:
                timer.cancel()
            call.finish()


class _Canceller:
    """Cancel a call's task when its answer was cancelled, from whichever thread."""

    __slots__ = ("_dispatcher", "_task")

    def __init__(self, dispatcher: Dispatcher, task: asyncio.Task[None]) -> None:
        self._dispatcher = dispatcher
        self._task = task

    def __call__(self, answer: Future[Message]) -> None:
        if answer.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop has stopped
                self._dispatcher.loop.call_soon_threadsafe(self._task.cancel)
